"""What the stages found, read back for a page."""

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hermes import params
from hermes.artifacts import read_json
from hermes.console import UserError
from hermes.pages.figures import Curves

REPORTS = Path("reports")
EVALUATION, QUANTIZE = Path("data/evaluation"), Path("models/gguf/quantize.json")
SUITES = EVALUATION / "suites.json"
TASKS = ("strict", "preference", "perplexity", "failures")
Row = dict[str, Any]


@dataclass(frozen=True)
class Inputs:
    """What the stages wrote, as they wrote it; `results` are in the order of the page: base, merged, GGUFs by size."""

    profile: str
    params: Mapping[str, Any]
    subset: Row
    data: Row
    history: Curves
    validation: Curves
    summary: Row
    quantize: Row
    comparison: Row
    divergence: Row
    merge: Row
    suites: Row
    results: Mapping[str, Row]
    answers: Mapping[str, Mapping[str, Row]]


def read_inputs() -> Inputs:
    """Reads the reports of all stages and the parameters of the selected profile.

    Raises:
        UserError: a file is missing or malformed, or two of them contradict each other.
    """
    tree = params.read_yaml(params.PARAMS)
    profile = params.selected_profile(tree)
    quantize = read_json(QUANTIZE)
    comparison = read_json(EVALUATION / "comparison.json")
    ggufs = sorted(set(quantize["files"]) & set(comparison), key=lambda name: (-quantize["files"][name]["bytes"], name))
    models = ["base", "merged", *ggufs]
    return Inputs(
        profile=profile,
        params=params.flatten(shown_params(tree, profile)),
        subset=read_json(REPORTS / "subset.json"),
        data=read_json(REPORTS / "data.json"),
        history=parse_curves(read_text(REPORTS / "train" / "history.csv")),
        validation=parse_curves(read_text(REPORTS / "train" / "evaluation.csv")),
        summary=read_json(REPORTS / "train" / "summary.json"),
        quantize=quantize,
        comparison=comparison,
        divergence=read_json(EVALUATION / "divergence.json"),
        merge=read_json(EVALUATION / "merge.json"),
        suites=read_json(SUITES) if SUITES.is_file() else {},
        results={name: dict.fromkeys(TASKS) | read_json(EVALUATION / f"{name}.json") for name in models},
        answers={
            name: parse_answers(read_text(EVALUATION / f"{name}.jsonl"))
            for name in dict.fromkeys(["base", "merged", models[-1]])
        },
    )


def read_text(path: Path) -> str:
    """The text of a file that a stage wrote.

    Raises:
        UserError: there is no such file.
    """
    try:
        return path.read_text()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `dvc repro` to make it") from None


def parse_curves(text: str) -> dict[str, list[float]]:
    """The columns of a CSV of numbers; an empty cell is not-a-number, which figures leave out."""
    rows = list(csv.DictReader(text.splitlines()))
    return {name: [float(row[name] or math.nan) for row in rows] for name in (rows[0] if rows else ())}


def parse_answers(text: str) -> dict[str, Row]:
    """The rows of a file of answers by the id of their question, in the order of ids."""
    rows = (json.loads(line) for line in text.split("\n") if line.strip())
    return {str(row["id"]): row for row in sorted(rows, key=lambda row: str(row["id"]))}


def shown_params(tree: Mapping[str, Any], profile: str) -> dict[str, Any]:
    """The parameters that a run rests on: the top level, then the sections of the selected profile."""
    top = {key: value for key, value in tree.items() if key not in params.UNTRACKED}
    return {"profile": profile, **top, **tree["profiles"][profile]}
