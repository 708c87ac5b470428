"""What the stages found, read back for a page."""

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from hermes import params
from hermes.artifacts import REMAKE
from hermes.console import UserError
from hermes.pages.figures import Curves, Row

REPORTS = Path("reports")
EVALUATION = Path("data/evaluation")
QUANTIZE, COMPRESS = Path("models/gguf/quantize.json"), Path("models/compressed/compress.json")
SUITES, EVIDENCE = EVALUATION / "suites.json", EVALUATION / "evidence.json"
TASKS = ("strict", "preference", "perplexity", "failures")
T = TypeVar("T")


class Shape(BaseModel):
    """A part of what a page reads, to hold a file against before anything is drawn; what is more in it is left alone."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Gain(Shape):
    """A paired gain."""

    points: float
    low: float
    high: float
    n: int


class Compared(Shape):
    """A model in comparison.json."""

    strict: Gain | None
    unseen: Gain | None
    preference: Gain | None = None
    by_kind: dict[str, Gain]


class Apart(Shape):
    """How far a model is from another."""

    mean_kl: float
    top1_agreement: float
    low: float | None = None
    high: float | None = None


class Rounded(Shape):
    """What rounding did to a merge."""

    swallowed: float
    relative_error: float


class Merge(Apart):
    """A merge beside the model as it was trained."""

    margin_difference: float
    preferred_alike: float
    rounding: Rounded


class Chosen(Rounded):
    """The merge that was made."""

    base: str


class Merges(Shape):
    """merge.json."""

    bf16: Merge | None = None
    nf4: Merge | None = None
    rounding: Chosen


class File(Shape):
    """A GGUF file in quantize.json, or a folder of 4-bit weights in compress.json."""

    bytes: int
    bits_per_weight: float
    fallback: int | None = None


class Files(Shape):
    """quantize.json and compress.json."""

    files: dict[str, File]


class Share(Shape):
    """A share of the questions."""

    accuracy: float | None
    n: int


class Strict(Shape):
    """Instructions followed."""

    seen: Share
    unseen: Share
    by_kind: dict[str, Share]


class Perplexity(Shape):
    """Of plain answers."""

    value: float
    tokens: int


class Result(Shape):
    """The scores of a model."""

    strict: Strict | None = None
    preference: Share | None = None
    perplexity: Perplexity | None = None
    failures: dict[str, int] | None = None


class Average(Shape):
    """A model in a suite of suites.json."""

    average: dict[str, float]
    gain: Gain | None


class Suite(Shape):
    """A suite of suites.json."""

    title: str
    models: dict[str, Average]


class Answer(Shape):
    """A row of the answers of a model."""

    id: str
    kind: str
    seen: bool
    question: str
    answer: str
    strict: bool


class Interval(Shape):
    """A mean with its interval."""

    mean: float
    low: float
    high: float


class Changed(Shape):
    """A number before and after, and its paired change."""

    before: float
    after: float
    change: float
    low: float
    high: float


class Lengths(Shape):
    """How long answers are."""

    words: Changed
    tokens: Changed
    gain_of_matched: Gain | None


class Stopping(Shape):
    """How many answers end by themselves."""

    finished_before: float
    finished_after: float
    passed_of_finished_before: float | None
    passed_of_finished_after: float | None
    gain: Gain
    gain_of_finished: Gain | None


class AnswersBeside(Shape):
    """What answers say beside their scores."""

    length: Lengths
    stopping: Stopping


class Bin(Shape):
    """Margins of one confidence."""

    n: int
    confidence: float
    right: float
    low: float
    high: float


class Calibration(Shape):
    """How far margins are to be trusted."""

    bins: list[Bin]
    error: float


class Margins(Shape):
    """Rewards of held-out pairs."""

    n: int
    mean: Interval
    right: Interval
    chosen: Interval
    rejected: Interval
    edges: list[float]
    counts: list[int]
    calibration: Calibration


class Prose(Changed):
    """Of prose."""

    tokens: int


class Capitals(Gain):
    """Of capitals."""

    before: float
    after: float


class General(Shape):
    """What training should leave alone."""

    prose: Prose
    capitals: Capitals


class Evidence(Shape):
    """evidence.json."""

    answers: AnswersBeside | None
    margins: Margins | None
    general: General | None


class Kept(Shape):
    """A split in subset.json."""

    read: int
    kept: int
    removed: dict[str, int]


class Tokenized(Shape):
    """A split in data.json."""

    read: int
    pairs: int
    dropped: dict[str, int]
    tokens: dict[str, dict[str, float]]


class Trained(Shape):
    """summary.json."""

    first_loss: float
    last_loss: float
    steps: int
    pairs: int
    epochs: float
    reference_difference: float
    validation_step: int | None = None
    validation_loss: float | None = None


@dataclass(frozen=True)
class Inputs:
    """What the stages wrote, as they wrote it.

    `quantize` has the folders of compress.json among its files. `results` are in the order of the page: base, merged, files by size.
    """

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
    evidence: Row
    results: Mapping[str, Row]
    answers: Mapping[str, Mapping[str, Row]]


def read_inputs() -> Inputs:
    """Reads the reports of all stages and the parameters of the selected profile.

    Raises:
        UserError: a file is missing or malformed, or two of them contradict each other.
    """
    tree = params.read_yaml(params.PARAMS)
    profile = params.selected_profile(tree)
    quantize, compress = (read(path, shaped(Files)) for path in (QUANTIZE, COMPRESS))
    quantize["files"] |= compress["files"]
    comparison = read(EVALUATION / "comparison.json", shaped(dict[str, Compared]))
    divergence = read(EVALUATION / "divergence.json", shaped(dict[str, Apart]))
    if "merged" not in comparison:
        raise UserError(f"{EVALUATION}/comparison.json: says nothing of merged; {REMAKE}")
    models = ["base", "merged", *(name for name in smaller_files(quantize, divergence) if name in comparison)]
    train = REPORTS / "train"
    summary, history = read(train / "summary.json", shaped(Trained)), read(train / "history.csv", parse_curves)
    validation = read(train / "evaluation.csv", parse_curves)
    if len(history.get("step", ())) != summary["steps"]:
        raise UserError(
            f"{train}/history.csv: not the {summary['steps']} steps of summary.json; run `dvc repro --force train`"
        )
    if "preference_loss" not in history:
        raise UserError(f"{train}/history.csv: has no column preference_loss; run `dvc repro --force train`")
    if validation.get("step", [None])[-1] != summary.get("validation_step"):
        raise UserError(
            f"{train}/evaluation.csv: does not end at step {summary.get('validation_step')}, as summary.json says; "
            "run `dvc repro --force train`"
        )
    suites = read(SUITES, shaped(dict[str, Suite])) if SUITES.is_file() else {}
    for name, suite in suites.items():
        if missing := [model for model in ("base", "merged") if model not in suite["models"]]:
            raise UserError(f"{SUITES}: `{name}` says nothing of {missing[0]}; {REMAKE}")
    results = {name: dict.fromkeys(TASKS) | read(EVALUATION / f"{name}.json", shaped(Result)) for name in models}
    for name in ("base", "merged"):
        known = results[name]["strict"] or {"by_kind": {}}
        if odd := comparison["merged"]["by_kind"].keys() - known["by_kind"].keys():
            raise UserError(
                f"{EVALUATION}/comparison.json: compares {min(odd)}, which {name}.json does not have; {REMAKE}"
            )
    return Inputs(
        profile=profile,
        params=params.flatten(shown_params(tree, profile)),
        subset=read(REPORTS / "subset.json", shaped(dict[str, Kept])),
        data=read(REPORTS / "data.json", shaped(dict[str, Tokenized])),
        history=history,
        validation=validation,
        summary=summary,
        quantize=quantize,
        comparison=comparison,
        divergence=divergence,
        merge=read(EVALUATION / "merge.json", shaped(Merges)),
        suites=suites,
        evidence=read(EVIDENCE, shaped(Evidence)) if EVIDENCE.is_file() else dict.fromkeys(Evidence.model_fields),
        results=results,
        answers={name: read_answers(name, results[name]) for name in dict.fromkeys(["base", "merged", models[-1]])},
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
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: not what a stage wrote (`{where}`: {first['msg']}); {REMAKE}") from None
    except (ValueError, TypeError, KeyError, OSError, RecursionError, csv.Error) as error:
        raise UserError(f"{path}: not what a stage wrote ({error}); {REMAKE}") from None


def parse_mapping(text: str) -> Row:
    """A JSON object."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, found {str(found)[:40]!r}")
    return found


