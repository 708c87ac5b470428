"""The benchmark suites: every task of lm-eval that they name, and the arithmetic of the tables."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nltk
import pytest
from lm_eval.config.task import TaskConfig
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml

from hermes import params
from hermes.console import UserError
from hermes.evaluation import benchmarks, run_benchmarks, suite_tasks
from hermes.evaluation.benchmarks import SUITES, Benchmark, Run, Suite
from hermes.params import read_yaml
from hermes.settings.evaluate import EvaluateSettings

ROOT = Path(__file__).parents[2]
RUNS = benchmarks.runs(list(SUITES))


def config(manager: TaskManager, task: str) -> dict[str, Any]:
    """The configuration of a task, its functions imported."""
    path = manager.task_index[task].yaml_path
    assert path is not None
    return dict(load_yaml(path, resolve_func=True))


def members(manager: TaskManager, name: str) -> set[str]:
    """The tasks of a group or tag of lm-eval."""
    entry = manager.task_index[name]
    if entry.kind == Kind.TAG:
        return set(entry.tags)
    if entry.kind == Kind.GROUP:
        return {task for part in (entry.cfg or {})["task"] for task in members(manager, part)}
    return {name}


@pytest.mark.parametrize("task", sorted({run.task for run in RUNS if not benchmarks.needs_math(run.task)}))
def test_every_task_imports_and_has_the_metrics_that_count(
    task: str, manager: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nltk, "download", lambda *_: False)  # IFEval's module asks for it when it is imported
    found = TaskConfig(**{key: value for key, value in config(manager, task).items() if key not in ("tag", "group")})
    assert found.output_type in {"multiple_choice", "generate_until"}
    assert found.dataset_path in suite_tasks.REVISIONS
    filters = {entry["name"] for entry in found.filter_list or [{"name": "none"}]}
    metrics = {f"{entry['metric']},{name}" for entry in found.metric_list or () for name in filters}
    counted = {
        metric
        for suite in SUITES.values()
        for _, other, run in suite.runs()
        if run.task == task
        for metric in other.metrics
    }
    assert counted <= metrics


# The counted metrics of a benchmark's tasks, or those of single tasks; and whether the benchmark is pooled.
COUNTED: dict[str, dict[str, tuple[str | dict[str, str], bool]]] = {
    "nous": {
        "AGIEval": ("acc_norm,none", False),
        "GPT4All": (
            {
                "arc_challenge": "acc_norm,none",
                "arc_easy": "acc_norm,none",
                "hellaswag": "acc_norm,none",
                "openbookqa": "acc_norm,none",
                "piqa": "acc_norm,none",
                "boolq": "acc,none",
                "winogrande": "acc,none",
            },
            False,
        ),
        "TruthfulQA": ("acc,none", False),
        "BigBench": ("multiple_choice_grade,none", False),
    },
    "open_llm_v1": {
        "ARC": ("acc_norm,none", False),
        "HellaSwag": ("acc_norm,none", False),
        "MMLU": ("acc,none", False),
        "TruthfulQA": ("acc,none", False),
        "Winogrande": ("acc,none", False),
        "GSM8K": ("exact_match,strict-match", False),
    },
    "open_llm_v2": {
        "IFEval": ("prompt_level_strict_acc,none inst_level_strict_acc,none", False),
        "BBH": ("acc_norm,none", False),
        "MATH Lvl 5": ("exact_match,none", True),
        "GPQA": ("acc_norm,none", True),
        "MuSR": ("acc_norm,none", False),
        "MMLU-Pro": ("acc,none", False),
    },
}


@pytest.mark.parametrize("name", SUITES)
def test_the_metrics_that_count_are_those_of_the_historic_tables(name: benchmarks.SuiteName) -> None:
    assert [part.title for part in SUITES[name].benchmarks] == list(COUNTED[name])
    for part in SUITES[name].benchmarks:
        wanted, pooled = COUNTED[name][part.title]
        by_task = wanted if isinstance(wanted, dict) else {task.name: wanted for task in part.tasks}
        assert {task.name: " ".join(task.metrics) for task in part.tasks} == by_task
        assert part.pooled is pooled, part.title


def test_a_suites_longest_answer_is_that_of_its_tasks(manager: TaskManager) -> None:
    for suite in SUITES.values():
        longest = [0]
        for _, _, run in suite.runs():
            path = manager.task_index[run.task].yaml_path
            assert path is not None
            found = load_yaml(path, resolve_func=False)
            if found["output_type"] == "generate_until":
                longest.append(found["generation_kwargs"].get("max_gen_toks", run_benchmarks.LONGEST_ANSWER))
        assert suite.longest_answer == max(longest), suite.title


@pytest.mark.skipif(
    not suite_tasks.MATH.is_dir(), reason="what the mathematics tasks need is not installed: ./setup.sh math"
)
@pytest.mark.slow
def test_every_mathematics_task_imports_and_grades_in_its_environment() -> None:
    script = r"""
