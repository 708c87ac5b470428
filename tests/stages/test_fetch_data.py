"""Tables of every format arrive from a folder with their rows, parts and misfits; what goes wrong is one line."""

import gzip
import json
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hermes import params
from hermes.artifacts import sha256_file
from hermes.console import UserError
from hermes.data import tables
from stages import fetch_data, subset
from tests.conftest import cpu_params
from tests.stages.fetching import (
    COLUMNS,
    ROWS,
    SPLITS,
    as_lines,
    asked,
    choose,
)

PLAIN = '{"id": "a", "split": "test", "question": "What is tea?", "answer": "A drink – hot."}\n'


def embed(splits: tuple[str, ...] = SPLITS) -> None:
    """Writes a small data/embedded."""
    fetch_data.EMBEDDED.mkdir(parents=True)
    for split in splits:
        pq.write_table(
            pa.Table.from_pylist([row | {"split": split} for row in ROWS]), fetch_data.EMBEDDED / f"{split}.parquet"
        )
    pq.write_table(
        pa.Table.from_pylist([dict.fromkeys(fetch_data.QUESTIONS, "q")]), fetch_data.EMBEDDED / "questions.parquet"
    )
    (fetch_data.EMBEDDED / "plain.jsonl").write_text(PLAIN)


def test_embedded_data_arrives_unchanged_with_the_held_out_questions(workplace: Path) -> None:
    embed()
    choose("data", "embedded", None, dict(zip(SPLITS, SPLITS, strict=True)))
    fetch_data.main()
    manifest = json.loads(Path("data/raw/manifest.json").read_text())
    names = [*(f"{split}.parquet" for split in SPLITS), "plain.jsonl", "questions.parquet"]
    assert manifest["files"] == {name: sha256_file(fetch_data.EMBEDDED / name) for name in names}
    assert manifest["files"] == {name: sha256_file(Path("data/raw") / name) for name in names}
    assert manifest["rows"] == dict.fromkeys(SPLITS, len(ROWS))
    assert set(manifest) == {"source", "revision", "rows", "files"}
    assert (manifest["source"], manifest["revision"]) == ("embedded", None)


def test_a_split_may_play_another_part(workplace: Path) -> None:
    embed()
    choose("data", "embedded", None, {"train": "validation", "test": "train"})
    fetch_data.main()
    assert sorted(path.stem for path in Path("data/raw").glob("*.parquet")) == ["questions", *sorted(SPLITS)]
    assert pq.read_table("data/raw/train.parquet")["split"].unique().to_pylist() == ["validation"]
    assert pq.read_table("data/raw/test.parquet")["split"].unique().to_pylist() == ["train"]


def test_a_missing_split_is_named_and_leaves_the_earlier_data(workplace: Path) -> None:
    embed(splits=("train", "test"))
    choose("data", "embedded", None, {"train": "train"})
    fetch_data.main()
    before = {path.name: path.read_bytes() for path in Path("data/raw").iterdir()}
    choose("data", "embedded", None, {"train": "train", "validation": "validation"})
    with pytest.raises(UserError, match=r"^data/embedded/validation\.parquet: no such file; .*git checkout"):
        fetch_data.main()
    assert {path.name: path.read_bytes() for path in Path("data/raw").iterdir()} == before


@pytest.mark.parametrize("column", ["question", "chosen", "rejected", "delta_score"])
def test_a_missing_column_is_named_with_those_found(workplace: Path, column: str) -> None:
    embed()
    rows = [{name: value for name, value in row.items() if name != column} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), fetch_data.EMBEDDED / "train.parquet")
    choose("data", "embedded", None, {"train": "train"})
    with pytest.raises(UserError) as caught:
        fetch_data.main()
    found = ", ".join(rows[0])
    assert f"data/embedded/train.parquet: column `{column}` is missing; found {found}" in str(caught.value)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "csv", "csv.gz"])
