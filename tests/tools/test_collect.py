"""The embedded data: rebuilt from its own samples to the same bytes, balanced, disjoint, and within its promises."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import fmean

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from hermes.artifacts import read_json
from hermes.console import UserError
from hermes.instructions.kinds import KINDS, PLAIN, SEEN_KINDS, UNSEEN_KINDS, VALIDATION_KINDS, grade, is_strict
from hermes.instructions.topics import split_topics
from hermes.instructions.verifiers import ENDINGS, OPENINGS, words
from hermes.model.gguf import GgufModel
from hermes.settings import experiment
from stages import fetch_model
from tools import collect

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "data/embedded"
README = (EMBEDDED / "README.md").read_text()
SOME_QUESTIONS = 16
LOADED = experiment.check(ROOT / "params.yaml")

KITES = {
    "id": "x",
    "split": "train",
    "topic": "kites",
    "kind": "lowercase",
    "constraint": '{"topic": "kites"}',
    "question": "q",
}


@pytest.fixture(scope="module")
def questions() -> list[collect.Row]:
    return collect.build_questions(LOADED.collect)


@pytest.fixture(scope="module")
def splits() -> dict[str, list[collect.Row]]:
    return {
        split: pq.read_table(EMBEDDED / f"{split}.parquet").to_pylist() for split in ("train", "validation", "test")
    }


@pytest.fixture(scope="module")
def samples() -> list[collect.Row]:
    return pq.read_table(EMBEDDED / "samples.parquet").to_pylist()


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the settings and what was sampled, the working directory of `python -m tools.collect --pairs`; no model is there."""
    (tmp_path / "data/embedded").mkdir(parents=True)
    for name in ("params.yaml", "dvc.yaml", "data/embedded/samples.parquet", "data/embedded/card.json"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["collect", "--pairs"])
    return tmp_path


def test_pairs_picked_again_from_the_samples_have_the_committed_bytes(copy: Path) -> None:
    collect.main()
    made = {path.name for path in (copy / "data/embedded").iterdir()}
    assert made == {path.name for path in EMBEDDED.iterdir()} - {"README.md", "plain.jsonl", "sampled_on.json"}
    for name in made:
        assert (copy / "data/embedded" / name).read_bytes() == (EMBEDDED / name).read_bytes(), name


@pytest.mark.parametrize(("name", "old", "new"), [("topics", "165", "100"), ("seed", "42", "1")])
def test_pairs_are_refused_where_the_settings_are_not_those_of_the_samples(
    copy: Path, name: str, old: str, new: str
) -> None:
    text = (copy / "params.yaml").read_text()
    (copy / "params.yaml").write_text(text.replace(f"{name}: {old}", f"{name}: {new}", 1))
    with pytest.raises(
        UserError,
        match=rf"^params\.yaml: {name} is {new}, but .*samples\.parquet was sampled with {old}; put {old} back",
    ):
        collect.main()


def test_pairs_are_refused_without_the_samples(copy: Path) -> None:
    (copy / "data/embedded/samples.parquet").unlink()
    with pytest.raises(UserError, match=r"^data/embedded/samples\.parquet: no such file; .*git checkout"):
        collect.main()