def shaped(kind: Any) -> Callable[[str], Row]:
    """A parser of a JSON object of this shape, which it leaves as it is."""

    def parse(text: str) -> Row:
        found = parse_mapping(text)
        TypeAdapter(kind).validate_python(found)
        return found

    return parse


def read_answers(model: str, result: Row) -> dict[str, Row]:
    """The answers of a model by the id of their question, as many as its scores were counted from.

    Raises:
        UserError: they are not; or as `read`.
    """
    path = EVALUATION / f"{model}.jsonl"
    answers = read(path, parse_answers)
    counted = sum(kind["n"] for kind in result["strict"]["by_kind"].values()) if result["strict"] else 0
    if len(answers) != counted:
        raise UserError(f"{path}: has {len(answers)} answers, and {model}.json counts {counted}; {REMAKE}")
    return answers


def parse_curves(text: str) -> dict[str, list[float]]:
    """The columns of a CSV of numbers; an empty cell is not-a-number, which figures leave out."""
    header, *rows = list(csv.reader(text.splitlines())) or [[]]
    if len(set(header)) < len(header) or any(len(row) != len(header) for row in rows):
        raise ValueError("a column is there twice, or a row has more or fewer cells than the first")
    return {name: [float(row[place] or math.nan) for row in rows] for place, name in enumerate(header if rows else ())}


