"""The benchmark suites: which tasks of lm-eval, with how many examples, which of their metrics count, and how they are averaged.

    nous          AGIEval, GPT4All, TruthfulQA and BigBench as in the tables that Nous Research made common in 2023
    open_llm_v1   the Open LLM Leaderboard of 2023: ARC, HellaSwag, MMLU, TruthfulQA, Winogrande, GSM8K
    open_llm_v2   that of 2024: IFEval, BBH, MATH, GPQA, MuSR, MMLU-Pro, from chance (0) to perfect (1)

Nothing runs here (hermes/evaluation/run_benchmarks.py does that): a suite is data, and its scores are arithmetic on the results of
tasks. Each says where it differs from the historic one, since numbers that look alike are compared.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

from hermes.console import UserError

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
    differs: tuple[str, ...]
    longest_answer: int = 0
    chat: bool = False

    def runs(self) -> list[tuple[Benchmark, Task, Run]]:
        """Its tasks in order."""
        return [(part, task, Run(task.name, part.shots, self.chat)) for part in self.benchmarks for task in part.tasks]


def tasks(names: str, metric: str = "acc_norm", prefix: str = "", chance: float = 0.0) -> tuple[Task, ...]:
    """Tasks that share a metric, from their names in one text."""
    return tuple(Task(prefix + name, (f"{metric},none",), chance) for name in names.split())


AGIEVAL = "aqua_rat logiqa_en lsat_ar lsat_lr lsat_rc sat_en_without_passage sat_en sat_math"
BIGBENCH = (
    "causal_judgement date_understanding disambiguation_qa geometric_shapes logical_deduction_five_objects "
    "logical_deduction_seven_objects logical_deduction_three_objects movie_recommendation navigate reasoning_about_colored_objects "
    "ruin_names salient_translation_error_detection snarks sports_understanding temporal_sequences "
    "tracking_shuffled_objects_five_objects tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects"
)
MMLU = (
    "abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry "
    "college_computer_science college_mathematics college_medicine college_physics computer_security conceptual_physics "
    "econometrics electrical_engineering elementary_mathematics formal_logic global_facts high_school_biology "
    "high_school_chemistry high_school_computer_science high_school_european_history high_school_geography "
    "high_school_government_and_politics high_school_macroeconomics high_school_mathematics high_school_microeconomics "
    "high_school_physics high_school_psychology high_school_statistics high_school_us_history high_school_world_history human_aging "
    "human_sexuality international_law jurisprudence logical_fallacies machine_learning management marketing medical_genetics "
    "miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory professional_accounting professional_law "
    "professional_medicine professional_psychology public_relations security_studies sociology us_foreign_policy virology "
    "world_religions"
)
MATH = "algebra counting_and_prob geometry intermediate_algebra num_theory prealgebra precalculus"
# Choices of every subtask; guessing is right once in so many.
BBH = {
    2: "boolean_expressions causal_judgement formal_fallacies hyperbaton navigate snarks sports_understanding web_of_lies",
    3: "disambiguation_qa logical_deduction_three_objects tracking_shuffled_objects_three_objects",
    4: "temporal_sequences",
    5: "logical_deduction_five_objects penguins_in_a_table tracking_shuffled_objects_five_objects",
    6: "date_understanding movie_recommendation ruin_names salient_translation_error_detection",
    7: "logical_deduction_seven_objects tracking_shuffled_objects_seven_objects",
    11: "geometric_shapes",
    18: "reasoning_about_colored_objects",
    19: "object_counting",
}
MUSR = {2: "murder_mysteries", 5: "object_placements", 3: "team_allocation"}


def by_choices(names: Mapping[int, str], prefix: str) -> tuple[Task, ...]:
    """Tasks whose chance is one in the number of choices."""
    return tuple(task for count, found in names.items() for task in tasks(found, "acc_norm", prefix, 1 / count))


BOS = (
    "Prompts begin with the beginning-of-sequence token where the tokenizer writes one, as lm-eval does today; the lm-eval of then left "
    "it out."
)
DATA = (
    "Data sets are the Hub's newest revisions, which lm-eval does not pin; each task's row names the one that was read."
)
SUITES: dict[SuiteName, Suite] = {
    "nous": Suite(
        "Nous",
        (
            Benchmark("AGIEval", 0, tasks(AGIEVAL, prefix="agieval_")),
            Benchmark(
                "GPT4All",
                0,
                tasks("arc_challenge arc_easy hellaswag openbookqa piqa") + tasks("boolq winogrande", "acc"),
            ),
            Benchmark("TruthfulQA", 0, tasks("truthfulqa_mc2", "acc")),
            Benchmark("BigBench", 0, tasks(BIGBENCH, "multiple_choice_grade", "nous_")),
        ),
        (
            "The tables were made with a fork of lm-eval of 2023; here lm-eval 0.4.13 asks, whose prompts differ in places.",
            BOS,
            "BigBench takes questions and prompts from hails/bigbench, where the fork brought its own files. logical_deduction and "
            "tracking_shuffled_objects are one set there and are divided by their number of choices, so n can differ.",
            DATA,
        ),
    ),
    "open_llm_v1": Suite(
        "Open LLM Leaderboard v1",
        (
            Benchmark("ARC", 25, tasks("arc_challenge")),
            Benchmark("HellaSwag", 10, tasks("hellaswag")),
            Benchmark("MMLU", 5, tasks(MMLU, "acc", "mmlu_")),
            Benchmark("TruthfulQA", 0, tasks("truthfulqa_mc2", "acc")),
            Benchmark("Winogrande", 5, tasks("winogrande", "acc")),
            Benchmark("GSM8K", 5, (Task("gsm8k", ("exact_match,strict-match",)),)),
        ),
        (
            "The leaderboard ran lm-eval b281b09 of 2023; 0.4.13 draws other examples for ARC, HellaSwag, Winogrande and GSM8K, and "
            "words some prompts otherwise.",
            BOS,
            "GSM8K stops at other texts, and counts an answer only behind the marks ####, as the leaderboard did (lm-eval's strict-match).",
            "MMLU is the plain mean of its 57 subjects, as on the leaderboard; lm-eval's own average weighs them by size.",
            DATA,
        ),
        longest_answer=256,
    ),
    "open_llm_v2": Suite(
        "Open LLM Leaderboard v2",
        (
            Benchmark(
                "IFEval",
                0,
                (Task("leaderboard_ifeval", ("prompt_level_strict_acc,none", "inst_level_strict_acc,none")),),
            ),
            Benchmark("BBH", 3, by_choices(BBH, "leaderboard_bbh_")),
            Benchmark(
                "MATH Lvl 5",
                4,
                tuple(Task(f"leaderboard_math_{name}_hard", ("exact_match,none",)) for name in MATH.split()),
                pooled=True,
            ),
            Benchmark("GPQA", 0, tasks("diamond extended main", "acc_norm", "leaderboard_gpqa_", 1 / 4), pooled=True),
            Benchmark("MuSR", 0, by_choices(MUSR, "leaderboard_musr_")),
            Benchmark("MMLU-Pro", 5, tasks("leaderboard_mmlu_pro", "acc", chance=1 / 10)),
        ),
        (
            "The chat template is used, with examples as turns, as the leaderboard did for models submitted as chat models; for others it "
            "did not.",
            "MATH is graded by math-verify, as on the leaderboard since February 2025; scores from before are lower. It gives an answer up "
            "after 5 seconds of the clock, so that a slow or busy machine can miss one.",
            "The order of GPQA's choices is another draw of the same shuffle. langdetect, which IFEval asks, is given a seed here.",
            "The leaderboard's batches were of another size.",
            DATA,
        ),
        longest_answer=1280,
        chat=True,
    ),
}


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
    return score | {
        "score": max(0.0, (score["score"] - chance) / (1 - chance)),
        "stderr": score["stderr"] / (1 - chance),
    }


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
    """What data/evaluation/suites.json says of one suite: the scores of every model, its benchmarks and its tasks.

    Args:
        suite: one of `SUITES`.
        results: for each model the result of each run (hermes/evaluation/run_benchmarks.py).
    """
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
