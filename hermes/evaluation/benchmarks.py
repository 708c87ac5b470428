"""The benchmark suites: which tasks of lm-eval, with how many examples, which of their metrics count, and how they are averaged.

    nous          AGIEval, GPT4All, TruthfulQA and BigBench as in the tables that Nous Research made common in 2023
    open_llm_v1   the Open LLM Leaderboard of 2023: ARC, HellaSwag, MMLU, TruthfulQA, Winogrande, GSM8K
    open_llm_v2   that of 2024: IFEval, BBH, MATH, GPQA, MuSR, MMLU-Pro, from chance (0) to perfect (1)

Nothing runs here (run_benchmarks.py does that): a suite is data (suites.yaml), and its scores are arithmetic on the results of tasks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple, get_args

from hermes.console import UserError
from hermes.params import read_yaml

SuiteName = Literal["nous", "open_llm_v1", "open_llm_v2"]
Score = dict[str, float]


class Run(NamedTuple):
    """One task as lm-eval is asked for it."""

    task: str
    shots: int
    chat: bool

    @property
    def label(self) -> str:
        """Names its files."""
        return f"{self.task}-{self.shots}-shot{'-chat' if self.chat else ''}"


class Task(NamedTuple):
    """A task, those of its metrics whose mean is its score, each with the filter of the answers, and the score of chance."""

    name: str
    metrics: tuple[str, ...]
    chance: float = 0.0


@dataclass(frozen=True)
class Benchmark:
    """Tasks that make one number: `pooled` weighs them by their questions, otherwise all alike."""

    title: str
    shots: int
    tasks: tuple[Task, ...]
    pooled: bool = False


@dataclass(frozen=True)
class Suite:
    """Benchmarks whose plain mean is the suite's score.

    Attributes:
        longest_answer: most tokens that a task lets a model write; 0 where all choose among answers.
        chat: puts the model's chat template around questions and examples.
    """

    title: str
    benchmarks: tuple[Benchmark, ...]
    differs: Sequence[str]
    longest_answer: int = 0
    chat: bool = False

    def runs(self) -> list[tuple[Benchmark, Task, Run]]:
        """Its tasks in order."""
        return [(part, task, Run(task.name, part.shots, self.chat)) for part in self.benchmarks for task in part.tasks]


def tasks(
    names: str, metric: str = "acc_norm", prefix: str = "", behind: str = "none", choices: int | None = None
) -> tuple[Task, ...]:
    """Tasks that share metrics behind one filter, from the names of both in a text each; chance is one in `choices`, if any."""
    metrics = tuple(f"{name},{behind}" for name in metric.split())
    return tuple(Task(prefix + name, metrics, 1 / choices if choices else 0.0) for name in names.split())


def read_suite(entry: Mapping[str, Any]) -> Suite:
    """A suite of suites.yaml, where the tasks of a benchmark stand in groups."""
    parts = [
        Benchmark(**part | {"tasks": tuple(task for group in part["tasks"] for task in tasks(**group))})
        for part in entry["benchmarks"]
    ]
    return Suite(**{**entry, "benchmarks": tuple(parts)})


LISTED = read_yaml(Path(__file__).with_name("suites.yaml"))
SUITES: dict[SuiteName, Suite] = {name: read_suite(LISTED[name]) for name in get_args(SuiteName)}


def runs(names: Sequence[SuiteName]) -> list[Run]:
    """All runs that suites ask for, each once."""
    return list(dict.fromkeys(run for name in names for _, _, run in SUITES[name].runs()))


def needs_math(task: str) -> bool:
    """Whether a task's answers are graded with packages that clash with DVC's (requirements-math.lock)."""
    return task.startswith("leaderboard_math_")


def spread(values: Sequence[float]) -> dict[str, float]:
    """The mean of values and its standard error."""
    return {"mean": fmean(values), "stderr": stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0}


def check_questions(results: Mapping[str, Mapping[Run, Mapping[str, Any]]]) -> None:
    """Refuses results of models that were not asked the same questions, which tables and gains compare one by one.

    Raises:
        UserError: a task's data changed between two models; names them, what each was asked, and what to delete.
    """
    different = {}
    for run in next(iter(results.values()), {}):
        asked = {
            model: tuple(found[run][key] for key in ("n", "revision", "questions")) for model, found in results.items()
        }
        if len(set(asked.values())) > 1:
            different[run.label] = ", ".join(
                f"{model} {n} questions ({digest[:8]}) of revision {revision or 'unknown'}"
                for model, (n, revision, digest) in asked.items()
            )
    if different:
        found = "; ".join(f"{label} asked {what}" for label, what in different.items())
        files = " ".join(f".scratch/suites/*/{label}.json" for label in different)
        raise UserError(f"data changed between models: {found}; delete {files} and run this again")


def raw_score(task: Task, result: Mapping[str, Any]) -> Score:
    """A task's score: the mean of its metrics. Two of the same answers are taken to err together, which errs on the safe side."""
    found = [spread(result["metrics"][metric]) for metric in task.metrics]
    return {
        "score": math.fsum(metric["mean"] for metric in found) / len(found),
        "stderr": math.fsum(metric["stderr"] for metric in found) / len(found),
        "n": result["n"],
    }