@pytest.mark.slow
def test_a_slice_sampled_again_has_the_committed_bytes(
    questions: list[collect.Row], samples: list[collect.Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits are promised on one kind of CPU; on another one answers still begin alike far more often than two to one question do.

    There some of the questions show it, and the weights are in float16: llama.cpp is slow with bfloat16 where the CPU lacks it.
    """
    number, chunk = min(enumerate(collect.chunks(questions, LOADED.collect)), key=lambda entry: len(entry[1]))
    is_same_cpu = read_json(EMBEDDED / "sampled_on.json") == collect.processor()
    chunk = chunk if is_same_cpu else chunk[:SOME_QUESTIONS]
    monkeypatch.chdir(tmp_path)
    fetch_model.fetch_embedded(tmp_path / "base")
    collect.convert(tmp_path / "base", tmp_path / "base.gguf", "bf16" if is_same_cpu else "f16")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    with GgufModel(tmp_path / "base.gguf", LOADED.collect.threads, LOADED.collect.slots, context=512) as model:
        found = collect.sample_chunk(chunk, model, tokenizer, LOADED.collect, LOADED.seed)
    wanted = {question["id"] for question in chunk}
    committed = [row for row in samples if row["id"] in wanted]
    if is_same_cpu:
        assert found == committed, f"chunk {number}"

    def alike(pairs: Iterable[tuple[collect.Row, collect.Row]]) -> float:
        return fmean(left["answer"].split()[:3] == right["answer"].split()[:3] for left, right in pairs)

    by_chance = alike((left, right) for left, right in pairwise(committed) if left["id"] == right["id"])
    assert alike(zip(found, committed, strict=True)) > (1 + by_chance) / 2


def test_a_later_wave_of_kinds_leaves_what_was_sampled_before(questions: list[collect.Row]) -> None:
    chunks = collect.chunks(questions, LOADED.collect)
    waves = [{KINDS[question["kind"]].wave for question in chunk} for chunk in chunks]
    assert waves == sorted(waves, key=min)
    assert all(len(wave) == 1 for wave in waves)
    first = [question for question in questions if KINDS[question["kind"]].wave == 1]
    assert collect.chunks(first, LOADED.collect) == chunks[: waves.index({2})]


def test_every_delta_score_is_the_difference_of_the_grades_and_chosen_follows_its_instruction(
    splits: dict[str, list[collect.Row]],
) -> None:
    for row in (row for rows in splits.values() for row in rows):
        constraint = json.loads(row["constraint"])
        assert is_strict(row["kind"], row["chosen"], constraint)
        assert not is_strict(row["kind"], row["rejected"], constraint)
        difference = grade(row["kind"], row["chosen"], constraint) - grade(row["kind"], row["rejected"], constraint)
        assert row["delta_score"] == round(difference, 4) > 0


def test_chosen_is_a_sample_unless_it_is_marked_repaired(
    splits: dict[str, list[collect.Row]], samples: list[collect.Row]
) -> None:
    sampled: dict[str, set[str]] = {}
    for sample in samples:
        sampled.setdefault(sample["id"], set()).add(sample["answer"])
    for row in (row for rows in splits.values() for row in rows):
        assert row["contrast"] or row["rejected"] in sampled[row["id"]]
        assert row["repaired"] or row["kind"] == PLAIN.name or row["chosen"] in sampled[row["id"]]


def test_a_contrasting_answer_follows_another_instruction_about_the_same_topic(
    splits: dict[str, list[collect.Row]], questions: list[collect.Row], samples: list[collect.Row]
) -> None:
    asked = {question["id"]: question for question in questions}
    origins: dict[tuple[str, str], set[str]] = {}
    for sample in samples:
        question = asked[sample["id"]]
        if is_strict(question["kind"], sample["answer"], json.loads(question["constraint"])):
            origins.setdefault((question["topic"], sample["answer"]), set()).add(question["kind"])
    contrasting = [row for rows in splits.values() for row in rows if row["contrast"]]
    assert all(origins[row["topic"], row["rejected"]] - {row["kind"]} for row in contrasting)
    drawn = [row["contrast"] for rows in splits.values() for row in rows if row["kind"] != PLAIN.name]
    assert abs(sum(drawn) / len(drawn) - LOADED.collect.contrast_share) < 0.05


def test_a_plain_question_borrows_both_answers_from_others_about_its_topic(
    splits: dict[str, list[collect.Row]], samples: list[collect.Row]
) -> None:
    plain = [row for row in splits["train"] if row["kind"] == PLAIN.name]
    topics: dict[str, set[str]] = {}
    for sample in samples:
        topics.setdefault(sample["id"].split("/")[1], set()).add(sample["answer"])
    assert len(plain) > 150
    assert all(row["contrast"] for row in plain)
    assert all(row["rejected"] in topics[row["topic"]] for row in plain)
    assert all(row["chosen"] in topics[row["topic"]] and not row["repaired"] for row in plain)


def test_a_plain_answer_keeps_nothing_of_the_instruction_it_was_written_for(
    splits: dict[str, list[collect.Row]], questions: list[collect.Row], samples: list[collect.Row]
) -> None:
    asked = {question["id"]: question for question in questions}
    sources: dict[tuple[str, str], list[collect.Row]] = {}
    for sample in samples:
        question = asked[sample["id"]]
        sources.setdefault((question["topic"], sample["answer"]), []).append(question)
    for row in (row for row in splits["train"] if row["kind"] == PLAIN.name):
        answer = row["chosen"]
        assert not answer.startswith(OPENINGS)
        assert not answer.endswith(ENDINGS)
        found = {word.lower() for word in words(answer)}
        # Where two instructions led to the same answer, one that left no trace is enough.
        assert any(
            not found & set(json.loads(question["constraint"]).get("keywords", []))
            and not collect.copies(answer, question["question"])
            for question in sources[row["topic"], answer]
        ), answer


PROSE = "Kites are light toys of paper and wood. The wind lifts them high over the hills."


@pytest.mark.parametrize(
    ("kind", "constraint", "instruction", "marked"),
    [
        (
            "end_with",
            {"ending": "And that is why."},
            'End your answer with "And that is why."',
            f"{PROSE} And that's why.",
        ),
        ("end_with", {"ending": "That is all."}, 'End your answer with "That is all."', f"{PROSE} That is all I know."),
        ("start_with", {"opening": "Well,"}, 'Begin your answer with "Well,"', f"WELL, {PROSE}"),
        (
            "keywords",
            {"keywords": ["river", "young"]},
            'Include the words "river" and "young".',
            f"{PROSE} Young people fly them.",
        ),
        ("no_commas", {}, "Do not use any commas.", f"{PROSE} No commas."),
        ("uppercase", {}, "Use only capital letters in your answer.", f"{PROSE} USE ONLY THEM."),
        ("lowercase", {}, "Use only lowercase letters, no capitals at all.", f"{PROSE} they are fun."),
        ("exclaim", {}, "Finish each sentence with an exclamation mark!", f"What a sight! {PROSE}"),
        ("quoted", {}, "Put your whole answer in double quotes.", f"{PROSE} This is in double form."),
    ],
)
def test_only_answers_without_a_sign_of_their_instruction_may_answer_a_plain_question(
    kind: str, constraint: dict[str, object], instruction: str, marked: str
) -> None:
    question = KITES | {"kind": kind, "constraint": json.dumps({"topic": "kites"} | constraint)}
    question["question"] = f"Tell me about kites. {instruction}"
    assert is_strict(PLAIN.name, marked, {})
    assert collect.unmarked_answers(question, [marked, PROSE, "Kites fly."], LOADED.seed) == [PROSE]


def test_a_plain_question_takes_nothing_from_the_worked_example() -> None:
    question = KITES | {"kind": "avoid_letter", "constraint": '{"topic": "kites", "letter": "v"}'}
    question["question"] = 'Tell me about kites. Do not use the letter "v".'
    example = collect.demonstration(question, LOADED.seed)[0][1]["content"]
    copied = f"{PROSE} They say {' '.join(words(example)[:3])}."
    assert collect.unmarked_answers(question, [copied, PROSE], LOADED.seed) == [PROSE]


def test_topics_of_the_splits_are_disjoint_and_unseen_kinds_are_never_trained_on(
    splits: dict[str, list[collect.Row]],
) -> None:
    topics = {split: {row["topic"] for row in rows} for split, rows in splits.items()}
    assert not topics["train"] & topics["validation"]
    assert not topics["train"] & topics["test"]
    assert not topics["validation"] & topics["test"]
    assert all(topics[split] <= set(split_topics()[split]) for split in topics)
    for split, others, kinds in (
        ("test", ("train", "validation"), UNSEEN_KINDS),
        ("validation", ("train", "test"), VALIDATION_KINDS),
    ):
        unseen = {kind.name for kind in kinds}
        assert unseen < {row["kind"] for row in splits[split]}
        assert not unseen & {row["kind"] for other in others for row in splits[other]}


def test_no_instruction_is_demonstrated_on_a_topic_of_the_questions() -> None:
    topics = {topic for split in split_topics().values() for topic in split}
    assert not topics & set(collect.DEMONSTRATIONS)


def test_the_promised_sizes_hold(splits: dict[str, list[collect.Row]], questions: list[collect.Row]) -> None:
    train = splits["train"]
    assert len(train) >= 2500
    assert len({row["delta_score"] for row in train}) >= 20
    assert sum(not row["repaired"] for row in train) >= 0.6 * len(train)
    assert {row["kind"] for row in train} == {kind.name for kind in SEEN_KINDS} | {PLAIN.name}
    assert len(SEEN_KINDS) >= 16
    assert len(UNSEEN_KINDS) == 2
    assert (
        sum(question["split"] == "test" and question["kind"] in {k.name for k in SEEN_KINDS} for question in questions)
        >= 400
    )
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) <= 4 * 2**20


def test_the_held_out_questions_are_the_built_ones(questions: list[collect.Row]) -> None:
    held_out = [question for question in questions if question["split"] != "train"]
    assert pq.read_table(EMBEDDED / "questions.parquet").to_pylist() == held_out
    plain = [json.loads(line) for line in (EMBEDDED / "plain.jsonl").read_text().splitlines()]
    assert [(row["split"], row["topic"]) for row in plain] == [
        (s, t) for s in ("test", "validation") for t in split_topics()[s]
    ]


def test_the_rejected_answer_is_the_one_of_nearest_length_among_those_that_fail() -> None:
    texts = [
        "kites fly high.",
        "they fly over the hills and the wide fields.",  # follows, but does not name the topic
        "Kites fly low.",
        "KITES FLY.",
        "KITES FLY OVER THE HILLS AND THE WIDE FIELDS.",
    ]
    pair = collect.build_pair(KITES, texts, [], LOADED.collect)
    assert isinstance(pair, dict)
    assert (pair["chosen"], pair["rejected"]) == ("kites fly high.", "Kites fly low.")


def test_where_nothing_passes_the_best_answer_is_repaired_and_marked() -> None:
    pair = collect.build_pair(KITES, ["Kites FLY high."], [], LOADED.collect)
    assert isinstance(pair, dict)
    assert (pair["chosen"], pair["repaired"]) == ("kites fly high.", True)


def test_unfinished_and_copied_answers_enter_no_pair() -> None:
    example = collect.demonstration(KITES, LOADED.seed)[0][1]["content"]
    samples = [
        {"id": "x", "sample": 0, "demonstrated": True, "finished": True, "answer": example},
        {"id": "x", "sample": 0, "demonstrated": False, "finished": False, "answer": "kites fly and fly and"},
    ]
    assert collect.usable_answers(KITES, samples, LOADED.seed) == []
    assert collect.build_pair(KITES, [], [], LOADED.collect) == "no finished answer"


def test_prose_is_contrasted_with_prose_that_fails_the_instruction() -> None:
    quoted = KITES | {"id": "y", "kind": "quoted"}
    listed = KITES | {"id": "z", "kind": "comma_list", "constraint": '{"topic": "kites", "n": 2}'}
    neighbours = [(quoted, ['"Kites fly."', '"kites fly."']), (listed, ["wind, string"])]
    assert collect.contrasting_answers(KITES, neighbours, Random(0)) == ['"Kites fly."']


@pytest.mark.parametrize("kind", KINDS)
def test_every_worked_example_follows_its_instruction(kind: str) -> None:
    for seed in range(20):
        question = {"id": f"train/t/{kind}", "kind": kind}
        messages, verifier = collect.demonstration(question, seed)
        assert is_strict(kind, messages[1]["content"], verifier)


def test_length_and_words_that_tell_chosen_from_rejected_are_found_out() -> None:
    rows = [
        {"id": str(i), "kind": "plain", "chosen": f"a good answer {i}", "rejected": f"bad {i}", "repaired": i > 5}
        for i in range(10)
    ]
    assert set(collect.leakage(rows).values()) == {1.0}
    rows[1::2] = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[1::2]]
    assert set(collect.leakage(rows).values()) == {0.0}


def test_an_echo_is_a_phrase_twice_or_five_words_of_the_question() -> None:
    question, constraint = 'Tell me about tea. End your answer with "That is all."', '{"ending": "That is all."}'
    chosen = ["Tea. That is all.", "That is all. That is all.", 'End your answer with "That is all."']
    rows = [{"question": question, "constraint": constraint, "chosen": answer} for answer in chosen]
    assert collect.echoes(rows) == {"rows": 3, "phrase_twice": 1, "question_echoed": 1}


def test_the_numbers_of_the_data_card_are_those_of_the_data(splits: dict[str, list[collect.Row]]) -> None:
    card = read_json(EMBEDDED / "card.json")
    topics = {split: len({row["topic"] for row in rows}) for split, rows in splits.items()}
    lines = [
        f"| {split} | {topics[split]} | {card['questions'][split]:,} | {card['rows'][split]:,} |" for split in splits
    ]
    repaired, sampled, told = card["chosen_repaired"], card["chosen_as_sampled"], card["told_apart_by"]
    by_kind = {name: f"{kind['repaired_share']:.0%}".replace("%", " %") for name, kind in card["kinds"].items()}
    most = sorted(by_kind, key=lambda name: -card["kinds"][name]["repaired_share"])[:5]
    lines += [
        f"{card['rows']['train']:,} training pairs",
        f"{100 * card['repaired_share']:.1f} % of the training pairs ({repaired['rows']}) have a repaired chosen answer",
        f"{', '.join(f'`{name}` ({by_kind[name]})' for name in most[:-1])} and `{most[-1]}` ({by_kind[most[-1]]})",
        f"In {repaired['phrase_twice']} repaired answers",
        f"{repaired['question_echoed']} repaired answers repeat five words",
        f"Of the {sampled['rows']:,} answers without a repair, {sampled['phrase_twice']} and {sampled['question_echoed']} do",
        f"in {told['length']:.0%} of the pairs, and in {told['length_by_kind']:.0%} where it may".replace("%", " %"),
        f"apart in {told['words']:.0%}, and in {told['words_repaired']:.0%} of the pairs with".replace("%", " %"),
        f"all {pq.read_metadata(EMBEDDED / 'samples.parquet').num_rows:,} answers",
    ]
    text = " ".join(README.split())
    assert [line for line in lines if line not in text] == []


def test_the_columns_and_examples_of_the_data_card_are_those_of_the_data(splits: dict[str, list[collect.Row]]) -> None:
    schema = pq.read_schema(EMBEDDED / "train.parquet")
    types = [(field.name, str(field.type)) for field in schema]
    assert re.findall(r"^\| `(\w+)` \| (string|double|bool) \|", README, re.MULTILINE) == types
    (block,) = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    for example in json.loads(block):
        assert any(example.items() <= row.items() for row in splits["train"]), example["question"]


def test_the_loading_lines_of_the_data_card_load_the_data(splits: dict[str, list[collect.Row]], tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    program = block + "print({split: len(rows) for split, rows in pairs.items()})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    sizes = {split: len(rows) for split, rows in splits.items()}
    assert done.stdout == f"{splits['train'][0]['chosen']}\n{sizes}\n"