def parse_answers(text: str) -> dict[str, Row]:
    """The rows of a file of answers by the id of their question, in the order of ids."""
    rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    for row in rows:
        Answer.model_validate(row)
    if len({row["id"] for row in rows}) < len(rows):
        raise ValueError("two rows have one id")
    return {str(row["id"]): row for row in sorted(rows, key=lambda row: str(row["id"]))}


def shown_params(tree: Mapping[str, Any], profile: str) -> dict[str, Any]:
    """The parameters that a run rests on: the top level, then the sections of the selected profile."""
    top = {key: value for key, value in tree.items() if key not in params.UNTRACKED}
    return {"profile": profile, **top, **tree["profiles"][profile]}


DISTANCE_KEYS = ("mean_kl", "low", "high", "top1_agreement", "by_topic")
FILE_KEYS = ("fallback", "weight_error", "weight_stretch")


def smaller_files(quantize: Row, divergence: Row) -> dict[str, Row]:
    """The size and the divergence of each file, from the largest to the smallest; None: not measured, or not of its kind."""
    files = sorted(quantize["files"].items(), key=lambda item: (-item[1]["bytes"], item[0]))
    distances = {name: {key: divergence.get(name, {}).get(key) for key in DISTANCE_KEYS} for name, _ in files}
    return {name: {**dict.fromkeys(FILE_KEYS), **file, **distances[name]} for name, file in files}


def pair(before: Mapping[str, Row], after: Mapping[str, Row]) -> list[tuple[Row, Row]]:
    """The rows of questions that both models were asked, in the order of ids."""
    shared = (id for id in before if id in after and before[id]["question"] == after[id]["question"])
    return [(before[id], after[id]) for id in shared]


def flips(pairs: Sequence[tuple[Row, Row]]) -> tuple[list[tuple[Row, Row]], list[tuple[Row, Row]]]:
    """(fixed, broken): the pairs in which only the second model follows the instruction, or only the first."""
    fixed = [(old, new) for old, new in pairs if new["strict"] and not old["strict"]]
    broken = [(old, new) for old, new in pairs if old["strict"] and not new["strict"]]
    return fixed, broken
