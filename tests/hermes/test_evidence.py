"""What answers and held-out pairs say beside the scores, on rows whose evidence is known by hand."""

import math
import random
from typing import Any

import pytest

from hermes.evaluation import evidence

Row = dict[str, Any]


def row(topic: str, text: str, strict: bool, finished: bool = True, kind: str = "list", seen: bool = True) -> Row:
    found = {"topic": topic, "kind": kind, "seen": seen, "answer": text, "strict": strict and finished}
    return found | {"finished": finished, "tokens": 2 * len(text.split())}


BEFORE = [
    row("a", "one two three four", False),
    row("b", "one two three four five", True),
    row("c", "one " * 40, True, finished=False),
    row("d", "one two", False),
    row("e", "one two three", False, kind="other", seen=False),
]
AFTER = [
    row("a", "one two three four five", True),  # about as long
    row("b", "one two", True),
    row("c", "one two", True),
    row("d", "one two", True),
    row("e", "one", True, kind="other", seen=False),
]


def test_length_is_that_of_the_questions_of_trained_kinds() -> None:
    found = evidence.answers(BEFORE, AFTER)
    assert found is not None
    words, tokens = found["length"]["words"], found["length"]["tokens"]
    assert (words["before"], words["after"], words["n"]) == ((4 + 5 + 40 + 2) / 4, (5 + 2 + 2 + 2) / 4, 4)
    assert words["change"] == pytest.approx(words["after"] - words["before"])
    assert words["low"] < words["change"] < words["high"]
    assert tokens["before"] == 2 * words["before"]


def test_the_gain_of_answers_of_matched_length_leaves_the_others_out() -> None:
    found = evidence.answers(BEFORE, AFTER)
    assert found is not None
    matched = found["length"]["gain_of_matched"]  # a and d, of which both were fixed
    assert (matched["n"], matched["points"]) == (2, 100.0)


def test_stopping_counts_what_ended_and_what_passed_of_it() -> None:
    found = evidence.answers(BEFORE, AFTER)
    assert found is not None
    stopping = found["stopping"]
    assert (stopping["finished_before"], stopping["finished_after"]) == (0.75, 1.0)
    assert stopping["passed_of_finished_before"] == pytest.approx(1 / 3)
    assert stopping["passed_of_finished_after"] == 1.0
    assert stopping["gain"]["points"] == 25.0
    assert (stopping["gain_of_finished"]["n"], round(stopping["gain_of_finished"]["points"], 1)) == (3, 66.7)


def test_without_questions_there_is_no_evidence_and_without_matches_no_gain() -> None:
    assert evidence.answers([], []) is None
    assert evidence.answers(BEFORE[4:], AFTER[4:]) is None
    found = evidence.answers(BEFORE[2:3], AFTER[2:3])
    assert found is not None
    assert found["length"]["gain_of_matched"] is None
    assert found["stopping"]["gain_of_finished"] is None
    assert found["stopping"]["passed_of_finished_before"] is None


def pairs(margins: list[float], beta: float) -> tuple[list[Row], list[Row]]:
    before = [{"topic": str(i), "log_likelihoods": [-30.0, -20.0]} for i in range(len(margins))]
    after = [
        {"topic": str(i), "log_likelihoods": [-30.0 + margin / beta - 1, -20.0 - 1]} for i, margin in enumerate(margins)
    ]
    return before, after


def test_margins_are_betas_times_what_the_chosen_answers_gained_more() -> None:
    found = evidence.margins(*pairs([1.0, -0.5, 2.0, 0.25], 0.1), 0.1)
    assert found is not None
    assert found["n"] == sum(found["counts"]) == 4
    assert found["mean"]["mean"] == pytest.approx(0.6875)
    assert found["right"]["mean"] == 0.75
    step = 2.5 / evidence.HISTOGRAM
    assert found["edges"] == pytest.approx([step * i for i in range(-5, 21)])
    assert [i - 5 for i, count in enumerate(found["counts"]) if count] == [-5, 2, 9, 19]
    assert found["rejected"]["mean"] == pytest.approx(-1)
    assert found["chosen"]["mean"] == pytest.approx(-1 + 0.6875 / 0.1)
    assert evidence.margins([], [], 0.1) is None


@pytest.mark.parametrize("seed", range(20))
def test_the_bars_above_zero_hold_the_margins_that_are_right_and_no_other(seed: int) -> None:
    draw = random.Random(seed)
    values = [draw.choice([0.0, draw.gauss(draw.choice([-9, 0, 9]), 2)]) for _ in range(draw.randint(1, 60))]
    edges, counts = evidence.histogram(values)
    assert 0.0 in edges
    assert len(edges) == len(counts) + 1
    assert sum(counts) == len(values)
    assert sum(counts[edges.index(0.0) :]) == sum(value > 0 for value in values)
    assert edges[0] <= min(values)
    assert edges[-1] >= max(values)


@pytest.mark.parametrize("value", [0.0, 2.0, -2.0, 5e-324])
def test_equal_margins_are_in_one_bar(value: float) -> None:
    edges, counts = evidence.histogram([value, value])
    assert sorted(counts)[-2:] in ([2], [0, 2])
    assert all(map(math.isfinite, edges))


def test_calibrated_margins_have_next_to_no_error_and_doubled_ones_have() -> None:
    """Each margin is right as often as its sigmoid says."""
    draw = random.Random(0)
    sizes = [draw.uniform(0, 4) for _ in range(20_000)]
    found = [
        (str(i % 50), size if draw.random() < 1 / (1 + math.exp(-size)) else -size) for i, size in enumerate(sizes)
    ]
    calibrated = evidence.calibration(found)
    assert calibrated["error"] < 0.02
    assert evidence.calibration([(topic, 4 * size) for topic, size in found])["error"] > 0.05
    assert sum(part["n"] for part in calibrated["bins"]) == 20_000
    assert all(part["low"] <= part["right"] <= part["high"] for part in calibrated["bins"])
    assert evidence.calibration([("a", 1e6), ("a", -1e6)])["error"] == pytest.approx(0.5)
