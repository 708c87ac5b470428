"""The embedded data: rebuilt from its own samples to the same bytes, balanced, disjoint, and within its promises."""

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import fmean

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from hermes import params
from hermes.artifacts import read_json, write_parquet
from hermes.instructions.kinds import KINDS, PLAIN, SEEN_KINDS, UNSEEN_KINDS, VALIDATION_KINDS, grade, is_strict
from hermes.instructions.topics import split_topics
from hermes.model.gguf import GgufModel
from stages import fetch_model
from tools import collect

EMBEDDED = Path(__file__).parents[2] / "data/embedded"
SOME_QUESTIONS = 16
LOADED = params.load(collect.Params, Path(__file__).parents[2] / "params.yaml")

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


def test_pairs_rebuilt_from_the_samples_have_the_committed_bytes(questions: list[collect.Row], tmp_path: Path) -> None:
    samples = pq.read_table(EMBEDDED / "samples.parquet").to_pylist()
    rebuilt, reasons = collect.build_splits(questions, samples, LOADED.collect, LOADED.seed)
    for split, rows in rebuilt.items():
        write_parquet(tmp_path / f"{split}.parquet", pa.Table.from_pylist(rows))
        assert (tmp_path / f"{split}.parquet").read_bytes() == (EMBEDDED / f"{split}.parquet").read_bytes(), split
    assert collect.card(rebuilt, reasons, questions, LOADED.collect) == read_json(EMBEDDED / "card.json")


def test_a_slice_sampled_again_has_the_committed_bytes(
    questions: list[collect.Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits are promised on one kind of CPU; on another one answers still begin alike far more often than two to one question do.

    There some of the questions show it: without bfloat16 a whole chunk takes minutes.
    """
    number, chunk = min(enumerate(collect.chunks(questions, LOADED.collect)), key=lambda entry: len(entry[1]))
    is_same_cpu = read_json(EMBEDDED / "sampled_on.json") == collect.processor()
    chunk = chunk if is_same_cpu else chunk[:SOME_QUESTIONS]
    monkeypatch.chdir(tmp_path)
    fetch_model.fetch_embedded(tmp_path / "base")
    collect.convert(tmp_path / "base", tmp_path / "base.gguf", "bf16")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    with GgufModel(tmp_path / "base.gguf", LOADED.collect.threads, LOADED.collect.slots, context=512) as model:
        found = collect.sample_chunk(chunk, model, tokenizer, LOADED.collect, LOADED.seed)
    wanted = {question["id"] for question in chunk}
    committed = [row for row in pq.read_table(EMBEDDED / "samples.parquet").to_pylist() if row["id"] in wanted]
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


def test_chosen_is_a_sample_unless_it_is_marked_repaired(splits: dict[str, list[collect.Row]]) -> None:
    sampled: dict[str, set[str]] = {}
    for sample in pq.read_table(EMBEDDED / "samples.parquet").to_pylist():
        sampled.setdefault(sample["id"], set()).add(sample["answer"])
    for row in (row for rows in splits.values() for row in rows):
        assert row["contrast"] or row["rejected"] in sampled[row["id"]]
        assert row["repaired"] or row["kind"] == PLAIN.name or row["chosen"] in sampled[row["id"]]


def test_a_contrasting_answer_follows_another_instruction_about_the_same_topic(
    splits: dict[str, list[collect.Row]], questions: list[collect.Row]
) -> None:
    asked = {question["id"]: question for question in questions}
    origins: dict[tuple[str, str], set[str]] = {}
    for sample in pq.read_table(EMBEDDED / "samples.parquet").to_pylist():
        question = asked[sample["id"]]
        if is_strict(question["kind"], sample["answer"], json.loads(question["constraint"])):
            origins.setdefault((question["topic"], sample["answer"]), set()).add(question["kind"])
    contrasting = [row for rows in splits.values() for row in rows if row["contrast"]]
    assert all(origins[row["topic"], row["rejected"]] - {row["kind"]} for row in contrasting)
    drawn = [row["contrast"] for rows in splits.values() for row in rows if row["kind"] != PLAIN.name]
    assert abs(sum(drawn) / len(drawn) - LOADED.collect.contrast_share) < 0.05


def test_a_plain_question_borrows_both_answers_from_others_about_its_topic(
    splits: dict[str, list[collect.Row]],
) -> None:
    plain = [row for row in splits["train"] if row["kind"] == PLAIN.name]
    topics: dict[str, set[str]] = {}
    for sample in pq.read_table(EMBEDDED / "samples.parquet").to_pylist():
        topics.setdefault(sample["id"].split("/")[1], set()).add(sample["answer"])
    assert len(plain) > 150
    assert all(row["contrast"] for row in plain)
    assert all(row["rejected"] in topics[row["topic"]] for row in plain)
    assert all(row["repaired"] or row["chosen"] in topics[row["topic"]] for row in plain)


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
    example = collect.demonstration(KITES, LOADED.seed)[1]["content"]
    samples = [
        {"id": "x", "sample": 0, "demonstrated": True, "finished": True, "answer": example},
        {"id": "x", "sample": 0, "demonstrated": False, "finished": False, "answer": "kites fly and fly and"},
    ]
    assert collect.usable_answers(KITES, samples, LOADED.seed) == []
    assert collect.build_pair(KITES, [], [], LOADED.collect) == "no finished answer"


def test_prose_is_contrasted_with_prose_that_fails_the_instruction() -> None:
    quoted = KITES | {"id": "y", "kind": "quoted"}
    words = KITES | {"id": "z", "kind": "comma_list", "constraint": '{"topic": "kites", "n": 2}'}
    neighbours = [(quoted, ['"Kites fly."', '"kites fly."', "No quotes."]), (words, ["wind, string"])]
    assert collect.contrasting_answers(KITES, neighbours, Random(0)) == ['"Kites fly."']


@pytest.mark.parametrize("kind", KINDS)
def test_every_worked_example_follows_its_instruction(kind: str) -> None:
    for seed in range(20):
        question = {"id": f"train/t/{kind}", "kind": kind}
        assert collect.demonstration(question, seed)[1]["content"]
