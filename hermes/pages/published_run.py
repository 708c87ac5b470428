"""The published run: its settings and its loss curve, from published_run.yaml, which the report of another run sets beside its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hermes import params

RUN = params.read_yaml(Path(__file__).with_suffix(".yaml"))
SETTINGS: Mapping[str, tuple[Any, str]] = {key: (row["value"], row["meaning"]) for key, row in RUN["settings"].items()}
LOSSES: Sequence[float] = RUN["losses"]
BASE, DATA = SETTINGS["model.source"][0], SETTINGS["data.source"][0]


def deviations(params: Mapping[str, Any]) -> list[tuple[str, Any, Any, str]]:
    """The settings of a run, by dotted keys, that are not those of the published run: (key, here, there, what it is)."""
    rows = [(key, params[key], value, meaning) for key, (value, meaning) in SETTINGS.items() if key in params]
    return [row for row in rows if row[1] != row[2]]


def curve_difference(losses: Sequence[float]) -> dict[str, float]:
    """How a run's losses differ from the published ones over the steps that both have: means, and mean absolute difference."""
    pairs = list(zip(losses, LOSSES, strict=False))
    return {
        "steps": len(pairs),
        "mean": sum(ours for ours, _ in pairs) / len(pairs),
        "published_mean": sum(theirs for _, theirs in pairs) / len(pairs),
        "mean_absolute": sum(abs(ours - theirs) for ours, theirs in pairs) / len(pairs),
    }