def test_a_folder_of_other_files_is_read_too(workplace: Path, ending: str) -> None:
    Path("mine").mkdir()
    rows: list[dict[str, Any]] = [
        {"Frage": f"a\nb, {i}", "chosen": str(i), "rejected": "", "delta_score": i, "id": i} for i in range(3)
    ]
    if ending.startswith("csv"):
        lines = ["Frage,chosen,rejected,delta_score,id"] + [
            f'"{row["Frage"]}",{row["chosen"]},,{row["id"]},{row["id"]}' for row in rows
        ]
    else:
        lines = [json.dumps(row) for row in rows]
    content = ("\n".join(lines) + "\n").encode()
    for split in SPLITS:
        (Path("mine") / f"{split}.{ending}").write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    choose("data", "./mine", None, {"train": "train"}, columns=COLUMNS | {"question": "Frage"})
    fetch_data.main()
    expected = [
        {
            "question": row["Frage"],
            "chosen": row["chosen"],
            "rejected": "",
            "delta_score": float(row["delta_score"]),
            "id": row["id"],
        }
        for row in rows
    ]
    assert pq.read_table("data/raw/train.parquet").to_pylist() == expected
    (Path("mine") / f"train.{ending}").write_bytes(b'{"a": \n"')
    with pytest.raises(UserError, match=rf"^mine/train\.{ending}: "):
        fetch_data.main()


def mine(content: bytes, name: str = "train.jsonl") -> None:
    """A folder whose only file is every split."""
    Path("mine").mkdir(exist_ok=True)
    (Path("mine") / name).write_bytes(content)


def fetched(**others: Any) -> list[dict[str, Any]]:
    """The rows that fetch_data makes of that file."""
    choose("data", "./mine", None, {"train": "train"}, **others)
    fetch_data.main()
    return pq.read_table("data/raw/train.parquet").to_pylist()


@pytest.mark.parametrize("ending", ["json", "json.gz", "jsonl"])
def test_a_json_file_may_be_one_list_of_rows(workplace: Path, ending: str) -> None:
    content = ("\ufeff\n " + json.dumps(ROWS, indent=2)).encode()
    mine(gzip.compress(content) if ending.endswith("gz") else content, f"train.{ending}")
    assert fetched() == ROWS


@pytest.mark.parametrize("ending", ["json", "csv"])
def test_a_row_may_be_larger_than_a_reader_likes(workplace: Path, ending: str) -> None:
    rows = [row | {"chosen": "ä" * 3_000_000} for row in ROWS]
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    mine(as_lines(rows) if ending == "json" else "\n".join(lines).encode(), f"train.{ending}")
    assert [row["chosen"] for row in fetched()] == [row["chosen"] for row in rows]


@pytest.mark.parametrize("ending", ["json", "csv"])
def test_texts_that_look_like_dates_stay_texts(workplace: Path, ending: str) -> None:
    dates = {"question": "2024-09-24", "chosen": "2024-09-24T10:00:00Z", "rejected": "1"}
    content = as_lines([dates | {"delta_score": 1}])
    if ending == "csv":
        content = f"{','.join(dates)},delta_score\n{','.join(dates.values())},1\n".encode()
    mine(content, f"train.{ending}")
    assert fetched() == [dates | {"delta_score": 1.0}]


def test_messages_in_json_lines_and_columns_of_every_kind_are_carried_along(workplace: Path) -> None:
    turns = [{"role": "user", "content": "2024-09-24"}]
    rows: list[dict[str, Any]] = [
        {
            "chosen": [*turns, {"role": "assistant", "content": "2024-09-25", "weight": 1}],
            "rejected": [*turns, {"role": "assistant", "content": "no"}],
            "id": 1,
            "tags": ["a", {"b": None}],
            "when": "2024-09-24",
            "mixed": "one",
        },
        {
            "chosen": [*turns, {"role": "assistant", "content": "yes"}],
            "rejected": "no",
            "id": 2.5,
            "mixed": 2,
            "huge": 1 << 70,
        },
    ]
    rows[1]["rejected"] = [*turns, {"role": "assistant", "content": "no"}]
    mine(as_lines(rows))
    columns = COLUMNS | {"question": None, "score": None}
    context: dict[str, Any] = {"context": [], "question": "2024-09-24", "rejected": "no"}
    assert fetched(format="messages", columns=columns) == [
        context
        | {
            "chosen": "2024-09-25",
            "id": 1,
            "tags": '["a", {"b": null}]',
            "when": "2024-09-24",
            "mixed": "one",
            "huge": None,
        },
        context | {"chosen": "yes", "id": 2.5, "tags": None, "when": None, "mixed": "2", "huge": str(1 << 70)},
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (as_lines(ROWS) + b"\n{oops\n", r"not a readable jsonl file \(line 7: Expecting property name"),
        (as_lines(ROWS) + b"3\n", r"row 5 is '3'; expected an object with the columns as keys"),
        (b'[{"question": "q"}, ', r"not a readable jsonl file \("),
        (b"\xff\xfe", r"not a readable jsonl file \(.*codec can't decode"),
        (b"", r"has no rows"),
        (b"[]", r"has no rows"),
        (as_lines(ROWS) + b'{"a": ' + b"[" * 100_000, r"not a readable jsonl file \(line 6: maximum recursion depth"),
        (as_lines([{"question": "q"}]), r"column `chosen` is missing; found question; see `data\.columns`"),
        (as_lines(ROWS) + b'{"id": 1, "id": 2}\n', r"not a readable jsonl file \(line 6: the key 'id' is in an object twice\)"),
        (as_lines(ROWS) + b'{"id": {"a": [{"b": 1, "b": 1}]}}', r"not a readable jsonl file \(line 6: the key 'b' is in an"),
        (b'[{"id": 1, "id": 2}]', r"not a readable jsonl file \(the key 'id' is in an object twice\)"),
        (as_lines(ROWS) + b'{"id": ' + b"7" * 5000 + b"}", r"not a readable jsonl file \(line 6: a number has too many digits\)"),
    ],
)  # fmt: skip
def test_a_damaged_json_file_is_one_line(workplace: Path, content: bytes, message: str) -> None:
    mine(content)
    with pytest.raises(UserError, match=rf"^mine/train\.jsonl: {message}"):
        fetched()


