"""The subset is the top k by delta_score of what the rules leave, by stated rules, counted, and read in batches."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hermes.artifacts import write_manifest
from hermes.console import UserError
from stages import subset

Row = dict[str, Any]
PIPELINE = "stages: {s: {params: ['profiles.${profile}.subset']}}\n"
OFF: dict[str, Any] = {
    "k": None,
    "held_out_k": None,
    "drop_malformed": False,
    "drop_empty": False,
    "drop_identical": False,
    "drop_exact_duplicates": False,
    "near_duplicate_similarity": None,
    "drop_evaluation_leaks": False,
}


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").write_text(PIPELINE)
    return tmp_path


def row(score: float, question: str | None = None, chosen: str | None = None, rejected: str | None = None) -> Row:
    """A pair that no rule removes; of its own where nothing is given."""
    row.count += 1  # type: ignore[attr-defined]
    own = row.count  # type: ignore[attr-defined]
    return {
        "question": f"question {own}" if question is None else question,
        "chosen": f"good {own}" if chosen is None else chosen,
        "rejected": f"bad {own}" if rejected is None else rejected,
        "delta_score": float(score),
    }


row.count = 0  # type: ignore[attr-defined]


def write(rows: Sequence[Row], split: str = "train", schema: pa.Schema | None = None) -> None:
    subset.RAW.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), subset.RAW / f"{split}.parquet")


def run(**settings: Any) -> dict[str, Any]:
    """Runs the stage with all rules off but these; returns its report."""
    section = OFF | settings
    Path("params.yaml").write_text(json.dumps({"profile": "x", "profiles": {"x": {"subset": section}}}))
    write_manifest(subset.RAW)
    subset.main()
    return json.loads(subset.REPORT.read_text())


def kept(split: str = "train") -> list[Row]:
    return pq.read_table(subset.OUTPUT / f"{split}.parquet").to_pylist()


def test_held_out_pairs_are_cut_to_evenly_spaced_ones_and_training_is_not() -> None:
    rows = {split: [row(i / 8) for i in range(8)] for split in ("train", "validation", "test")}
    for split, found in rows.items():
        write(found, split)
    report = run(held_out_k=3)
    assert kept("test") == [rows["test"][i] for i in (0, 2, 5)]
    assert kept() == rows["train"]
    for split in ("validation", "test"):
        assert report[split]["removed"] == {"beyond_held_out_k": 5}
        assert report[split]["kept"] == 3
    assert "beyond_held_out_k" not in run(held_out_k=8)["test"]["removed"]


def test_the_best_are_kept_in_their_raw_order() -> None:
    rows = [row(score) for score in (0.3, 0.9, 0.1, 0.7, 0.5)]
    write(rows)
    report = run(k=3)["train"]
    assert kept() == [rows[1], rows[3], rows[4]]
    assert report["read"] == 5
    assert report["kept"] == 3
    assert report["removed"] == {"below_top_k": 2}
    assert report["delta_score"] == {"min": 0.5, "mean": 0.7, "max": 0.9}


def test_ties_at_the_cut_go_to_the_first_rows_and_are_counted() -> None:
    rows = [row(score) for score in (0.5, 0.9, 0.5, 0.2, 0.5, 0.5)]
    write(rows)
    report = run(k=3)["train"]
    assert kept() == rows[:3]
    assert report["cut"] == {"delta_score": 0.5, "tied_at_cut": 4, "tied_kept": 2}


def test_without_k_all_are_kept() -> None:
    rows = [row(score) for score in (0.5, -1.0, 0.0)]
    write(rows)
    report = run(k=None)["train"]
    assert kept() == rows
    assert (report["cut"], report["removed"]) == (None, {})


def test_top_k_is_that_of_a_sort_on_random_data() -> None:
    for seed in range(20):
        random = Random(seed)
        rows = [row(random.randint(0, 5)) for _ in range(random.randint(1, 30))]
        k = random.randint(1, len(rows))
        write(rows)
        run(k=k)
        best = sorted(range(len(rows)), key=lambda i: (-rows[i]["delta_score"], i))[:k]
        assert kept() == [rows[i] for i in sorted(best)]


def test_held_out_splits_are_cleaned_but_not_cut() -> None:
    held_out = [row(0.1), row(0.9), row(0.5, chosen=" ")]
    write([row(0.5), row(0.6)])
    write(held_out, "test")
    report = run(k=1, drop_empty=True)
    assert kept("test") == held_out[:2]
    assert report["test"]["removed"] == {"empty_answer": 1}
    assert set(report) == {"train", "test"}


EXAMPLE = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
RULES: dict[str, tuple[dict[str, Any], list[Row], str]] = {
    "empty question": ({"drop_empty": True}, [row(1, question=" \n")], "empty_answer"),
    "empty chosen": ({"drop_empty": True}, [row(1, chosen="")], "empty_answer"),
    "empty rejected": ({"drop_empty": True}, [row(1, rejected="\t")], "empty_answer"),
    "identical": ({"drop_identical": True}, [row(1, chosen="a B", rejected="a B")], "identical_answers"),
    "case and spacing": ({"drop_identical": True}, [row(1, chosen="a B\n", rejected="A  b")], "identical_answers"),
    "duplicate": ({"drop_exact_duplicates": True}, [row(2, "q", "a", "b"), row(1, "q", "a", "b")], "exact_duplicate"),
    "near duplicate": (
        {"near_duplicate_similarity": 0.9},
        [row(2, EXAMPLE, "yes", "no"), row(1, EXAMPLE.upper() + "!", "Yes", "never")],
        "near_duplicate",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_removes_and_counts_where_it_is_on(name: str) -> None:
    rule, rows, reason = RULES[name]
    others = [row(0), row(3)]
    write([others[0], *rows, others[1]])
    assert run(**rule)["train"]["removed"] == {reason: 1}
    assert kept() == [others[0], *rows[:-1], others[1]]
    assert run()["train"]["removed"] == {}
    assert kept() == [others[0], *rows, others[1]]
    everything_else = {key: value for key, value in ALL.items() if key not in rule}
    assert reason not in run(**everything_else)["train"]["removed"]


ALL = {
    "drop_empty": True,
    "drop_identical": True,
    "drop_exact_duplicates": True,
    "near_duplicate_similarity": 0.9,
    "drop_evaluation_leaks": True,
}


def test_pairs_that_differ_in_one_text_are_no_duplicates() -> None:
    rows = [
        row(1, "q", "a", "b"),
        row(1, "q", "a", "c"),
        row(1, "q", "c", "b"),
        row(1, "p", "a", "b"),
        row(1, "qa", "", "b"),
    ]
    write(rows)
    run(drop_exact_duplicates=True)
    assert kept() == rows


@pytest.mark.parametrize("split", ["test", "validation"])
def test_training_questions_that_evaluation_asks_are_removed(split: str) -> None:
    rows = [row(1, question="What is tea?"), row(1, question="What is salt?"), row(1, question=" what is  TEA? ")]
    write(rows)
    write([row(1, question="What is tea?")], split)
    report = run(drop_evaluation_leaks=True)
    assert kept() == [rows[1]]
    assert report["train"]["removed"] == {"leaks_from_evaluation": 2}
    assert report[split]["removed"] == {}
    assert run(drop_evaluation_leaks=False)["train"]["removed"] == {}


def test_the_same_question_may_be_asked_twice_in_training_and_in_evaluation() -> None:
    for split in ("train", "test"):
        write([row(1, question="What is tea?"), row(1, question="What is tea?")], split)
    write([row(1, question="q")])
    assert all(not part["removed"] for part in run(drop_evaluation_leaks=True).values())


def test_each_pair_is_counted_once_under_the_first_rule_that_removes_it() -> None:
    rows = [row(1), row(1, chosen="", rejected=""), row(1, "q", "a", "A"), row(1, "q", "a", "A")]
    write(rows)
    report = run(**ALL)["train"]
    assert report["removed"] == {"empty_answer": 1, "identical_answers": 2}
    assert report["read"] == report["kept"] + sum(report["removed"].values())


WORDS = " ".join(f"word{i}" for i in range(60))


def test_of_near_duplicates_the_better_pair_stays() -> None:
    write([row(0.1, "ask", WORDS), row(5.0, "ask", f"{WORDS} more"), row(3.0)])
    assert run(k=2, near_duplicate_similarity=0.9)["train"]["removed"] == {"near_duplicate": 1}
    assert kept_scores() == [5.0, 3.0]


def test_of_exact_duplicates_the_better_pair_stays_and_of_equal_ones_the_first() -> None:
    write([row(1, "q", "a", "b"), row(2, "q", "a", "b"), row(2, "Q", "a", "b")])
    assert run(drop_exact_duplicates=True)["train"]["removed"] == {"exact_duplicate": 2}
    assert pq.read_table(subset.OUTPUT / "train.parquet").to_pylist()[0]["question"] == "q"
    assert kept_scores() == [2.0]


def kept_scores() -> list[float]:
    return pq.read_table(subset.OUTPUT / "train.parquet")["delta_score"].to_pylist()


def after(said: str, pair: Row) -> Row:
    return pair | {"context": [{"role": "user", "content": said}, {"role": "assistant", "content": "Yes."}]}


def test_the_same_question_after_another_conversation_is_another_question() -> None:
    write([after("Tea?", row(1, "Why?", "a", "b"))], "test")
    write([after("Salt?", row(1, "Why?", "a", "b")), after("Sand?", row(2, "Why?", "a", "b"))])
    report = run(drop_evaluation_leaks=True, drop_exact_duplicates=True, near_duplicate_similarity=0.9)
    assert report["train"]["removed"] == {}
    write([after("tea? ", row(1, "Why?", "c", "d")), row(2)])
    assert run(drop_evaluation_leaks=True)["train"]["removed"] == {"leaks_from_evaluation": 1}


def test_pairs_without_words_are_not_near_duplicates_for_that() -> None:
    write([row(1, "🙂", "👍", "👎"), row(2, "🌧", "☔", "☀")])
    assert run(near_duplicate_similarity=0.9)["train"]["removed"] == {}


def test_a_column_named_context_that_holds_text_is_refused() -> None:
    write([row(1) | {"context": "a passage"}])
    with pytest.raises(UserError, match="column `context` holds string; expected a list of messages"):
        run()


def jaccard(one: str, two: str) -> float:
    """Exact similarity of the sets of word 5-grams."""
    found = [re.findall(r"\w+", text.lower()) for text in (one, two)]
    a, b = ({tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))} for words in found)
    return len(a & b) / len(a | b)


def test_near_duplicates_are_those_of_high_jaccard_similarity() -> None:
    """64 hashes estimate a similarity to about 0.04: what is clearly above is removed, what is clearly below stays."""
    random = Random(0)
    checked = {True: 0, False: 0}
    for _ in range(250):
        words = [f"w{random.randrange(1000)}" for _ in range(random.randint(60, 300))]
        changed = list(words)
        for _ in range(random.choice((0, 1, 1, 30, 60))):
            changed[random.choice((0, len(words) - 1, random.randrange(len(words))))] = f"v{random.randrange(1000)}"
        one, two = (row(1, question="ask", chosen=" ".join(text)) for text in (words, changed))
        similarity = jaccard(*(f"{pair['question']} {pair['chosen']}" for pair in (one, two)))
        if 0.65 < similarity < 0.98:
            continue
        checked[similarity > 0.9] += 1
        signatures = [subset.minhash(f"{pair['question']} {pair['chosen']}") for pair in (one, two)]
        bands: dict[tuple[int, bytes], list[Any]] = {}
        found = [subset.is_near_duplicate(signature, bands, 0.9) for signature in signatures]
        assert found == [False, similarity > 0.9], similarity
    assert min(checked.values()) > 50


def test_the_estimated_similarity_is_near_the_exact_one() -> None:
    random = Random(1)
    for _ in range(40):
        words = [f"w{random.randrange(1000)}" for _ in range(100)]
        changed = words[: random.randrange(101)] + [f"v{i}" for i in range(random.randrange(50))]
        one, two = " ".join(words), " ".join(changed)
        estimate = (subset.minhash(one) == subset.minhash(two)).mean()
        assert estimate == pytest.approx(jaccard(one, two), abs=0.25)  # four standard deviations


def test_more_rows_than_are_usable_is_an_error_that_counts_them() -> None:
    write([row(1), row(2), row(3, chosen="")])
    with pytest.raises(UserError, match=r"`subset\.k` asks for 3 rows; .*train\.parquet has 2 usable of 3"):
        run(k=3, drop_empty=True)


@pytest.mark.parametrize("k", [0, -1])
def test_fewer_than_one_row_is_refused(k: int) -> None:
    write([row(1), row(2), row(3)])
    with pytest.raises(UserError, match="k"):
        run(k=k)


def test_without_a_score_all_pairs_are_kept_or_none_ranked() -> None:
    rows = [{name: value for name, value in row(i).items() if name != "delta_score"} for i in range(3)]
    write(rows)
    report = run(k=None)["train"]
    assert (report["kept"], report["cut"], report["delta_score"]) == (3, None, None)
    with pytest.raises(
        UserError, match=r"train\.parquet: has no `delta_score` to rank by; set `subset\.k: null`, or name"
    ):
        run(k=2)


@pytest.mark.parametrize("column", ["question", "chosen", "rejected"])
def test_a_missing_column_is_named_with_those_found(column: str) -> None:
    write([{name: value for name, value in row(1).items() if name != column}])
    with pytest.raises(UserError, match=rf"train\.parquet: column `{column}` is missing; found .*"):
        run()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_told_with_its_row(value: float) -> None:
    write([row(1), row(2), row(value)])
    message = (
        rf"train\.parquet, row 2: delta_score is {value}; expected a finite number; .*`subset\.drop_malformed: true`$"
    )
    with pytest.raises(UserError, match=message):
        run()


@pytest.mark.parametrize("column", ["question", "chosen", "rejected", "delta_score"])
def test_a_missing_value_is_told_with_its_row(column: str) -> None:
    write([row(1), row(2) | {column: None}, row(3)])
    with pytest.raises(
        UserError, match=rf"train\.parquet, row 1: `{column}` is empty; .*`subset\.drop_malformed: true`$"
    ):
        run()


def misfits(split: str, **found: dict[str, str]) -> None:
    """What fetch_data writes beside the rows that were not of their layout; `row3` is row 3."""
    rows = {name.removeprefix("row"): fault for name, fault in found.items()}
    (subset.RAW / "misfits.json").write_text(json.dumps({split: rows}))


def test_malformed_rows_are_removed_counted_and_named_where_they_may_be() -> None:
    """Before every other rule, in every split, and without a trace in what later rows are compared with."""
    nothing = dict.fromkeys(("question", "chosen", "rejected", "delta_score"))
    good = [row(1, "q", "a", "b"), row(2), row(3)]
    rows = [nothing, good[0], row(9) | {"delta_score": math.nan}, nothing, good[1], row(9) | {"chosen": None}, good[2]]
    rows += [row(i, rejected="x") | {"question": None} for i in range(7)]
    write(rows)
    write([row(1), nothing], "test")
    misfits(
        "train",
        row0={"kind": "not_chatml", "found": "'x' is not made of ChatML turns"},
        row3={"kind": "different_turns", "found": "chosen and rejected follow different turns"},
    )
    report = run(**ALL, k=2, drop_malformed=True)
    assert kept() == good[1:]
    assert report["train"]["removed"] == {
        "malformed_not_chatml": 1,
        "malformed_different_turns": 1,
        "malformed_no_score": 1,
        "malformed_missing_value": 8,
        "below_top_k": 1,
    }
    assert report["train"]["malformed_rows"] == {
        "not_chatml": [0],
        "different_turns": [3],
        "no_score": [2],
        "missing_value": [5, 7, 8, 9, 10],
    }
    assert report["train"]["read"] == len(rows) == report["train"]["kept"] + sum(report["train"]["removed"].values())
    assert report["train"]["delta_score"] == {"min": 2.0, "mean": 2.5, "max": 3.0}
    assert report["test"]["malformed_rows"] == {"missing_value": [1]}
    assert len(kept("test")) == 1
    with pytest.raises(UserError, match=r"test\.parquet, row 1: `question` is empty"):
        run(**ALL, k=2)
    write([row(1)], "test")
    with pytest.raises(
        UserError, match=r"train\.parquet, row 0: 'x' is not made of ChatML turns; mend it or `data\.format`"
    ):
        run(**ALL, k=2)


MESSAGE = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
NUMBERED = pa.list_(pa.struct([("role", pa.int64()), ("content", pa.int64())]))
USER, LATE = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    ("turns", "form", "kind", "found"),
    [
        ([USER | {"role": None}], MESSAGE, "no_messages", "is not a message with role and content"),
        ([USER | {"content": None}], MESSAGE, "no_messages", "is not a message with role and content"),
        ([None], MESSAGE, "no_messages", "'None' is not a message with role and content"),
        (["Hi"], pa.list_(pa.string()), "no_messages", "'Hi' is not a message with role and content"),
        ([{"role": 1, "content": 2}], NUMBERED, "no_messages", "is not a message with role and content"),
        ([USER | {"role": "robot"}], MESSAGE, "other_role", "a message is of the role 'robot'; expected one of system, user"),
        ([USER, LATE], MESSAGE, "late_system_prompt", "a system prompt stands behind other messages"),
    ],
)  # fmt: skip
def test_turns_that_no_template_writes_are_a_misfit_of_their_row(
    turns: list[Any], form: pa.DataType, kind: str, found: str
) -> None:
    """Also in a table that fetch_data copied as it was."""
    rows = [row(1) | {"context": context} for context in ([], turns, None)]
    write(rows, schema=pa.Table.from_pylist([row(1)]).schema.append(pa.field("context", form)))
    with pytest.raises(UserError, match=rf"train\.parquet, row 1: .*{found}.*; mend it or `data\.format`"):
        run()
    report = run(drop_malformed=True)["train"]
    assert report["removed"] == {f"malformed_{kind}": 1}
    assert report["malformed_rows"] == {kind: [1]}
    assert kept() == [rows[0], rows[2]]


def test_without_a_malformed_row_the_report_says_nothing_of_them() -> None:
    write([row(1), row(2)])
    assert run(drop_malformed=True) == run(drop_malformed=False)
    assert "malformed_rows" not in run(drop_malformed=True)["train"]


@pytest.mark.parametrize(
    ("column", "value", "wanted"),
    [("delta_score", "0.5", "numbers"), ("chosen", 3, "text"), ("question", None, "text")],
)
def test_a_column_of_another_type_is_told(column: str, value: object, wanted: str) -> None:
    write([row(1) | {column: value}])
    with pytest.raises(UserError, match=rf"train\.parquet: column `{column}` holds .*; expected {wanted}"):
        run()


def test_whole_numbers_are_scores_too() -> None:
    rows = [row(1) | {"delta_score": score} for score in (1, 3, 2)]
    write(rows)
    run(k=2)
    assert kept() == rows[1:]


def test_a_file_without_rows_and_one_that_is_not_parquet_are_told() -> None:
    write([], schema=pa.Table.from_pylist([row(1)]).schema)
    with pytest.raises(UserError, match=r"train\.parquet: has no rows"):
        run()
    (subset.RAW / "train.parquet").write_bytes(b"question,chosen\n")
    with pytest.raises(UserError, match=r"train\.parquet: not a readable Parquet file"):
        run()
    (subset.RAW / "train.parquet").unlink()
    with pytest.raises(UserError, match=r"data/raw: has no train\.parquet; run `dvc repro fetch_data`"):
        run()


def test_one_split_of_a_source_may_be_validation_and_test() -> None:
    held_out = [row(0.1), row(0.2)]
    for split in ("validation", "test"):
        write([*held_out, held_out[0]], split)
    write([row(0.5), held_out[1]])
    report = run(drop_exact_duplicates=True, drop_evaluation_leaks=True)
    assert kept("validation") == kept("test") == held_out
    assert report["train"]["removed"] == {"leaks_from_evaluation": 1}


def test_a_split_that_the_rules_empty_is_an_error_that_counts_them() -> None:
    write([row(1)])
    write([row(1, chosen=""), row(2, rejected="")], "test")
    with pytest.raises(UserError, match=r"test\.parquet: none of its 2 pairs is left \(2 empty_answer\)"):
        run(drop_empty=True)


@pytest.mark.parametrize("similarity", [0.0, 0.5, 1.1])
def test_a_similarity_that_the_bands_miss_is_refused(similarity: float) -> None:
    write([row(1)])
    with pytest.raises(UserError, match=r"near_duplicate_similarity` is"):
        run(near_duplicate_similarity=similarity)


def test_other_columns_come_along_with_their_types() -> None:
    rows = [row(i) | {"kind": "k", "repaired": bool(i % 2), "ids": [i, i]} for i in range(4)]
    write(rows)
    run(k=2)
    assert kept() == rows[2:]
    assert pq.read_schema(subset.OUTPUT / "train.parquet") == pq.read_schema(subset.RAW / "train.parquet")


def test_an_error_leaves_the_earlier_outputs() -> None:
    write([row(1), row(2)])
    run(k=1)

    def outputs() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (*subset.OUTPUT.iterdir(), subset.REPORT)}

    before = outputs()
    write([row(1, question="leaked")], "test")
    with pytest.raises(UserError):
        run(k=5)
    assert outputs() == before
    assert not list(Path().rglob("*.partial"))


def test_the_size_of_a_batch_changes_nothing_and_no_more_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    random = Random(2)
    rows = [
        row(random.randint(0, 3), question=f"q{random.randrange(15)}", chosen=random.choice(("", "a", "b")))
        for _ in range(50)
    ]
    write(rows)
    write([row(1, question="q3")], "test")
    report = run(k=10, **ALL)
    expected = kept()
    sizes: list[int] = []
    iterate = pq.ParquetFile.iter_batches

    def measured(self: pq.ParquetFile, *arguments: Any, **options: Any) -> Any:
        for batch in iterate(self, *arguments, **options):
            sizes.append(len(batch))
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", measured)
    monkeypatch.setattr(subset, "BATCH", 3)
    assert run(k=10, **ALL) == report
    assert kept() == expected
    assert max(sizes) == 3
    assert sum(sizes) == 2 * (50 + 1)


def test_kept_rows_of_mixed_sources_are_counted_by_source() -> None:
    write([row(i) | {"mixed_from": name} for i, name in enumerate("aabba")])
    assert run(k=3)["train"]["sources"] == {"a": 1, "b": 2}
