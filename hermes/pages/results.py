"""What the stages found, read back for a page."""

import csv
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hermes import params
from hermes.artifacts import read_json
from hermes.console import UserError
from hermes.pages.figures import Curves

REPORTS = Path("reports")
EVALUATION, QUANTIZE = Path("data/evaluation"), Path("models/gguf/quantize.json")
SUITES = EVALUATION / "suites.json"
TASKS = ("strict", "preference", "perplexity", "failures")
Row = dict[str, Any]
T = TypeVar("T")


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
    quantize = read_mapping(QUANTIZE)
    comparison = read_mapping(EVALUATION / "comparison.json")
    ggufs = sorted(set(quantize["files"]) & set(comparison), key=lambda name: (-quantize["files"][name]["bytes"], name))
    models = ["base", "merged", *ggufs]
    train = REPORTS / "train"
    summary, history = read_mapping(train / "summary.json"), read_curves(train / "history.csv")
    if len(history.get("step", ())) != summary["steps"]:
        raise UserError(
            f"{train}/history.csv: not the {summary['steps']} steps of summary.json; run `dvc repro --force train`"
        )
    return Inputs(
        profile=profile,
        params=flatten(shown_params(tree, profile)),
        subset=read_mapping(REPORTS / "subset.json"),
        data=read_mapping(REPORTS / "data.json"),
        history=history,
        validation=read_curves(train / "evaluation.csv"),
        summary=summary,
        quantize=quantize,
        comparison=comparison,
        divergence=read_mapping(EVALUATION / "divergence.json"),
        merge=read_mapping(EVALUATION / "merge.json"),
        suites=read_mapping(SUITES) if SUITES.is_file() else {},
        results={name: dict.fromkeys(TASKS) | read_mapping(EVALUATION / f"{name}.json") for name in models},
        answers={
            name: parsed(parse_answers, read_text(path := EVALUATION / f"{name}.jsonl"), str(path))
            for name in dict.fromkeys(["base", "merged", models[-1]])
        },
    )


def read_mapping(path: Path) -> Row:
    """A JSON file that holds names and their values.

    Raises:
        UserError: it is missing, or it holds something else.
    """
    return parsed(dict, read_json(path), str(path))


def read_curves(path: Path) -> dict[str, list[float]]:
    """The columns of a CSV file of numbers.

    Raises:
        UserError: it is missing, or it holds something else.
    """
    return parsed(parse_curves, read_text(path), str(path))


def parsed(parse: Callable[[Any], T], found: Any, name: str) -> T:
    """What `parse` makes of what a file holds.

    Raises:
        UserError: it is not what a stage writes there; names the file.
    """
    try:
        return parse(found)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{name}: not what a stage wrote ({error}); delete it and run `dvc repro`") from None


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


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys, in the order of the file."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