@pytest.mark.parametrize(
    ("values", "carried"),
    [
        ([2**53 + 1, 0.5, None], [str(2**53 + 1), "0.5", None]),  # a column of floats would round it
        ([2**53 + 1, -7, None], [2**53 + 1, -7, None]),
        ([2**63, 1, 2], [str(2**63), "1", "2"]),
        ([2**53, 0.5, 1], [2.0**53, 0.5, 1.0]),
    ],
)
def test_a_large_number_is_carried_to_its_last_digit(workplace: Path, values: list[Any], carried: list[Any]) -> None:
    mine(as_lines([row | {"id": value} for row, value in zip(ROWS, values, strict=False)]))
    assert [row["id"] for row in fetched()] == carried


BEFORE = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]  # fmt: skip
ASKED = COLUMNS | {"question": "asked"}


def misfit_kinds(split: str = "train") -> dict[str, str]:
    """Why rows are no pairs, by their numbers."""
    found = json.loads(Path("data/raw/misfits.json").read_text())[split]
    return {number: misfit["kind"] for number, misfit in found.items()}


def test_turns_before_a_plain_question_are_kept_whatever_the_file(workplace: Path) -> None:
    rows = [row | {"context": context} for row, context in zip(ROWS, (BEFORE, [], BEFORE[:1]), strict=False)]
    found = {}
    mine(as_lines(rows))
    found["lines"] = fetched()
    mine(as_lines(asked(rows)))
    found["lines, renamed"] = fetched(columns=ASKED)
    Path("mine/train.jsonl").unlink()
    pq.write_table(pa.Table.from_pylist(rows), "mine/train.parquet")
    found["as it is"] = fetched()
    pq.write_table(pa.Table.from_pylist(asked(rows)), "mine/train.parquet")
    found["renamed"] = fetched(columns=ASKED)
    assert found == dict.fromkeys(found, rows)


def test_the_turns_of_lines_may_be_null_or_odd_in_some_rows(workplace: Path) -> None:
    contexts = (
        BEFORE,
        None,
        [{"role": "robot", "content": "Beep."}],
        [{"role": None, "content": "?"}],
        [*BEFORE, BEFORE[0]],
    )
    rows = [row | {"context": context} for row, context in zip(ROWS, contexts, strict=True)]
    mine(as_lines(rows))
    assert [row["context"] for row in fetched()] == [BEFORE, [], None, None, None]
    assert misfit_kinds() == {"2": "other_role", "3": "no_messages", "4": "late_system_prompt"}


@pytest.mark.parametrize(
    "odd",
    ["a passage", [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], [{"role": "user"}], [None], 3],
)
def test_one_odd_row_takes_the_turns_of_no_other(workplace: Path, odd: Any) -> None:
    mine(as_lines([row | {"context": context} for row, context in zip(ROWS, (BEFORE, odd, []), strict=False)]))
    context = [row["context"] for row in fetched()]
    assert (context[0], context[2]) == (BEFORE, [])


