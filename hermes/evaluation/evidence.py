"""Is the tuned model better, or only shorter? What answers and held-out pairs say beside the scores, each with n and a paired interval.

Nothing is asked of a model here; all of it is arithmetic on what stages/evaluate.py kept.
"""

import math
from collections.abc import Sequence
from typing import Any

from hermes.evaluation.intervals import paired_gain, ratio_interval

Row = dict[str, Any]
MATCHED = 0.2  # answers whose numbers of words differ by this share of the larger at most are of matched length
BINS = 10  # of confidence
HISTOGRAM = 24  # bars of margins, or one more


def words(text: str) -> int:
    """How many words an answer has."""
    return len(text.split())


def change(rows: Sequence[tuple[str, float, float]]) -> Row:
    """The means of a number before and after, and their paired difference with its interval, clustered by topic: (topic, before, after)."""
    spread = ratio_interval([(topic, after - before, 1) for topic, before, after in rows])
    return {
        "before": sum(before for _, before, _ in rows) / len(rows),
        "after": sum(after for *_, after in rows) / len(rows),
        "change": spread["mean"],
        "low": spread["low"],
        "high": spread["high"],
        "n": len(rows),
    }


def gain_of(pairs: Sequence[tuple[Row, Row]], key: str = "strict") -> Row | None:
    """The paired gain of a share over questions, kinds weighted equally; None of no questions."""
    rows = [(new["kind"], new["topic"], float(old[key]), float(new[key])) for old, new in pairs]
    return paired_gain(rows) if rows else None


def length(pairs: Sequence[tuple[Row, Row]]) -> Row:
    """How long answers are before and after, and what is gained where both are about as long."""
    matched = []
    for old, new in pairs:
        counts = words(old["answer"]), words(new["answer"])
        if max(counts) - min(counts) <= MATCHED * max(counts):
            matched.append((old, new))
    return {
        "words": change([(new["topic"], words(old["answer"]), words(new["answer"])) for old, new in pairs]),
        "tokens": change([(new["topic"], old["tokens"], new["tokens"]) for old, new in pairs]),
        "gain_of_matched": gain_of(matched),
    }


def stopping(pairs: Sequence[tuple[Row, Row]]) -> Row:
    """How many answers end by themselves before and after, and what is gained where both do."""
    both = [(old, new) for old, new in pairs if old["finished"] and new["finished"]]
    return {
        "finished_before": sum(old["finished"] for old, _ in pairs) / len(pairs),
        "finished_after": sum(new["finished"] for _, new in pairs) / len(pairs),
        "gain": gain_of(pairs, "finished"),
        "passed_of_finished_before": share([old["strict"] for old, _ in pairs if old["finished"]]),
        "passed_of_finished_after": share([new["strict"] for _, new in pairs if new["finished"]]),
        "gain_of_finished": gain_of(both),
    }


def share(values: Sequence[bool]) -> float | None:
    """The share of what is true; None of nothing."""
    return sum(values) / len(values) if values else None


def answers(before: Sequence[Row], after: Sequence[Row]) -> Row | None:
    """Length and stopping over the questions of kinds that were trained; None where no question was asked.

    Args:
        before: the rows of data/evaluation/base.jsonl, with `tokens`.
        after: those of the tuned model, in the same order.
    """
    pairs = [(old, new) for old, new in zip(before, after, strict=True) if new["seen"]]
    return {"length": length(pairs), "stopping": stopping(pairs)} if pairs else None


def margins(before: Sequence[Row], after: Sequence[Row], beta: float) -> Row | None:
    """The implicit rewards of held-out pairs (Rafailov et al. 2023, eq. 5): their margins as a histogram, and how far to trust them.

    A margin is β times how much more training raised the log-likelihood of the chosen answer than of the rejected one. Its sigmoid is the
    probability that DPO gives the chosen answer to be preferred. Confidence is that of the answer it prefers. Calibrated are margins of
    which the share that is right equals the mean confidence.

    Args:
        before: `topic` and `log_likelihoods` (chosen, rejected) of each pair by the base.
        after: the same by the tuned model.
        beta: of the loss.
    """
    if not after:
        return None
    found, gained = [], []
    for old, new in zip(before, after, strict=True):
        chosen, rejected = (
            mine - theirs for mine, theirs in zip(new["log_likelihoods"], old["log_likelihoods"], strict=True)
        )
        gained.append((new["topic"], chosen, rejected))
        found.append((new["topic"], beta * (chosen - rejected)))
    edges, counts = histogram([value for _, value in found])
    return {
        "n": len(found),
        "mean": ratio_interval([(topic, value, 1) for topic, value in found]),
        "right": ratio_interval([(topic, float(value > 0), 1) for topic, value in found]),
        "edges": edges,
        "counts": counts,
        "calibration": calibration(found),
        "chosen": ratio_interval([(topic, value, 1) for topic, value, _ in gained]),
        "rejected": ratio_interval([(topic, value, 1) for topic, _, value in gained]),
    }


def histogram(values: Sequence[float]) -> tuple[list[float], list[int]]:
    """The edges of bars of one width, and how many values lie in each.

    Zero is an edge and belongs to the bar below it, so that the bars above it hold what is above zero, and no more.
    """
    low, high = min(0.0, *values), max(0.0, *values)
    step = (high - low) / HISTOGRAM or 1.0
    below, above = math.ceil(-low / step), math.ceil(high / step)
    if below == 0 and 0.0 in values:
        below = 1
    counts = [0] * (below + above)
    for value in values:
        counts[max(0, math.ceil(value / step) - 1 + below)] += 1
    return [step * i for i in range(-below, above + 1)], counts


def calibration(found: Sequence[tuple[str, float]]) -> Row:
    """Margins by confidence, from 50 % to 100 %: how many, how confident, how many right; and the mean distance of the two, by n (ECE)."""
    bins: list[list[tuple[str, float, float]]] = [[] for _ in range(BINS)]
    for topic, value in found:
        confidence = 1 / (1 + math.exp(-min(abs(value), 500.0)))
        bins[min(BINS - 1, int((confidence - 0.5) * 2 * BINS))].append((topic, confidence, float(value > 0)))
    rows = []
    for part in filter(None, bins):
        right = ratio_interval([(topic, hit, 1) for topic, _, hit in part])
        confidence = sum(value for _, value, _ in part) / len(part)
        rows.append(
            {
                "n": len(part),
                "confidence": confidence,
                "right": right["mean"],
                "low": right["low"],
                "high": right["high"],
            }
        )
    error = sum(row["n"] * abs(row["confidence"] - row["right"]) for row in rows) / len(found)
    return {"bins": rows, "error": error}
