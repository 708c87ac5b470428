"""Paired confidence intervals that respect how the questions were made: many of one topic, kinds of equal weight."""

from collections.abc import Sequence

import numpy as np

Row = tuple[str, str, float, float]


def paired_gain(rows: Sequence[Row], resamples: int = 10_000, seed: int = 0) -> dict[str, float | int]:
    """The gain from before to after in points, with a paired 95 % bootstrap interval clustered by topic.

    A resample draws topics with replacement and keeps all questions of a drawn topic, both scores of a question together. The gain
    of a (re)sample is the mean over kinds of the mean difference within the kind (percentile bootstrap, Efron 1979).

    Args:
        rows: (kind, topic, score before, score after) of each question; scores in [0, 1].
        resamples: number of bootstrap resamples.
        seed: of the resampling; equal arguments give equal intervals.

    Returns:
        {"points", "low", "high", "n"}: gain and interval in points of 100, and the number of questions.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("a paired gain needs at least one question")
    kinds = {kind: i for i, kind in enumerate(sorted({row[0] for row in rows}))}
    topics = {topic: i for i, topic in enumerate(sorted({row[1] for row in rows}))}
    differences = np.zeros((len(topics), len(kinds)))
    counts = np.zeros_like(differences)
    for kind, topic, before, after in rows:
        differences[topics[topic], kinds[kind]] += after - before
        counts[topics[topic], kinds[kind]] += 1
    random = np.random.default_rng(seed)
    weights = random.multinomial(len(topics), np.full(len(topics), 1 / len(topics)), size=resamples)
    gains = _mean_over_kinds(weights @ differences, weights @ counts)
    low, high = np.nanpercentile(gains, [2.5, 97.5])
    point = _mean_over_kinds(differences.sum(axis=0, keepdims=True), counts.sum(axis=0, keepdims=True))[0]
    return {"points": round(100 * point, 4), "low": round(100 * low, 4), "high": round(100 * high, 4), "n": len(rows)}


def ratio_interval(rows: Sequence[tuple[str, float, int]], resamples: int = 10_000, seed: int = 0) -> dict[str, float]:
    """A mean a token with its 95 % bootstrap interval clustered by topic.

    Args:
        rows: (topic, sum over its tokens, tokens); a topic may come several times.
        resamples: number of bootstrap resamples.
        seed: of the resampling.

    Returns:
        {"mean", "low", "high"}.
    """
    return _ratio([(topic, total, tokens) for topic, total, tokens in rows], resamples, seed)


def paired_ratio(
    rows: Sequence[tuple[str, float, float, int]], resamples: int = 10_000, seed: int = 0
) -> dict[str, float | int]:
    """By which share a mean a token changes, with its paired 95 % bootstrap interval clustered by topic.

    Args:
        rows: (topic, sum before, sum after, tokens) of the same tokens before and after.
        resamples: number of bootstrap resamples.
        seed: of the resampling.

    Returns:
        {"change", "low", "high", "n"}: -0.1 is a tenth less; n counts tokens.
    """
    found = _ratio([(topic, after - before, before) for topic, before, after, _ in rows], resamples, seed)
    return {"change": found.pop("mean"), **found, "n": sum(tokens for *_, tokens in rows)}


def _ratio(rows: Sequence[tuple[str, float, float]], resamples: int, seed: int) -> dict[str, float]:
    """The ratio of two sums, topics resampled with replacement."""
    topics = {topic: i for i, topic in enumerate(sorted({row[0] for row in rows}))}
    sums = np.zeros((len(topics), 2))
    for topic, above, below in rows:
        sums[topics[topic]] += above, below
    weights = np.random.default_rng(seed).multinomial(
        len(topics), np.full(len(topics), 1 / len(topics)), size=resamples
    )
    above, below = (weights @ sums).T
    low, high = np.percentile(above / below, [2.5, 97.5])
    point = sums[:, 0].sum() / sums[:, 1].sum()
    return {"mean": float(point), "low": float(low), "high": float(high)}


def _mean_over_kinds(differences: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(samples, kinds) sums and counts -> (samples,) mean over the kinds that were drawn."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nanmean(np.where(counts > 0, differences / counts, np.nan), axis=1)