@pytest.mark.parametrize(
    ("kind", "scores"),
    [
        (pa.int64(), [3, 1, 2]),
        (pa.int8(), [3, 1, 2]),
        (pa.float32(), [0.5, 0.25, 2]),
        (pa.decimal128(6, 3), [Decimal("1.5"), Decimal("-2.125"), Decimal(7)]),
    ],
    ids=str,
)
@pytest.mark.parametrize("named", [COLUMNS, ASKED], ids=["standard", "renamed"])
def test_numbers_of_every_type_are_scores(
    workplace: Path, kind: pa.DataType, scores: list[Any], named: dict[str, Any]
) -> None:
    rows = ROWS[:3] if named is COLUMNS else asked(ROWS[:3])
    table = pa.Table.from_pylist(rows).drop_columns("delta_score")
    Path("mine").mkdir()
    pq.write_table(table.append_column("delta_score", pa.array(scores, kind)), "mine/train.parquet")
    assert [row["delta_score"] for row in fetched(columns=named)] == [float(score) for score in scores]
    assert pq.read_schema("data/raw/train.parquet").field("delta_score").type == pa.float64()


@pytest.mark.parametrize(
    ("scores", "kinds"),
    [
        ([True, 0.5, False, 1, None], {"0": "no_score", "2": "no_score", "4": "missing_value"}),
        (["0.5", 0.5, 1, 1, [1]], {"0": "no_score", "4": "no_score"}),
    ],
)
def test_a_score_that_is_no_number_is_a_misfit_of_its_row(
    workplace: Path, scores: list[Any], kinds: dict[str, str]
) -> None:
    mine(as_lines([row | {"delta_score": score} for row, score in zip(ROWS, scores, strict=True)]))
    wanted = [None if str(number) in kinds else float(score) for number, score in enumerate(scores)]
    assert [row["delta_score"] for row in fetched()] == wanted
    assert misfit_kinds() == kinds


@pytest.mark.parametrize("score", ["0.5", True])
def test_a_standard_table_whose_scores_are_no_numbers_is_refused(workplace: Path, score: Any) -> None:
    Path("mine").mkdir()
    pq.write_table(pa.Table.from_pylist([row | {"delta_score": score} for row in ROWS]), "mine/train.parquet")
    with pytest.raises(
        UserError,
        match=rf"^mine/train\.parquet, row 0: delta_score is \[{score!r}\]; expected numbers; no other row fits",
    ):
        fetched()


def test_texts_that_are_stored_as_categories_are_texts(workplace: Path) -> None:
    Path("mine").mkdir()
    table = pa.Table.from_pylist(ROWS)
    for name in ("question", "rejected", "id"):
        place = table.column_names.index(name)
        table = table.set_column(place, name, table[name].dictionary_encode())
    pq.write_table(table, "mine/train.parquet")
    assert fetched() == ROWS
    assert pq.read_schema("data/raw/train.parquet").field("question").type == pa.string()


def test_messages_as_json_text_are_named_for_what_they_are(workplace: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    mine(as_lines([row | {"chosen": json.dumps(turns), "rejected": json.dumps(turns)} for row in ROWS]))
    for layout in ("plain", "messages"):
        with pytest.raises(
            UserError, match=r"^mine/train\.jsonl, row 0: .* messages as JSON text.*; store them as lists; no"
        ):
            fetched(format=layout)


@pytest.mark.parametrize("where", ["question", "id"])
def test_two_columns_of_one_name_are_refused(workplace: Path, where: str) -> None:
    names = [*ROWS[0], where]
    message = rf"^mine/train\.(csv|parquet): two columns are named `{where}`; rename one$"
    mine(
        "\n".join([",".join(names), *(",".join([*map(str, row.values()), "x"]) for row in ROWS)]).encode(), "train.csv"
    )
    with pytest.raises(UserError, match=message):
        fetched()
    Path("mine/train.csv").unlink()
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table.append_column(where, table[where]), "mine/train.parquet")
    with pytest.raises(UserError, match=message):
        fetched()


def test_a_table_without_rows_is_named(workplace: Path) -> None:
    mine(",".join(ROWS[0]).encode() + b"\n", "train.csv")
    with pytest.raises(UserError, match=r"^mine/train\.csv: has no rows$"):
        fetched()
    Path("mine/train.csv").unlink()
    pq.write_table(pa.Table.from_pylist(ROWS)[:0], "mine/train.parquet")
    with pytest.raises(UserError, match=r"^mine/train\.parquet: has no rows$"):
        fetched()
    assert not Path("data/raw").exists()


def test_a_row_that_no_column_can_hold_keeps_its_place(workplace: Path) -> None:
    rows = [dict(row) for row in ROWS]
    rows[1]["id"] = "half \ud83d"
    rows[3]["delta_score"] = 10**400
    mine(as_lines(rows))
    raw = fetched()
    assert [row["question"] for row in raw] == ["q0", None, "q2", None, "q4"]
    assert [row["id"] for row in raw] == ["0", None, "2", "3", "4"]
    found = json.loads(Path("data/raw/misfits.json").read_text())["train"]
    assert {number: misfit["kind"] for number, misfit in found.items()} == {"1": "not_storable", "3": "no_score"}