def raw_change(task: Task, after: Mapping[str, Any], before: Mapping[str, Any]) -> Score:
    """How a task's score differs between two results on the same questions, with the error of the paired difference."""
    metrics = {}
    for metric in task.metrics:
        pairs = zip(after["metrics"][metric], before["metrics"][metric], strict=True)
        metrics[metric] = [new - old for new, old in pairs]
    return raw_score(task, {"n": after["n"], "metrics": metrics})


def from_chance(score: Score, chance: float) -> Score:
    """A score from 0, what guessing reaches or less, to 1 (the leaderboard's normalization); as it is where chance is 0."""
    return stretched(score | {"score": max(0.0, score["score"] - chance)}, chance)


def stretched(change: Score, chance: float) -> Score:
    """What `from_chance` makes of a difference where both scores are above chance; below it the scores stop, and this goes on."""
    return change | {name: change[name] / (1 - chance) for name in ("score", "stderr")}


def mean_score(scores: Sequence[Score], weigh: Callable[[Score], float] = lambda score: 1.0) -> Score:
    """The weighted mean of scores of different questions, whose errors are independent."""
    total = math.fsum(map(weigh, scores))
    return {
        "score": math.fsum(weigh(score) * score["score"] for score in scores) / total,
        "stderr": math.sqrt(math.fsum((weigh(score) * score["stderr"]) ** 2 for score in scores)) / total,
        "n": sum(score["n"] for score in scores),
    }


def benchmark_score(
    benchmark: Benchmark, scores: Sequence[Score], normalize: Callable[[Score, float], Score] = from_chance
) -> Score:
    """A benchmark's score from the raw ones of its tasks; or its change from theirs, with `stretched`."""
    if benchmark.pooled:
        return normalize(mean_score(scores, lambda score: score["n"]), benchmark.tasks[0].chance)
    return mean_score([normalize(score, task.chance) for task, score in zip(benchmark.tasks, scores, strict=True)])


def gain(suite: Suite, after: Mapping[Run, Mapping[str, Any]], before: Mapping[Run, Mapping[str, Any]]) -> Score:
    """The change of a suite's average in points, with its paired 95 % interval over questions."""
    changes = []
    for part in suite.benchmarks:
        found = [raw_change(task, after[run], before[run]) for other, task, run in suite.runs() if other is part]
        changes.append(benchmark_score(part, found, stretched))
    change = mean_score(changes)
    points, half = 100 * change["score"], 196 * change["stderr"]
    return {"points": points, "low": points - half, "high": points + half, "n": change["n"]}


def summary(suite: Suite, results: Mapping[str, Mapping[Run, Mapping[str, Any]]]) -> dict[str, Any]:
    """What data/evaluation/suites.json says of one suite, from the result of each run of each model: scores, benchmarks, tasks."""
    raw = {
        model: {run: raw_score(task, found[run]) for _, task, run in suite.runs()} for model, found in results.items()
    }
    models = {}
    for model, scores in raw.items():
        parts = {
            part.title: benchmark_score(part, [scores[run] for other, _, run in suite.runs() if other is part])
            for part in suite.benchmarks
        }
        against = "base" if model == "merged" else "merged"
        models[model] = {
            "benchmarks": parts,
            "average": mean_score(list(parts.values())),
            "gain": gain(suite, results[model], results[against]) if model != "base" and against in results else None,
        }
    rows = [
        {
            "benchmark": part.title,
            "task": task.name,
            "shots": part.shots,
            "metrics": [metric.removesuffix(",none") for metric in task.metrics],
            "chance": task.chance,
            "revisions": sorted({found[run]["revision"] for found in results.values()} - {None}),
            "truncated": {model: found[run]["truncated"] for model, found in results.items()},
            "scores": {model: scores[run] for model, scores in raw.items()},
        }
        for part, task, run in suite.runs()
    ]
    return {
        "title": suite.title,
        "benchmarks": [part.title for part in suite.benchmarks],
        "differs": list(suite.differs),
        "models": models,
        "tasks": rows,
    }
