"""The interval of a gain is the bootstrap's, drawn over topics, and holds what it promises."""

import itertools
import math
from random import Random
from statistics import mean

import numpy as np
import pytest

from hermes.evaluation.intervals import Row, paired_gain, paired_ratio, ratio_interval


def gain(rows: list[Row]) -> float:
    """The mean over kinds of the mean difference within a kind, in points."""
    kinds = sorted({row[0] for row in rows})
    return 100 * mean(mean(after - before for kind, _, before, after in rows if kind == name) for name in kinds)


def make_rows(seed: int, topics: int, kinds: int = 2, effect: float = 0.1) -> list[Row]:
    """Questions of every kind on every topic; a question passes more often where its topic is easy."""
    random = Random(seed)
    rows: list[Row] = []
    for topic in range(topics):
        shift = random.gauss(0, 0.15)
        for kind in range(kinds):
            before = random.random()
            rows.append((f"k{kind}", f"t{topic}", before, before + effect + shift + random.gauss(0, 0.1)))
    return rows


def width(rows: list[Row], resamples: int = 4000) -> float:
    result = paired_gain(rows, resamples=resamples)
    return float(result["high"]) - float(result["low"])


def test_the_interval_is_that_of_all_resamples_enumerated() -> None:
    rows = make_rows(1, topics=5)
    rows += [("rare", "t0", 0.0, 1.0), ("rare", "t3", 0.0, 0.2)]  # a kind that many resamples lack
    by_topic = {f"t{i}": [row for row in rows if row[1] == f"t{i}"] for i in range(5)}
    every = [
        gain([row for topic in drawn for row in by_topic[topic]]) for drawn in itertools.product(by_topic, repeat=5)
    ]
    low, high = np.percentile(every, [2.5, 97.5])
    result = paired_gain(rows, resamples=100_000)
    assert result["points"] == pytest.approx(gain(rows), abs=1e-4)
    assert result["low"] == pytest.approx(low, abs=0.15)
    assert result["high"] == pytest.approx(high, abs=0.15)
    assert result["n"] == len(rows)


def test_kinds_count_alike_however_many_questions_they_have() -> None:
    rows: list[Row] = [("a", f"t{i}", 0.0, 1.0) for i in range(30)] + [("b", "t0", 0.0, 0.0)]
    assert paired_gain(rows)["points"] == 50.0


def test_more_questions_on_the_same_topics_do_not_narrow_the_interval_as_more_topics_do() -> None:
    rows = make_rows(2, topics=20, kinds=1)
    repeated = rows * 4
    independent = make_rows(2, topics=80, kinds=1)
    assert width(repeated) == pytest.approx(width(rows), rel=0.05)
    assert width(independent) < 0.7 * width(rows)


def test_questions_are_paired() -> None:
    """What is hard for both models is no doubt about their difference."""
    random = Random(3)
    rows: list[Row] = [("a", f"t{i}", score := random.random(), score + 0.1) for i in range(40)]
    result = paired_gain(rows)
    assert (result["low"], result["points"], result["high"]) == (10.0, 10.0, 10.0)


def test_no_difference_is_an_interval_of_no_width() -> None:
    rows: list[Row] = [(f"k{i % 3}", f"t{i % 7}", i / 42, i / 42) for i in range(42)]
    assert paired_gain(rows) == {"points": 0.0, "low": 0.0, "high": 0.0, "n": 42}


def test_one_question_has_no_width() -> None:
    assert paired_gain([("a", "t", 0.25, 0.75)]) == {"points": 50.0, "low": 50.0, "high": 50.0, "n": 1}


def test_equal_arguments_give_equal_intervals_in_any_order_of_rows() -> None:
    rows = make_rows(4, topics=12)
    assert paired_gain(rows) == paired_gain(rows)
    shuffled = Random(0).sample(rows, len(rows))
    assert paired_gain(shuffled) == pytest.approx(paired_gain(rows), abs=2e-4)
    assert paired_gain(rows, seed=1)["low"] != paired_gain(rows)["low"]


def test_swapping_before_and_after_mirrors_the_interval() -> None:
    rows = make_rows(5, topics=12)
    there, back = paired_gain(rows), paired_gain([(kind, topic, after, before) for kind, topic, before, after in rows])
    assert (back["low"], back["points"], back["high"]) == pytest.approx(
        (-there["high"], -there["points"], -there["low"]), abs=2e-4
    )


def test_a_gain_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one question"):
        paired_gain([])


def test_95_of_100_intervals_hold_the_true_gain() -> None:
    """300 simulated evaluations of 40 topics, correlated within a topic; ignoring that would cover about 75 %."""
    hits = 0
    for seed in range(300):
        result = paired_gain(make_rows(1000 + seed, topics=40, kinds=4), resamples=400)
        hits += float(result["low"]) <= 10.0 <= float(result["high"])
    assert 0.91 <= hits / 300 <= 0.99
    assert math.isclose(gain(make_rows(1000, topics=4000)), 10.0, abs_tol=1.0)  # the simulated truth is what it says


def test_a_mean_a_token_weighs_topics_by_their_tokens_and_its_interval_holds_the_truth() -> None:
    assert ratio_interval([("a", 2.0, 1), ("b", 1.0, 9)])["mean"] == pytest.approx(0.3)
    assert ratio_interval([("a", 1.0, 2)] * 3) == {"mean": 0.5, "low": 0.5, "high": 0.5}
    hits = 0
    for seed in range(200):
        random = Random(seed)
        topics = [(str(i), random.randint(5, 15)) for i in range(40)]
        found = ratio_interval([(name, n * (1 + random.gauss(0, 0.5)), n) for name, n in topics], resamples=400)
        hits += found["low"] <= 1.0 <= found["high"]
    assert 0.88 <= hits / 200 <= 0.99


def test_a_change_of_a_mean_is_paired() -> None:
    rows = [
        (str(i), 1.0 + i, (1.0 + i) * 0.8, 10) for i in range(20)
    ]  # a fifth less in every topic, which differ widely
    found = paired_ratio(rows)
    assert [found[key] for key in ("change", "low", "high")] == pytest.approx([-0.2, -0.2, -0.2])
    assert found["n"] == 200