def test_rubbish_inside_a_table_that_is_only_copied_is_found(workplace: Path) -> None:
    Path("mine").mkdir()
    rows = [row | {"chosen": random.Random(i).randbytes(99).hex()} for i, row in enumerate(ROWS * 999)]
    pq.write_table(pa.Table.from_pylist(rows), "mine/train.parquet", compression="zstd", row_group_size=1024)
    content = bytearray(Path("mine/train.parquet").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 9999] = random.Random(0).randbytes(9999)
    Path("mine/train.parquet").write_bytes(content)
    with pytest.raises(
        UserError, match=r"^mine/train\.parquet: not a readable parquet file \(row 2048 or one behind it: "
    ):
        fetched()
    assert not Path("data/raw").exists()


def test_a_file_that_is_cut_is_named(workplace: Path) -> None:
    mine(gzip.compress(as_lines(ROWS * 100))[:-20], "train.jsonl.gz")
    with pytest.raises(UserError, match=r"^mine/train\.jsonl\.gz: not a readable jsonl\.gz file"):
        fetched()
    Path("mine/train.jsonl.gz").unlink()
    renamed = COLUMNS | {"question": "asked"}
    rows = [
        {"asked": random.Random(i).randbytes(9).hex(), "chosen": "a", "rejected": "b", "delta_score": 1.0}
        for i in range(9)
    ]
    pq.write_table(pa.Table.from_pylist(rows), "mine/train.parquet", compression="zstd")
    content = bytearray(Path("mine/train.parquet").read_bytes())
    content[4:200] = bytes(196)  # the first pages; the footer stays
    Path("mine/train.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"^mine/train\.parquet: not a readable parquet file"):
        fetched(columns=renamed)


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_what_fails_while_rows_are_written_is_not_blamed_on_the_source(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    Path("mine").mkdir()
    rows = [{("asked" if name == "question" else name): value for name, value in row.items()} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), "mine/train.parquet")
    if ending == "jsonl":
        Path("mine/train.parquet").unlink()
        mine(as_lines(rows))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_batch", full)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device$"):
        fetched(columns=COLUMNS | {"question": "asked"})