from hermes.evaluation import benchmarks, suite_tasks
suite_tasks.use_math()
from importlib.metadata import version
from lm_eval.tasks._yaml_loader import load_yaml
manager, count = suite_tasks.task_manager(), 0
doc = {"problem": "?", "solution": r"So it is $\boxed{\frac{1}{2}}$.", "answer": r"\frac{1}{2}"}
answers = {r"$\frac{2}{4}$": 1, "$3$": 0}
for run in benchmarks.runs(["open_llm_v2"]):
    if benchmarks.needs_math(run.task):
        grade = load_yaml(manager.task_index[run.task].yaml_path, resolve_func=True)["process_results"]
        for answer, wanted in answers.items():
            found = grade(doc, [f"Final Answer: The final answer is {answer}. I hope it is correct."])
            assert found == {"exact_match": wanted, "exact_match_original": wanted}, (answer, found)
        count += 1
print(count, version("antlr4-python3-runtime"))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["7", "4.11.0"], done.stderr


@pytest.mark.parametrize(
    ("suite", "title", "group"),
    [
        ("nous", "AGIEval", "agieval_nous"),
        ("open_llm_v1", "MMLU", "mmlu"),
        ("open_llm_v2", "BBH", "leaderboard_bbh"),
        ("open_llm_v2", "MATH Lvl 5", "leaderboard_math_hard"),
        ("open_llm_v2", "GPQA", "leaderboard_gpqa"),
        ("open_llm_v2", "MuSR", "leaderboard_musr"),
    ],
)
def test_a_benchmark_has_the_tasks_of_lm_evals_group(
    suite: benchmarks.SuiteName, title: str, group: str, manager: TaskManager
) -> None:
    (found,) = (part for part in SUITES[suite].benchmarks if part.title == title)
    assert {task.name for task in found.tasks} == members(manager, group)


def test_chance_is_one_in_the_choices_of_a_task(manager: TaskManager) -> None:
    checked = 0
    for _, task, run in SUITES["open_llm_v2"].runs():
        choices = (
            {} if benchmarks.needs_math(run.task) else (manager.task_index[run.task].cfg or {}).get("doc_to_choice")
        )
        if isinstance(choices, list):
            assert task.chance == 1 / len(choices), task.name
            checked += 1
    assert checked == 24 + 3  # BBH and GPQA; MuSR and MMLU-Pro take theirs from the questions
    (pro,) = SUITES["open_llm_v2"].benchmarks[-1].tasks
    assert (pro.name, pro.chance) == ("leaderboard_mmlu_pro", 0.1)


def test_bigbench_of_nous_has_18_subtasks_graded_by_the_likeliest_choice() -> None:
    (found,) = (part for part in SUITES["nous"].benchmarks if part.title == "BigBench")
    assert len(found.tasks) == 18
    grade = load_yaml(ROOT / "hermes/evaluation/tasks/nous/snarks.yaml", resolve_func=True)["process_results"]
    doc = {"multiple_choice_targets": ["a", "b", "c"], "multiple_choice_scores": [1, 0, 0]}
    assert grade(doc, [(-3.0, False), (-1.0, False), (-2.0, True)]) == {"multiple_choice_grade": 0.0}
    assert grade(doc, [(-1.0, False), (-3.0, False), (-2.0, True)]) == {"multiple_choice_grade": 1.0}


def result(metrics: dict[str, list[float]], revision: str | None = None) -> dict[str, Any]:
    n = len(next(iter(metrics.values())))
    return {"n": n, "metrics": metrics, "truncated": 0, "revision": revision, "questions": "0" * 64}


