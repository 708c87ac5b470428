"""What the stages found, read back for a page."""

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hermes import params
from hermes.console import UserError
from hermes.pages.figures import Curves, Row

REPORTS = Path("reports")
EVALUATION, QUANTIZE = Path("data/evaluation"), Path("models/gguf/quantize.json")
SUITES = EVALUATION / "suites.json"
TASKS = ("strict", "preference", "perplexity", "failures")
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
    quantize = read(QUANTIZE, parse_mapping)
    comparison, divergence = (read(EVALUATION / f"{name}.json", parse_mapping) for name in ("comparison", "divergence"))
    models = ["base", "merged", *(name for name in gguf_files(quantize, divergence) if name in comparison)]
    train = REPORTS / "train"
    summary, history = read(train / "summary.json", parse_mapping), read(train / "history.csv", parse_curves)
    if len(history.get("step", ())) != summary["steps"]:
        raise UserError(
            f"{train}/history.csv: not the {summary['steps']} steps of summary.json; run `dvc repro --force train`"
        )
    return Inputs(
        profile=profile,
        params=params.flatten(shown_params(tree, profile)),
        subset=read(REPORTS / "subset.json", parse_mapping),
        data=read(REPORTS / "data.json", parse_mapping),
        history=history,
        validation=read(train / "evaluation.csv", parse_curves),
        summary=summary,
        quantize=quantize,
        comparison=comparison,
        divergence=divergence,
        merge=read(EVALUATION / "merge.json", parse_mapping),
        suites=read(SUITES, parse_mapping) if SUITES.is_file() else {},
        results={name: dict.fromkeys(TASKS) | read(EVALUATION / f"{name}.json", parse_mapping) for name in models},
        answers={
            name: read(EVALUATION / f"{name}.jsonl", parse_answers)
            for name in dict.fromkeys(["base", "merged", models[-1]])
        },
    )


def read(path: Path, parse: Callable[[str], T]) -> T:
    """What `parse` makes of a file that a stage wrote.

    Raises:
        UserError: there is no such file, or it is not what a stage writes.
    """
    try:
        return parse(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `dvc repro` to make it") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not what a stage wrote ({error}); delete it and run `dvc repro`") from None


def parse_mapping(text: str) -> Row:
    """A JSON object."""
    return dict(json.loads(text))


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


def gguf_files(quantize: Row, divergence: Row) -> dict[str, Row]:
    """The size and the divergence of each GGUF file, from the largest to the smallest; None: not measured."""
    files = sorted(quantize["files"].items(), key=lambda item: (-item[1]["bytes"], item[0]))
    return {name: {"mean_kl": None, "top1_agreement": None, **file, **divergence.get(name, {})} for name, file in files}


def pair(before: Mapping[str, Row], after: Mapping[str, Row]) -> list[tuple[Row, Row]]:
    """The rows of questions that both models were asked, in the order of ids."""
    shared = (id for id in before if id in after and before[id]["question"] == after[id]["question"])
    return [(before[id], after[id]) for id in shared]


def flips(pairs: Sequence[tuple[Row, Row]]) -> tuple[list[tuple[Row, Row]], list[tuple[Row, Row]]]:
    """(fixed, broken): the pairs in which only the second model follows the instruction, or only the first."""
    fixed = [(old, new) for old, new in pairs if new["strict"] and not old["strict"]]
    broken = [(old, new) for old, new in pairs if old["strict"] and not new["strict"]]
    return fixed, broken
