"""Pairs that repeat a question of a suite, against a slow search by words themselves."""

import random
import re
from pathlib import Path

import pyarrow.parquet as pq

from hermes.data.decontamination import COMMON, RUN, Questions, runs, write_questions

QUESTION = "A farmer has seventeen sheep and all but nine of them run away; how many sheep does the farmer have left?"
ASKED = [
    ("nous", "sums", QUESTION),
    ("nous", "sums", "How many legs have six spiders that lost two legs each on a long and stony way?"),
    ("open_llm_v1", "short", "What is photosynthesis good for?"),
    ("open_llm_v1", "short", "Why?"),
]


def questions(folder: Path, texts: list[tuple[str, str, str]]) -> Questions:
    write_questions(texts, folder / "suites.parquet")
    return Questions(folder / "suites.parquet")


def test_a_question_is_found_whole_reworded_in_part_and_in_an_answer_or_a_turn_before(tmp_path: Path) -> None:
    asked = questions(tmp_path, ASKED)
    assert asked.repeated_by(QUESTION.upper().replace(" ", "\n"), []) == ("nous", "sums")
    assert asked.repeated_by("Please solve: " + QUESTION.replace("sheep does the farmer have", "are"), ["Nine."]) == (
        "nous",
        "sums",
    )
    assert asked.repeated_by("Write a riddle.", ["Here is one. " + QUESTION, "No."]) == ("nous", "sums")
    assert asked.repeated_by("And now?", ["user", QUESTION, "Nine.", "Ten."]) == ("nous", "sums")


def test_what_shares_less_than_half_is_kept(tmp_path: Path) -> None:
    asked = questions(tmp_path, ASKED)
    assert asked.repeated_by("A farmer has seventeen sheep and all but nine are white. Why?", ["Wool."]) is None
    assert asked.repeated_by("How many sheep are there?", ["Nine.", "Ten."]) is None


def test_a_short_question_is_repeated_by_a_whole_question_alone_and_one_word_by_none(tmp_path: Path) -> None:
    asked = questions(tmp_path, ASKED)
    assert asked.repeated_by("what is photosynthesis good for", ["Sugar."]) == ("open_llm_v1", "short")
    assert asked.repeated_by("Tell me: what is photosynthesis good for?", ["Sugar."]) is None
    assert asked.repeated_by("Why?", ["So."]) is None


def test_the_wording_of_a_task_is_no_question(tmp_path: Path) -> None:
    wording = "Choose the one answer of four that fits best and say nothing else."
    texts = [("nous", "wordy", f"{wording} Case {i} of {i * i} and {i + 7919}.") for i in range(COMMON + 1)]
    assert questions(tmp_path, texts).repeated_by(wording, ["B"]) is None
    assert questions(tmp_path, texts[:COMMON]).repeated_by(wording, ["B"]) == ("nous", "wordy")


def test_no_question_can_be_read_in_the_file(tmp_path: Path) -> None:
    write_questions(ASKED, tmp_path / "suites.parquet")
    table = pq.read_table(tmp_path / "suites.parquet")
    assert table.column_names == ["suite", "task", "runs"]
    assert b"sheep" not in (tmp_path / "suites.parquet").read_bytes()


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def slow(texts: list[tuple[str, str, str]], question: str, others: list[str]) -> tuple[str, str] | None:
    """The same by lists of words."""

    def grams(words: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}

    whole = grams(words_of(" ".join([question, *others])))
    for suite, task, text in texts:
        words = words_of(text)
        own = grams(words) or {tuple(words)}
        if 2 * len(own & (whole | {tuple(words_of(question))})) >= len(own):
            return suite, task
    return None


def test_equal_to_a_search_by_words(tmp_path: Path) -> None:
    """On texts of few words, so that many runs are shared."""
    draw = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choice("abc") for _ in range(draw.randint(low, high)))

    texts = [("nous", f"task {i}", text(4, 14)) for i in range(40)]
    asked, found = questions(tmp_path, texts), []
    for _ in range(300):
        question, others = text(4, 80), [text(1, 80), text(1, 80)]
        found.append(asked.repeated_by(question, others))
        assert found[-1] == slow(texts, question, others)
    assert 30 < sum(name is not None for name in found) < 270


def test_runs_are_those_of_the_text() -> None:
    assert len(runs("one two three")) == 0
    assert len(runs("one two three four")) == 1
    assert len(runs("one two three four five six seven eight nine ten")) == 3
    assert set(runs("a b c d e f g h").tolist()) < set(runs("x a b c d e f g h y").tolist())