def test_scores_go_from_chance_to_one_and_never_below_zero() -> None:
    score = {"score": 0.625, "stderr": 0.03, "n": 250}
    assert benchmarks.from_chance(score, 0.25) == pytest.approx({"score": 0.5, "stderr": 0.04, "n": 250})
    assert benchmarks.from_chance(score | {"score": 0.2}, 0.25)["score"] == 0.0
    assert benchmarks.from_chance(score, 0.0) == score


def test_a_normalized_benchmark_is_the_mean_of_normalized_tasks_and_a_pooled_one_is_normalized_as_a_whole() -> None:
    """MuSR and GPQA as the leaderboard's documentation computes them; the numbers by hand."""
    parts = {part.title: part for part in SUITES["open_llm_v2"].benchmarks}
    chances = {task.name.removeprefix("leaderboard_musr_"): task.chance for task in parts["MuSR"].tasks}
    assert chances == {"murder_mysteries": 0.5, "object_placements": 0.2, "team_allocation": 1 / 3}
    raw = {"murder_mysteries": 0.6, "object_placements": 0.36, "team_allocation": 0.3}  # 0.2, 0.2 and, below chance, 0
    scores = [{"score": raw[name], "stderr": 0.03, "n": 250.0} for name in chances]
    found = benchmarks.benchmark_score(parts["MuSR"], scores)
    assert found["score"] == pytest.approx(0.4 / 3)
    assert found["n"] == 750
    assert found["stderr"] == pytest.approx(((0.06**2 + 0.0375**2 + 0.045**2) ** 0.5) / 3)
    gpqa = [{"score": s, "stderr": 0.0, "n": n} for s, n in ((0.20, 198.0), (0.30, 546.0), (0.40, 448.0))]
    pooled = (0.20 * 198 + 0.30 * 546 + 0.40 * 448) / 1192
    assert benchmarks.benchmark_score(parts["GPQA"], gpqa)["score"] == pytest.approx((pooled - 0.25) / 0.75)


def test_ifeval_is_the_mean_of_its_two_strict_accuracies() -> None:
    task = SUITES["open_llm_v2"].benchmarks[0].tasks[0]
    values = {"prompt_level_strict_acc,none": [1.0, 0.0, 0.0, 0.0], "inst_level_strict_acc,none": [1.0] * 6}
    # 0.25 with a standard error of 0.25, and 1 without one.
    assert benchmarks.raw_score(task, result(values)) == pytest.approx({"score": 0.625, "stderr": 0.125, "n": 4})


def test_the_nous_average_is_the_plain_mean_of_four_plain_means() -> None:
    suite = SUITES["nous"]
    means = {"AGIEval": 0.3, "GPT4All": 0.7, "TruthfulQA": 0.5, "BigBench": 0.4}
    found = {}
    for part, task, run in suite.runs():
        first = task is part.tasks[0] and len(part.tasks) > 1
        # One task of a benchmark is 0.1 too high, another as much too low, with other numbers of questions.
        shift = 0.1 if first else -0.1 if len(part.tasks) > 1 and task is part.tasks[1] else 0.0
        found[run] = result({task.metrics[0]: [means[part.title] + shift] * (2000 if first else 10)})
    summary = benchmarks.summary(suite, {"base": found, "merged": found})
    assert {name: row["score"] for name, row in summary["models"]["base"]["benchmarks"].items()} == pytest.approx(means)
    assert summary["models"]["merged"]["average"]["score"] == pytest.approx(0.475)
    assert [row["scores"]["base"]["n"] for row in summary["tasks"][:2]] == [2000, 10]
    json.dumps(summary, allow_nan=False)