def test_rows_of_another_layout_are_kept_for_subset_to_judge(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost on the way: every row of the source is one of data/raw, and each odd one is counted by its kind."""
    monkeypatch.setattr(tables, "BATCH", 2)
    turn = {"role": "user", "content": "q"}
    rows: list[dict[str, Any]] = [
        {
            "chosen": [turn, {"role": "assistant", "content": f"a{i}"}],
            "rejected": [turn, {"role": "assistant", "content": "b"}],
        }
        for i in range(6)
    ]
    rows[1]["chosen"] = [turn]
    rows[4]["rejected"] = [turn | {"content": "else"}, {"role": "assistant", "content": "b"}]
    mine(as_lines(rows))
    raw = fetched(format="messages", columns=COLUMNS | {"question": None, "score": None})
    assert [row["chosen"] for row in raw] == ["a0", None, "a2", "a3", None, "a5"]
    manifest = json.loads(Path("data/raw/manifest.json").read_text())
    assert manifest["rows"] == dict.fromkeys(SPLITS, 6)
    assert manifest["files"]["misfits.json"] == sha256_file(Path("data/raw/misfits.json"))
    rules = {"k": None, "near_duplicate_similarity": None} | dict.fromkeys(
        ("drop_empty", "drop_identical", "drop_exact_duplicates", "drop_evaluation_leaks"), False
    )

    def cut(drop_malformed: bool) -> None:
        Path("params.yaml").write_text(json.dumps(cpu_params(subset=rules | {"drop_malformed": drop_malformed})))
        subset.main()

    with pytest.raises(
        UserError, match=r"^data/raw/test\.parquet, row 1: the last message of `chosen` is not the assistant's; "
    ):
        cut(drop_malformed=False)
    cut(drop_malformed=True)
    report = json.loads(subset.REPORT.read_text())["train"]
    assert report["removed"] == {"malformed_no_answer": 1, "malformed_different_turns": 1}
    assert report["malformed_rows"] == {"no_answer": [1], "different_turns": [4]}
    assert (report["read"], report["kept"]) == (6, 4)


def test_where_no_row_fits_the_parameters_are_wrong(workplace: Path) -> None:
    mine(as_lines(ROWS))
    with pytest.raises(
        UserError, match=r"^mine/train\.jsonl, row 0: 'q0' is not made of ChatML turns; no other row fits"
    ):
        fetched(format="chatml")
    assert not Path("data/raw").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": "de"}, r"`config` is 'de', and \./mine is a folder, which has none"),
        (
            {"columns": COLUMNS | {"question": None}},
            r"`columns\.question` is null, which `format: plain` cannot be without",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(workplace: Path, change: dict[str, Any], message: str) -> None:
    mine(as_lines(ROWS))
    with pytest.raises(UserError, match=message):
        fetched(**change)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        (
            "---\nlicense: [mit, apache-2.0]\nauthors: [A, B]\n---\n",
            {"license": ["mit", "apache-2.0"], "authors": ["A", "B"]},
        ),
        ("---\nlicense: other\nlicense_name: x\n---\n", {"license": "other", "license_name": "x"}),
        ("---\nlicense:\npretty_name: 3\n---\n", {}),
        ("---\nlicense: {a: b}\nauthors: [1]\n---\n", {}),
        ("---\n: [\n---\n", {}),
        ("---\n- a\n---\n", {}),
        ("# The licence is MIT\n", {}),
    ],
)
def test_only_what_a_card_says_in_its_metadata_is_a_term(workplace: Path, text: str, terms: dict[str, Any]) -> None:
    Path("README.md").write_text(text)
    assert fetch_data.card_terms(Path("README.md")) == terms


def test_a_folder_is_a_data_set_too_with_or_without_held_out_questions(workplace: Path) -> None:
    embed()
    fetch_data.EMBEDDED.rename("mine")
    choose("data", "./mine", None, {"train": "test"})
    fetch_data.main()
    read = json.loads(Path("data/raw/manifest.json").read_text())["source_files"]
    wanted = {"plain.jsonl", "questions.parquet", "test.parquet"}  # the others play no part
    assert read == {name: sha256_file(Path("mine") / name) for name in wanted}
    names = ["manifest.json", "plain.jsonl", "questions.parquet", *(f"{split}.parquet" for split in sorted(SPLITS))]
    assert sorted(path.name for path in Path("data/raw").iterdir()) == names
    assert sha256_file(Path("data/raw/train.parquet")) == sha256_file(Path("mine/test.parquet"))
    for name in ("questions.parquet", "plain.jsonl"):
        (Path("mine") / name).unlink()
    fetch_data.main()
    assert not {"questions.parquet", "plain.jsonl"} & {path.name for path in Path("data/raw").iterdir()}
    Path("mine/cut.parquet").write_bytes(b"PAR1")
    choose("data", "./mine", None, {"train": "cut"})
    with pytest.raises(UserError, match=r"^mine/cut\.parquet: not a readable parquet file"):
        fetch_data.main()
    choose("data", "./mine", None, {"train": "dev"})
    with pytest.raises(UserError, match=r"^mine/dev\.parquet: no such file; see `data\.splits`"):
        fetch_data.main()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"split": "test", "question": "q", "answer": ["a"]}',
            r"plain\.jsonl, row 0: `answer` is \['a'\]; expected text",
        ),
        ('{"split": "test", "question": "q"}', r"plain\.jsonl, row 0: `answer` is None; expected text"),
        ("{", r"plain\.jsonl: not a readable jsonl file \(line 1"),
        (
            PLAIN + json.dumps(json.loads(PLAIN) | {"question": "half \ud83d"}),
            r"^data/embedded/plain\.jsonl, row 1: `question` holds half a character \(surrogates not allowed\)$",
        ),
        (
            PLAIN.replace("test", "tets"),
            r"^data/embedded/plain\.jsonl, row 0: `split` is 'tets'; expected one of train, validation, test$",
        ),
    ],
)
def test_plain_answers_that_evaluate_could_not_read_are_refused(workplace: Path, text: str, message: str) -> None:
    embed()
    choose("data", "embedded", None, dict(zip(SPLITS, SPLITS, strict=True)))
    (fetch_data.EMBEDDED / "plain.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        fetch_data.main()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, r"^data/embedded/questions\.parquet: not a readable parquet file \("),
        (
            {"kind": None},
            r"^data/embedded/questions\.parquet: has no column `kind` of texts; it needs id, topic, kind, ",
        ),
        ({"question": [None]}, r"^data/embedded/questions\.parquet, row 0: `question` is None; expected text$"),
        ({"constraint": [3]}, r"^data/embedded/questions\.parquet: has no column `constraint` of texts; it needs id, "),
    ],
    ids=["rubbish", "without kind", "null", "numbers"],
)
def test_held_out_questions_that_evaluate_could_not_read_are_refused(
    workplace: Path, change: dict[str, Any] | None, message: str
) -> None:
    embed()
    choose("data", "embedded", None, dict(zip(SPLITS, SPLITS, strict=True)))
    columns = {name: ["q"] for name in fetch_data.QUESTIONS} | (change or {})
    path = fetch_data.EMBEDDED / "questions.parquet"
    texts = {
        name: pa.array(values, pa.int64() if values == [3] else pa.string())
        for name, values in columns.items()
        if values
    }
    pq.write_table(pa.table(texts), path)
    if change is None:
        path.write_bytes(b"id,topic,kind\n")
    with pytest.raises(UserError, match=message) as error:
        fetch_data.main()
    assert "\n" not in str(error.value)
    assert not Path("data/raw").exists()


def test_held_out_questions_may_be_large_texts_as_polars_writes_them(workplace: Path) -> None:
    embed()
    choose("data", "embedded", None, dict(zip(SPLITS, SPLITS, strict=True)))
    questions = {name: pa.array(["q"], pa.large_string()) for name in fetch_data.QUESTIONS}
    pq.write_table(pa.table(questions), fetch_data.EMBEDDED / "questions.parquet")
    fetch_data.main()
    assert pq.read_table("data/raw/questions.parquet").to_pylist() == [dict.fromkeys(fetch_data.QUESTIONS, "q")]


def test_plain_answers_behind_a_byte_order_mark_are_read(workplace: Path) -> None:
    embed()
    choose("data", "embedded", None, dict(zip(SPLITS, SPLITS, strict=True)))
    (fetch_data.EMBEDDED / "plain.jsonl").write_text("\ufeff" + PLAIN)
    fetch_data.main()
    assert Path("data/raw/plain.jsonl").read_text() == PLAIN


def test_a_column_named_context_is_left_out_and_said_where_the_format_makes_its_own(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embed()
    turns = [{"role": "assistant", "content": "Yes."}]
    rows = [row | {"chosen": turns, "rejected": turns, "context": "a passage"} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), fetch_data.EMBEDDED / "train.parquet")
    choose("data", "embedded", None, dict(zip(SPLITS, SPLITS, strict=True)))
    settings = params.load(fetch_data.Params).data.model_copy(update={"format": "messages"})
    assert fetch_data.standardize([fetch_data.EMBEDDED / "train.parquet"], Path("out.parquet"), settings, "here") == {}
    assert pq.read_table("out.parquet")["context"].to_pylist() == [[]] * len(ROWS)
    assert "here: its column `context` is not read by `format: messages`, and is left out" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_a_column_named_context_that_holds_text_is_left_out_and_said(
    workplace: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    rows = [row | {"context": "a passage"} for row in ROWS]
    mine(as_lines(rows), f"train.{ending}")
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), "mine/train.parquet")
    assert fetched() == ROWS
    said = f"fetch_data: mine/train.{ending}: its column `context` holds no messages, and is left out\n"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("notes", [("text", 1), (None, "text")])
def test_shards_that_differ_in_a_column_that_nobody_reads_go_together(
    workplace: Path, capsys: pytest.CaptureFixture[str], notes: tuple[Any, Any]
) -> None:
    tables = [pa.Table.from_pylist([row | {"note": note} for row in ROWS]) for note in notes]
    paths = [Path(f"shard-{i}.parquet") for i in range(2)]
    for table, path in zip(tables, paths, strict=True):
        pq.write_table(table, path)
    choose("data", "embedded", None, {"train": "train"})
    settings = params.load(fetch_data.Params).data
    assert fetch_data.standardize(paths, Path("out.parquet"), settings, "here") == {}
    assert pq.read_table("out.parquet").to_pylist() == 2 * ROWS
    assert "the files differ in note, which is left out" in capsys.readouterr().out


def further(columns: dict[str, Any] = COLUMNS, **others: Any) -> dict[str, Any]:
    """The folder ./more, all of it, as an entry of `data.mixed_with`."""
    own = {"source": "./more", "revision": None, "config": None, "splits": dict(zip(SPLITS, SPLITS, strict=True))}
    return {**own, "format": "plain", "columns": columns, "choice": None, "share": 1.0, **others}


def mixed(first: list[dict[str, Any]], second: list[dict[str, Any]], **others: Any) -> list[dict[str, Any]]:
    """The rows that fetch_data makes of two folders of standard tables."""
    for name, rows in (("mine", first), ("more", second)):
        Path(name).mkdir(exist_ok=True)
        for split in SPLITS:
            pq.write_table(pa.Table.from_pylist(rows), f"{name}/{split}.parquet")
    return fetched(mixed_with=[further(**others)])


WITH_CONTEXT = [row | {"context": BEFORE[:1]} for row in ROWS]
WITH_SYSTEM = [row | {"system": "Be kind."} for row in ROWS]


@pytest.mark.parametrize("before", ["context", "system"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_source_without_earlier_turns_is_mixed_with_one_that_has_some(
    workplace: Path, before: str, is_first: bool
) -> None:
    if before == "context":
        found = mixed(*((WITH_CONTEXT, ROWS) if is_first else (ROWS, WITH_CONTEXT)))
    else:
        found = mixed(ROWS, WITH_SYSTEM, columns=COLUMNS | {"system": "system"})
    has_some = [False, True] if before == "system" or not is_first else [True, False]
    assert [row["context"] for row in found] == [BEFORE[:1] if some else [] for some in has_some for _ in ROWS]
    assert [{name: row[name] for name in ROWS[0]} for row in found] == 2 * ROWS


def test_whole_and_broken_scores_are_mixed(workplace: Path) -> None:
    whole = [row | {"delta_score": i} for i, row in enumerate(ROWS)]
    assert [row["delta_score"] for row in mixed(whole, ROWS)] == [
        *map(float, range(5)),
        *(row["delta_score"] for row in ROWS),
    ]


@pytest.mark.parametrize("strict", ["mine", "more"])
def test_a_column_that_may_not_be_null_is_mixed_with_one_that_may(workplace: Path, strict: str) -> None:
    mixed(ROWS, ROWS)
    table = pa.Table.from_pylist(ROWS)
    whole = table.cast(pa.schema([field.with_nullable(False) for field in table.schema]))
    for split in SPLITS:
        pq.write_table(whole, f"{strict}/{split}.parquet")
    found = fetched(mixed_with=[further()])
    assert [{name: value for name, value in row.items() if name != "mixed_from"} for row in found] == 2 * ROWS


def test_a_column_that_mixing_makes_itself_is_refused(workplace: Path) -> None:
    with pytest.raises(UserError, match=r"^\./more: has a column `mixed_from`, which mixing makes itself; rename it$"):
        mixed(ROWS, [row | {"mixed_from": "elsewhere"} for row in ROWS])
    assert not Path("data/raw").exists()


def test_training_on_the_split_that_is_asked_leaves_nothing(workplace: Path) -> None:
    mine(as_lines(ROWS))
    fetched()  # one file is every split
    Path("params.yaml").write_text(json.dumps(cpu_params(subset={"k": 2})))
    with pytest.raises(
        UserError,
        match=r"^data/raw/train\.parquet: none of its 5 pairs is left \(5 leaks_from_evaluation\); see `subset`",
    ):
        subset.main()


def test_sources_are_mixed_each_by_its_share_and_its_own_columns(workplace: Path) -> None:
    embed()
    Path("more").mkdir()
    other = [{"prompt": f"q{i}", "good": f"yes {i}", "bad": "no", "points": float(i)} for i in range(10)]
    other[4]["good"] = None
    for split in SPLITS:
        pq.write_table(pa.Table.from_pylist(other), f"more/{split}.parquet")
    columns = {"question": "prompt", "chosen": "good", "rejected": "bad", "score": "points", "system": None}
    share = further(columns, share=0.5)
    choose("data", "embedded", None, dict(zip(SPLITS, SPLITS, strict=True)), mixed_with=[share])
    fetch_data.main()
    rows = pq.read_table("data/raw/train.parquet").to_pylist()
    assert [row["question"] for row in rows] == [*(row["question"] for row in ROWS), "q0", "q2", None, "q6", "q8"]
    assert [row["mixed_from"] for row in rows] == ["embedded"] * len(ROWS) + ["./more"] * 5
    manifest = json.loads(Path("data/raw/manifest.json").read_text())
    assert manifest["rows"]["train"] == len(ROWS) + 5
    assert [(part["source"], part["share"], part["rows"]["train"]) for part in manifest["mixed_with"]] == [
        ("./more", 0.5, 10)
    ]
    assert list(json.loads(Path("data/raw/misfits.json").read_text())["train"]) == [str(len(ROWS) + 2)]
    share["columns"] = columns | {"score": None}
    choose("data", "embedded", None, dict(zip(SPLITS, SPLITS, strict=True)), mixed_with=[share])
    with pytest.raises(UserError, match="some sources have scores and others have none"):
        fetch_data.main()