def test_a_gain_is_paired_by_question_and_measured_from_chance() -> None:
    suite = Suite(
        "Local",
        (Benchmark("MuSR", 0, benchmarks.tasks("one", choices=2)), Benchmark("ARC", 0, benchmarks.tasks("two"))),
        (),
    )
    before, after = ([0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0]), ([1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0])
    found = {
        name: {run: result({"acc_norm,none": values}) for (_, _, run), values in zip(suite.runs(), both, strict=True)}
        for name, both in (("base", before), ("merged", after))
    }
    models = benchmarks.summary(suite, found)["models"]
    assert models["base"]["gain"] is None
    # Differences 1, 0, 0, 0 of both: mean 0.25, standard error 0.25; the first counts twice from chance.
    half = 1.96 * (0.5**2 + 0.25**2) ** 0.5 / 2
    wanted = {"points": 37.5, "low": 37.5 - 100 * half, "high": 37.5 + 100 * half, "n": 8}
    assert models["merged"]["gain"] == pytest.approx(wanted)
    changed = models["merged"]["average"]["score"] - models["base"]["average"]["score"]
    assert 100 * changed == pytest.approx(37.5)


def test_results_on_other_questions_are_refused_with_what_to_delete() -> None:
    runs = [Run("arc_challenge", 25, False), Run("leaderboard_ifeval", 0, True)]
    base = {run: result({"acc,none": [0.0, 1.0]}, "a" * 40) for run in runs}
    benchmarks.check_questions({})
    benchmarks.check_questions({"base": base, "merged": base})
    for changed in (
        {"revision": "b" * 40},
        {"n": 3},
        {"questions": "1" * 64},
    ):
        merged = base | {runs[1]: base[runs[1]] | changed}
        with pytest.raises(
            UserError, match=r"leaderboard_ifeval-0-shot-chat asked base 2 questions \(00000000\)"
        ) as error:
            benchmarks.check_questions({"base": base, "merged": merged})
        text = str(error.value)
        assert text.endswith("delete .scratch/suites/*/leaderboard_ifeval-0-shot-chat.json and run this again")
        wanted = {"n": 2, "revision": "a" * 40, "questions": "0" * 64} | changed
        said = f"merged {wanted['n']} questions ({str(wanted['questions'])[:8]}) of revision {wanted['revision']}"
        assert said in text
        assert "arc_challenge" not in text
        assert "\n" not in text


def test_every_suite_says_where_it_differs_and_v1_and_v2_have_the_leaderboards_examples() -> None:
    shots = {name: {part.title: part.shots for part in suite.benchmarks} for name, suite in SUITES.items()}
    assert shots["open_llm_v1"] == {"ARC": 25, "HellaSwag": 10, "MMLU": 5, "TruthfulQA": 0, "Winogrande": 5, "GSM8K": 5}
    assert shots["open_llm_v2"] == {"IFEval": 0, "BBH": 3, "MATH Lvl 5": 4, "GPQA": 0, "MuSR": 0, "MMLU-Pro": 5}
    assert set(shots["nous"].values()) == {0}
    assert all(len(suite.differs) >= 3 for suite in SUITES.values())


def test_an_unknown_suite_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    class Params(params.Params):
        evaluate: EvaluateSettings

    text = (ROOT / "params.yaml").read_text().replace("suites: []", "suites: [nous, openllm]", 1)
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError, match=r"evaluate\.suites\.1` is 'openllm'.*'nous', 'open_llm_v1' or 'open_llm_v2'"):
        params.load(Params, tmp_path / "params.yaml")


@pytest.mark.parametrize(("suite", "longest"), [("open_llm_v1", 256), ("open_llm_v2", 1280)])
def test_a_context_without_room_beside_a_suites_answers_is_refused_before_anything_is_loaded(
    suite: benchmarks.SuiteName, longest: int
) -> None:
    section = read_yaml(ROOT / "params.yaml")["profiles"]["a40"]["evaluate"] | {"suites": [suite], "max_new_tokens": 64}
    assert EvaluateSettings(**section | {"context": longest + 1}).context == longest + 1
    with pytest.raises(ValueError, match=rf"`{suite}` \({longest} tokens\) leaves no room .* `context` \({longest}\)"):
        EvaluateSettings(**section | {"context": longest})
    with pytest.raises(ValueError, match=r"`max_new_tokens` \(64 tokens\) leaves no room .* `context` \(64\)"):
        EvaluateSettings(**section | {"context": 64, "suites": []})


def test_the_default_profile_asks_for_no_suite() -> None:
    profiles = read_yaml(ROOT / "params.yaml")["profiles"]
    assert profiles["cpu"]["evaluate"]["suites"] == []
