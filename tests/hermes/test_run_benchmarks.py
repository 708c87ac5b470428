"""Real tasks of lm-eval end to end, on data of their shape in folders of their data sets' names."""

import contextlib
import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import nltk
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hermes.console import UserError
from hermes.evaluation import benchmarks, run_benchmarks, suite_tasks, suites, vllm_chat
from hermes.evaluation.benchmarks import Benchmark, Run, Suite, Task
from hermes.evaluation.chat_models import ChatModel, GgufChat, HuggingFaceChat, opened
from hermes.evaluation.run_benchmarks import SuiteModel
from hermes.model.base import load
from hermes.model.gguf import GgufModel
from hermes.params import read_yaml
from hermes.settings.evaluate import Batching, EvaluateSettings
from stages import evaluate, fetch_data, subset
from tests.conftest import write_llama_for_vllm
from tests.hermes.test_benchmarks import config
from tests.test_graph import MODULES, file_of, imports

ROOT = Path(__file__).parents[2]
Opened = Callable[[], AbstractContextManager[ChatModel]]
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")


def data_set(path: str, name: str, splits: dict[str, list[dict[str, Any]]]) -> None:
    """Writes a data set that `load_dataset(path, name)` finds in the working directory before it asks the Hub."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for split, rows in splits.items():
        (folder / f"{name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append({"split": split, "path": f"{name}-{split}.jsonl"})
    card = yaml.safe_dump({"configs": [{"config_name": name, "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{card}---\n")


def write_arc() -> None:
    """A small ARC in the working directory."""
    arc = [
        {
            "id": str(i),
            "question": f"Which number follows {i}?",
            "choices": {"text": [NUMBERS[i], "none at all", NUMBERS[i - 1]], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[i % 3],
        }
        for i in range(8)
    ]
    data_set("allenai/ai2_arc", "ARC-Challenge", {"train": arc[:4], "validation": arc[:1], "test": arc[3:]})


@pytest.fixture
def data(tmp_path: Path, manager: TaskManager, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with small data sets of every kind of task; the index of tasks, which takes seconds, is read once."""
    monkeypatch.setattr(suite_tasks, "task_manager", lambda: manager)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_arc()
    winogrande = [
        {"sentence": f"The {word} did not fit the box, as _ was large.", "option1": f"the {word}", "option2": "the box"}
        | {"answer": str(1 + i % 2)}
        for i, word in enumerate(NUMBERS)
    ]
    data_set("allenai/winogrande", "winogrande_xl", {"train": winogrande[:4], "validation": winogrande[4:]})
    truthful = [
        {"question": f"What is {word}?"}
        | {f"mc{i}_targets": {"choices": list(NUMBERS), "labels": [1, 1, 0, 0, 0, 0, 0, 0]} for i in (1, 2)}
        for word in NUMBERS[:3]
    ]
    data_set("truthfulqa/truthful_qa", "multiple_choice", {"validation": truthful})
    shuffled = [
        {
            "inputs": f"Ann and Ben swap balls {count} times. Ann has the",
            "targets": ["red"],
            "multiple_choice_targets": ["blue", "red", "green", "white", "black"][:count],
            "multiple_choice_scores": [0, 1, 0, 0, 0][:count],
        }
        for count in (3, 5, 3, 3, 5)
    ]
    data_set("hails/bigbench", "tracking_shuffled_objects_zero_shot", {"default": shuffled})
    # The last has no number to find, as the answers of a random model have none, and so counts as right.
    sums = [{"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}. #### {2 * i}"} for i in range(7)]
    sums.append({"question": "What is nothing?", "answer": "Nothing. #### [invalid]"})
    data_set("openai/gsm8k", "main", {"train": sums[:6], "test": sums[4:]})
    navigate = [{"input": f"Take {i} steps. Turn around. Are you back?", "target": "No"} for i in range(4)]
    data_set("SaylorTwift/bbh", "navigate", {"test": navigate})
    # A random model writes neither JSON nor the words; these can be graded without a sentence splitter.
    asked = [
        (["keywords:forbidden_words", "detectable_format:json_format"], [{"forbidden_words": ["kite"]}, {}]),
        (["keywords:forbidden_words"], [{"forbidden_words": ["cloud"]}]),
    ]
    instructions = [
        {"key": i, "prompt": f"Write about {NUMBERS[i]}.", "instruction_id_list": names, "kwargs": kwargs}
        for i, (names, kwargs) in enumerate(asked)
    ]
    data_set("wis-k/instruction-following-eval", "default", {"train": instructions})
    monkeypatch.setattr(nltk.data, "find", lambda name: name)  # the splitter, which lm-eval would download
    return tmp_path


LOCAL = (
    Run("arc_challenge", 2, False),
    Run("winogrande", 2, False),
    Run("truthfulqa_mc2", 0, False),
    Run("nous_tracking_shuffled_objects_three_objects", 0, False),
    Run("gsm8k", 2, False),
    Run("leaderboard_bbh_navigate", 3, True),
    Run("leaderboard_ifeval", 0, True),
    Run("leaderboard_ifeval", 0, False),
)
WRITTEN = {"gsm8k", "leaderboard_ifeval"}
CONTEXT = 1600


@pytest.fixture(scope="module")
def models(tiny_model_folder: Path, gguf_file: Path) -> dict[str, Opened]:
    """The same random weights behind both backends: float32 in Transformers and float16 in llama.cpp."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)

    @contextlib.contextmanager
    def transformers() -> Iterator[ChatModel]:
        yield HuggingFaceChat(load(tiny_model_folder, torch.float32), tokenizer, 8, batch_size=3)

    @contextlib.contextmanager
    def gguf() -> Iterator[ChatModel]:
        with GgufModel(gguf_file, threads=1, slots=4, context=CONTEXT, share_beginning=True) as model:
            yield GgufChat(model, tokenizer, 8)

    return {"transformers": transformers, "gguf": gguf}


def with_short_answers(task: Any) -> Any:
    """The task with answers of at most 24 tokens where it lets the model write."""
    if task.OUTPUT_TYPE == "generate_until":
        task.set_config("generation_kwargs", {"max_gen_toks": 24}, update=True)
    return task


def results(folder: Path) -> dict[Run, dict[str, Any]]:
    return {run: json.loads((folder / f"{run.label}.json").read_text()) for run in LOCAL}


def log(folder: Path, run: Run) -> list[dict[str, Any]]:
    with gzip.open(folder / f"{run.label}.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def test_real_tasks_of_each_kind_give_both_backends_the_same_results(
    data: Path, models: dict[str, Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_task = suite_tasks.load_task
    monkeypatch.setattr(suite_tasks, "load_task", lambda run, manager: with_short_answers(load_task(run, manager)))
    for name, open_model in models.items():
        run_benchmarks.run_all(LOCAL, data / name, open_model, CONTEXT)
    ours, theirs = (results(data / name) for name in models)
    assert {run.task: ours[run]["n"] for run in LOCAL} == {
        "arc_challenge": 5,
        "winogrande": 4,
        "truthfulqa_mc2": 3,
        "nous_tracking_shuffled_objects_three_objects": 3,
        "gsm8k": 4,
        "leaderboard_bbh_navigate": 4,
        "leaderboard_ifeval": 2,
    }
    benchmarks.check_questions({"transformers": ours, "gguf": theirs})
    for run in LOCAL:
        assert ours[run]["truncated"] == theirs[run]["truncated"] == 0
        assert ours[run]["revision"] is None
        left, right = (log(data / name, run) for name in models)
        assert [row["prompt_hash"] for row in left] == [row["prompt_hash"] for row in right]
        for one, other in zip(left, right, strict=True):
            if run.task in WRITTEN:
                assert one["resps"][0][0][:8] == other["resps"][0][0][:8]
            else:
                likelihoods = ([float(resp[0][0]) for resp in row["resps"]] for row in (one, other))
                assert next(likelihoods) == pytest.approx(next(likelihoods), abs=0.05)
        for metric, values in ours[run]["metrics"].items():
            assert theirs[run]["metrics"][metric] == pytest.approx(values, abs=0.02), run
    assert ours[LOCAL[4]]["metrics"]["exact_match,strict-match"] == [0.0, 0.0, 0.0, 1.0]
    in_chat, plain = (ours[run]["metrics"] for run in LOCAL[6:])
    assert in_chat["inst_level_strict_acc,none"] == [0.0, 0.0, 0.0]  # line breaks alone, as the template ends
    assert plain["prompt_level_strict_acc,none"] == [0.0, 1.0]
    assert plain["inst_level_strict_acc,none"] == [1.0, 0.0, 1.0]


def test_questions_of_a_suite_keep_training_pairs_out_that_repeat_them(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through fetch_data and subset, on the data of real tasks."""
    tasks = ("arc_challenge", "winogrande", "gsm8k", "leaderboard_bbh_navigate", "leaderboard_ifeval")
    parts = tuple(Benchmark(name, 0, benchmarks.tasks(name)) for name in tasks)
    monkeypatch.setitem(benchmarks.SUITES, "nous", Suite("Local", parts, ()))
    long = "Which of these numbers follows the number three when one counts on?"
    path = Path("allenai/ai2_arc/ARC-Challenge-test.jsonl")
    path.write_text(path.read_text().replace("Which number follows 3?", long))
    rows = [
        {"question": question, "chosen": chosen, "rejected": "No idea.", "delta_score": score}
        for question, chosen, score in (
            (f"Tell me: {long}", "Four.", 5.0),
            ("Write a sentence.", "The five did not fit the box, as the five was large.", 4.0),
            ("What is 6 and 6?", "Twelve.", 3.0),
            ("What is 60 and 60?", "A hundred and twenty.", 2.0),
        )
    ]
    Path("pairs").mkdir()
    for split in ("train", "validation", "test"):
        Path(f"pairs/{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows[: 4 if split == "train" else 1])
        )
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, name)
    text = Path("params.yaml").read_text()
    text = text.replace("source: embedded", "source: ./pairs", 1).replace(
        "decontaminate: []", "decontaminate: [nous]", 1
    )
    Path("params.yaml").write_text(
        text.replace("k: 2100", "k: 1", 1).replace("drop_evaluation_leaks: true", "drop_evaluation_leaks: false")
    )
    fetch_data.main()
    manifest = json.loads(Path("data/raw/manifest.json").read_text())
    assert {part["task"]: part["questions"] for part in manifest["suites"]} == {
        "arc_challenge": 5,
        "winogrande": 4,
        "gsm8k": 4,
        "leaderboard_bbh_navigate": 4,
        "leaderboard_ifeval": 2,
    }
    subset.main()
    report = json.loads(Path("reports/subset.json").read_text())["train"]
    assert report["removed"] == {"repeats_nous": 3}
    assert report["repeating_rows"] == [
        {"row": i, "task": task} for i, task in enumerate(("arc_challenge", "winogrande", "gsm8k"))
    ]
    assert [row["question"] for row in pq.read_table("data/subset/train.parquet").to_pylist()] == ["What is 60 and 60?"]


def test_text_is_treated_as_by_lm_evals_own_transformers_model(
    data: Path, models: dict[str, Opened], manager: TaskManager
) -> None:
    with models["transformers"]() as chat:
        assert isinstance(chat, HuggingFaceChat)
        stock = HFLM(pretrained=chat.model, tokenizer=chat.tokenizer, batch_size=1, max_length=CONTEXT)
        assert stock.max_gen_toks == run_benchmarks.LONGEST_ANSWER
        for run in LOCAL:
            found = []
            for model in (SuiteModel(chat, CONTEXT), stock):
                task = with_short_answers(suite_tasks.load_task(run, manager))
                found.append(run_benchmarks.run_task(run, task, model))
            (ours, left), (theirs, right) = found
            for one, other in zip(left, right, strict=True):
                if run.task in WRITTEN:
                    assert one["resps"] == other["resps"]
                else:
                    likelihoods = ([float(resp[0][0]) for resp in row["resps"]] for row in (one, other))
                    assert next(likelihoods) == pytest.approx(next(likelihoods), abs=1e-3)
            for metric, values in ours["metrics"].items():
                assert values == pytest.approx(theirs["metrics"][metric], abs=1e-3), run


def test_a_suite_of_local_tasks_has_the_scores_that_lm_eval_gives(
    data: Path, models: dict[str, Opened], manager: TaskManager
) -> None:
    """Against lm-eval's own aggregation, through the summary that the report shows."""
    run_benchmarks.run_all(LOCAL[:4], data / "out", models["transformers"], CONTEXT)
    metrics = ("acc_norm", "acc", "acc", "multiple_choice_grade")
    parts = tuple(
        Benchmark(run.task, run.shots, (Task(run.task, (f"{metric},none",)),))
        for run, metric in zip(LOCAL, metrics, strict=False)
    )
    found = {run: json.loads((data / f"out/{run.label}.json").read_text()) for run in LOCAL[:4]}
    summary = benchmarks.summary(Suite("local", parts, ()), {"base": found})
    for run, metric in zip(LOCAL, metrics, strict=False):
        with models["transformers"]() as chat:
            task = suite_tasks.load_task(run, manager)
            theirs = run_benchmarks.evaluate(
                lm=SuiteModel(chat, CONTEXT),
                task_dict={"tasks": {run.task: task}, "groups": {}, "group_map": {}},
                bootstrap_iters=100,
            )["results"][run.task]
        score = summary["models"]["base"]["benchmarks"][run.task]
        assert score["score"] == pytest.approx(theirs[f"{metric},none"])
        assert score["stderr"] == pytest.approx(theirs[f"{metric}_stderr,none"])


def test_a_killed_run_goes_on_with_the_next_task_and_ends_with_the_same_bits(
    data: Path, models: dict[str, Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    run_task = run_benchmarks.run_task

    def interrupted(run: Run, *arguments: Any) -> Any:
        if len(asked) == 1:
            raise KeyboardInterrupt
        asked.append(run.task)
        return run_task(run, *arguments)

    wanted = LOCAL[:3]
    monkeypatch.setattr(run_benchmarks, "run_task", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_benchmarks.run_all(wanted, data / "killed", models["gguf"], CONTEXT)
    assert asked == [wanted[0].task]

    def counted(run: Run, *arguments: Any) -> Any:
        asked.append(run.task)
        return run_task(run, *arguments)

    monkeypatch.setattr(run_benchmarks, "run_task", counted)
    run_benchmarks.run_all(wanted, data / "killed", models["gguf"], CONTEXT)
    assert asked == [run.task for run in wanted]
    run_benchmarks.run_all(wanted, data / "killed", models["gguf"], CONTEXT)
    assert asked == [run.task for run in wanted]
    monkeypatch.setattr(run_benchmarks, "run_task", run_task)
    run_benchmarks.run_all(wanted, data / "whole", models["gguf"], CONTEXT)
    files = {path.name: path.read_bytes() for path in (data / "killed").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (data / "whole").iterdir()}
    assert len(files) == 2 * len(wanted)


def test_the_stage_writes_scores_and_logs_of_every_model(
    data: Path, tiny_model_folder: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = (
        Benchmark("ARC", 2, benchmarks.tasks("arc_challenge")),
        Benchmark("TruthfulQA", 0, benchmarks.tasks("truthfulqa_mc2", "acc")),
    )
    monkeypatch.setitem(benchmarks.SUITES, "nous", Suite("Local", parts, ("everywhere",)))
    Path("models/gguf").mkdir(parents=True)
    Path("models/base").symlink_to(tiny_model_folder)
    Path("models/gguf/f16.gguf").symlink_to(gguf_file)
    paths = {name: evaluate.path_of(name) for name in ("base", "f16")}
    section = read_yaml(ROOT / "params.yaml")["profiles"]["cpu"]["evaluate"]
    settings = EvaluateSettings(**section | {"suites": ["nous"], "suite_types": "all", "types": ["f16"], "slots": 4})
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    open_model = partial(opened, batching=settings, tokenizer=tokenizer, dtype=torch.float32)
    for number in range(2):  # as two processes do; then nothing is left to ask
        half = suites.ask(settings, torch.float32, open_model, paths, share=(number, 2))
        assert all(len([*folder.glob("*.json")]) == number + 1 for folder in half.values())
    folders = suites.ask(settings, torch.float32, lambda path: pytest.fail(f"{path} is asked again"), paths)
    suites.write(settings, folders, data / "out")
    written = json.loads((data / "out/suites.json").read_text())["nous"]
    assert written["title"] == "Local"
    assert set(written["models"]) == {"base", "f16"}
    assert written["models"]["f16"]["average"]["n"] == 5 + 3
    labels = ("arc_challenge-2-shot", "truthfulqa_mc2-0-shot")
    wanted = {f"{label}.{ending}" for label in labels for ending in ("json", "jsonl.gz")}
    assert all({path.name for path in (data / "out/suites" / name).iterdir()} == wanted for name in ("base", "f16"))
    assert str(data) not in (data / "out/suites.json").read_text()
    assert suites.ask(settings.model_copy(update={"suites": []}), torch.float32, open_model, paths) == {}
    path = folders["f16"] / f"{labels[0]}.json"
    path.write_text(path.read_text().replace('"revision": null', f'"revision": "{"a" * 40}"'))
    with pytest.raises(UserError, match=rf"{labels[0]} asked base 5 .* unknown, f16 5 .* of revision a+; delete"):
        suites.ask(settings, torch.float32, open_model, paths)


def test_what_writes_answers_may_be_another_than_what_scores_choices(data: Path, models: dict[str, Opened]) -> None:
    asked: dict[str, list[str]] = {"scores": [], "writes": []}

    @contextlib.contextmanager
    def opening(what: str) -> Iterator[ChatModel]:
        with models["transformers"]() as chat:
            generate, likelihoods = chat.generate, chat._loglikelihood_tokens
            chat.generate = lambda prompts: asked[what].append("answers") or generate(prompts)  # type: ignore[func-returns-value, method-assign]
            chat._loglikelihood_tokens = lambda *a, **k: asked[what].append("choices") or likelihoods(*a, **k)  # type: ignore[func-returns-value, method-assign]
            yield chat

    wanted = [LOCAL[0], LOCAL[4], LOCAL[2]]
    run_benchmarks.run_all(wanted, data / "two", partial(opening, "scores"), CONTEXT, partial(opening, "writes"))
    assert asked == {"scores": ["choices", "choices"], "writes": ["answers"]}
    run_benchmarks.run_all(wanted, data / "one", models["transformers"], CONTEXT)
    for run in wanted:
        assert (data / f"one/{run.label}.json").read_bytes() == (data / f"two/{run.label}.json").read_bytes()


@pytest.fixture(scope="module")
def vllm_model(tmp_path_factory: pytest.TempPathFactory, embedded_tokenizer: PreTrainedTokenizerBase) -> Path:
    return write_llama_for_vllm(tmp_path_factory.mktemp("vllm"), embedded_tokenizer, torch.float32)


@pytest.mark.slow
@pytest.mark.skipif(not vllm_chat.PYTHON.is_file(), reason="./setup.sh vllm has not run here")
def test_vllm_writes_the_answers_that_transformers_writes(data: Path, vllm_model: Path) -> None:
    """In float32, up to each task's own stops; the second time another model's answers are refused."""
    batching = Batching(max_new_tokens=8, batch_size=3, slots=4, context=CONTEXT, threads=2, engine="vllm")
    tokenizer = AutoTokenizer.from_pretrained(vllm_model)
    written = [run for run in LOCAL if run.task in WRITTEN]
    on_vllm = partial(vllm_chat.written_by_vllm, vllm_model, batching, tokenizer, torch.float32)
    in_transformers = partial(opened, vllm_model, batching, tokenizer, torch.float32)
    run_benchmarks.run_all(written, data / "vllm", in_transformers, CONTEXT, on_vllm)
    run_benchmarks.run_all(written, data / "transformers", in_transformers, CONTEXT)
    for run in written:
        for ending in ("json", "jsonl.gz"):
            name = f"{run.label}.{ending}"
            assert (data / "vllm" / name).read_bytes() == (data / "transformers" / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.skipif(not vllm_chat.PYTHON.is_file(), reason="./setup.sh vllm has not run here")
def test_answers_of_vllm_that_transformers_would_not_write_are_refused(
    tmp_path: Path, vllm_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batching = Batching(max_new_tokens=8, batch_size=3, slots=4, context=200, threads=2, engine="vllm")
    tokenizer = AutoTokenizer.from_pretrained(vllm_model)
    other = load(vllm_model, torch.float32)
    torch.nn.init.normal_(other.get_parameter("model.layers.0.mlp.down_proj.weight"), std=0.5)
    other.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(vllm_chat, "load", lambda folder, dtype: load(tmp_path / "other", dtype))
    with vllm_chat.written_by_vllm(vllm_model, batching, tokenizer, torch.float32) as chat:
        with pytest.raises(
            UserError, match=r"vLLM writes tokens that are .* nats behind the likeliest one of Transformers"
        ):
            chat.generate([[5, 6, 7], [8, 9]])
        chat.process.kill()
        with pytest.raises(UserError, match=r"vLLM does not run it"):
            chat.ask([[5]], 1)
        assert members(chat.process.pid)  # which outlive it
    assert not psutil.wait_procs(members(chat.process.pid), timeout=10)[1]


def members(group: int) -> list[psutil.Process]:
    """The processes of a process group, but for those that have ended."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_without_vllm_its_engine_is_refused_in_one_line(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_chat, "PYTHON", Path("nowhere/python"))
    batching = Batching(max_new_tokens=8, batch_size=3, slots=4, context=200, threads=2, engine="vllm")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    with (
        pytest.raises(UserError, match=r"nowhere/python: no such file, .* \./setup\.sh vllm$"),
        vllm_chat.written_by_vllm(tiny_model_folder, batching, tokenizer, torch.float32),
    ):
        pass


def test_the_folder_of_results_changes_with_all_that_shapes_them_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("dvc.yaml", "packages.yaml", "requirements-math.lock", "requirements-vllm.lock"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("hermes", "stages"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(run_benchmarks, "ROOT", tmp_path)
    model = tmp_path / "model.gguf"
    model.write_bytes(b"weights")
    batching = Batching(max_new_tokens=8, batch_size=4, slots=4, context=64, threads=1, engine="transformers")
    settings = EvaluateSettings(**read_yaml(ROOT / "params.yaml")["profiles"]["cpu"]["evaluate"])
    found = {run_benchmarks.folder_name(model, batching, torch.float32)}

    def changes() -> bool:
        """Whether there is another name than all before."""
        before = len(found)
        found.add(run_benchmarks.folder_name(model, batching, torch.float32))
        return len(found) > before

    def edited(file: str, old: str = "", new: str = "# edited\n") -> bool:
        text = (tmp_path / file).read_text()
        assert old in text
        (tmp_path / file).write_text(text.replace(old, new, 1) if old else text + new)
        return changes()

    assert not changes()
    for module in run_benchmarks.CODE:
        assert edited(f"hermes/{module}.py"), module
    assert edited("hermes/evaluation/tasks/nous/bigbench.py")
    assert edited("hermes/evaluation/tasks/nous/_bigbench_yaml")
    assert edited("requirements-math.lock", "math-verify==", "math-verify==1")
    for package in ("lm_eval", "torch", "llama-cpp-python"):
        assert edited("packages.yaml", f'{package}: "', f'{package}: "1'), package
    assert edited("dvc.yaml", "langdetect, llama-cpp-python", "llama-cpp-python")
    model.write_bytes(b"others")
    assert changes()
    for key in ("batch_size", "slots", "context", "threads", "engine"):
        batching = batching.model_copy(update={key: 99})
        assert changes(), key

    monkeypatch.setattr(run_benchmarks, "device_name", lambda: "another GPU")
    assert changes()

    batching = batching.model_copy(update={"max_new_tokens": 9})
    assert not changes()
    others = (
        "hermes/evaluation/benchmarks",
        "hermes/evaluation/intervals",
        "hermes/evaluation/suites",
        "hermes/instructions/kinds",
        "stages/evaluate",
    )
    for module in others:
        assert not edited(f"{module}.py"), module
    assert not edited("packages.yaml", 'matplotlib: "', 'matplotlib: "1')
    assert not edited("hermes/evaluation/tasks/instructions.yaml")
    asked = settings.model_copy(update={"suites": ["nous"], "types": ["f16"], "split": "validation"})
    assert run_benchmarks.folder_name(model, asked, torch.float32) == run_benchmarks.folder_name(
        model, settings, torch.float32
    )


def test_the_modules_that_shape_results_import_no_other_that_does() -> None:
    """Those left out read, write, check or say something; a module that is new among the imports is to be put on either list."""
    names = (
        "artifacts",
        "console",
        "evaluation/benchmarks",
        "hub",
        "params",
        "settings/base",
        "settings/evaluate",
        "shortage",
    )
    left_out = {f"hermes/{name}.py" for name in names}
    shaping = {f"hermes/{name}.py" for name in run_benchmarks.CODE}
    imported = {file_of(name) for file in shaping for name in imports(MODULES[file])} & MODULES.keys()
    engines = {
        f"hermes/evaluation/{name}.py" for name in ("run_benchmarks", "vllm_chat")
    }  # which the stage gives each other
    assert imported | engines == left_out | shaping


@pytest.mark.parametrize("backend", ["transformers", "gguf"])
def test_an_answer_ends_before_the_tasks_stop_and_is_not_computed_further(
    backend: str, models: dict[str, Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    with models[backend]() as chat:
        model, decode = SuiteModel(chat, CONTEXT), chat.tokenizer.decode

        def answer(until: list[str]) -> tuple[str, list[int]]:
            generate, computed = chat.generate, []

            def seen(prompts: list[list[int]]) -> list[list[int]]:
                computed.extend(generate(prompts))
                return computed

            monkeypatch.setattr(chat, "generate", seen)
            options = {"until": until, "do_sample": False, "max_gen_toks": 30}
            request = Instance("generate_until", {}, ("Tell me about kites.", options), 0)
            (text,) = model.generate_until([request])
            monkeypatch.undo()
            return text, computed[0]

        whole, ids = answer([])
        assert len(ids) == 30
        stop = str(decode(ids[5:8]))
        length = next(count for count in range(1, 30) if stop in decode(ids[:count]))
        assert 1 < length < 10
        assert answer([stop, "is never written"]) == (whole.split(stop)[0], ids[:length])


def test_a_prompt_that_is_too_long_keeps_its_end_and_is_counted(models: dict[str, Opened]) -> None:
    with models["transformers"]() as chat:
        model = SuiteModel(chat, context=20)
        long, short = list(range(5, 35)), list(range(5, 10))
        found = model._loglikelihood_tokens([(("", ""), long, [3, 4]), (("", ""), short, [3])])
        expected = chat._loglikelihood_tokens([(("", ""), long[-18:], [3, 4]), (("", ""), short, [3])])
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected])
        assert model.truncated == 1
        with pytest.raises(UserError, match=r"`evaluate\.context` \(20\) leaves no room beside an answer of 20 tokens"):
            model.fitting(short, 20)


def test_a_plain_prompt_gets_the_beginning_of_sequence_token_once(byte_tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    bos = (byte_tokenizer.bos_token, byte_tokenizer.bos_token_id)
    byte_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    model = SuiteModel(HuggingFaceChat(torch.nn.Identity(), byte_tokenizer, 8, 1), 100)  # type: ignore[arg-type]
    context, answer = model._encode_pair("Q: two?\nA:", " 2")
    assert context == [bos[1], *byte_tokenizer("Q: two?\nA:", add_special_tokens=False)["input_ids"]]
    assert answer == byte_tokenizer(" 2", add_special_tokens=False)["input_ids"]  # and no end token
    assert model.tok_encode(f"{bos[0]}user")[:2] == [bos[1], byte_tokenizer.convert_tokens_to_ids("u")]


def test_data_sets_are_read_at_the_commits_that_are_listed(
    data: Path, manager: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, str | None] = {}
    whole = datasets.load_dataset

    def seen(path: str, *arguments: Any, **options: Any) -> Any:
        asked[path] = options["revision"]
        return whole(path, *arguments, **options)

    monkeypatch.setattr(suite_tasks, "load_dataset", seen)
    suite_tasks.load_task(Run("arc_challenge", 0, False), manager)
    assert asked == {"allenai/ai2_arc": suite_tasks.REVISIONS["allenai/ai2_arc"]}
    assert re.fullmatch("[0-9a-f]{40}", asked["allenai/ai2_arc"] or "")


def test_without_a_network_a_missing_data_set_is_one_line(
    tmp_path: Path, manager: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"^task openbookqa: allenai/openbookqa@[0-9a-f]{40}: .*check the name, the network"
    ) as error:
        suite_tasks.load_task(Run("openbookqa", 0, False), manager)
    assert "\n" not in str(error.value)


def test_ifeval_without_its_sentence_splitter_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(UserError, match=r"punkt_tab is not here.*~/nltk_data"):
        suite_tasks.prepare_ifeval()


def test_ifeval_grades_an_answer_by_its_instructions(manager: TaskManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk, "download", lambda *_: False)
    grade = config(manager, "leaderboard_ifeval")["process_results"]
    doc = {
        "key": 1,
        "prompt": "Write about rain, without commas, in lowercase.",
        "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"],
        "kwargs": [{}, {}],
    }
    found = {
        answer: grade(doc, [answer]) for answer in ("the rain falls on the roof all day", "The rain falls, all day")
    }
    assert [list(row["inst_level_strict_acc"]) for row in found.values()] == [[True, True], [False, False]]
    samples = [{"filter": "none", "metrics": list(row), **row} for row in found.values()]
    assert run_benchmarks.measured(samples)["inst_level_strict_acc,none"] == [1.0, 1.0, 0.0, 0.0]


def test_a_result_does_not_depend_on_what_ran_before_and_leaves_out_what_the_clock_decides(
    byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawing(task_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        """lm-eval's evaluate with a grade that draws (IFEval) and one of the clock (MATH)."""
        drawn = random.random() + np.random.random() + float(torch.rand(()))
        sample = {"doc_id": 0, "doc": {}, "target": 1, "resps": [], "filtered_resps": [], "filter": "none"}
        sample |= {"doc_hash": "d", "prompt_hash": "p", "metrics": ["acc", "exact_match_original"]}
        return {"samples": {"math": [sample | {"acc": drawn, "exact_match_original": 1}]}}

    class Data:
        dataset: dict[str, Any] = {}  # noqa: RUF012

    monkeypatch.setattr(run_benchmarks, "evaluate", drawing)
    model = SuiteModel(HuggingFaceChat(torch.nn.Identity(), byte_tokenizer, 8, 1), 100)  # type: ignore[arg-type]
    found = []
    for number in range(2):
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)
        found.append(run_benchmarks.run_task(Run("math", 0, False), Data(), model))
    (ours, rows), again = found
    assert again == (ours, rows)
    assert list(ours["metrics"]) == ["acc,none"]
    assert "exact_match_original" not in rows[0]


def test_gpqas_choices_have_an_order_of_their_own_whatever_is_cached(data: Path, manager: TaskManager) -> None:
    wrong = {f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}
    rows = [{"Question": f"Question {i}?", **wrong, "Correct Answer": f"right {i}"} for i in range(8)]
    data_set("Idavidrein/gpqa", "gpqa_main", {"train": rows})
    run = Run("leaderboard_gpqa_main", 0, True)

    def orders(task: Any) -> tuple[list[str], list[str]]:
        """Of the questions as they are asked, and as they are graded."""
        found = list(task.eval_docs), list(task.eval_docs)
        return [doc["answer"] for doc in found[0]], [doc["answer"] for doc in found[1]]

    random.seed(5)
    cached = orders(manager.load([run.task])["tasks"][run.task])  # by another run of lm-eval
    asked, graded = orders(suite_tasks.load_task(run, manager))
    assert asked == graded
    assert asked != cached[0]
    shutil.rmtree(data / "cache")
    assert orders(suite_tasks.load_task(run, manager)) == (asked, graded)


@pytest.mark.skipif(
    not suite_tasks.MATH.is_dir(), reason="what the mathematics tasks need is not installed: ./setup.sh math"
)
@pytest.mark.slow
def test_a_mathematics_task_runs_end_to_end_in_its_environment_on_both_backends(
    tmp_path: Path, tiny_model_folder: Path, gguf_file: Path
) -> None:
    """With the answers of a random model, which are no mathematics, and with one that is right once in two questions."""
    script = r"""
import contextlib, gzip, json, sys
from pathlib import Path
import datasets, torch
from transformers import AutoTokenizer
datasets.config.HF_DATASETS_CACHE = Path("cache")
from hermes.evaluation import run_benchmarks, suite_tasks
from hermes.evaluation.benchmarks import Run
from hermes.evaluation.chat_models import opened
from hermes.settings.evaluate import Batching
from tests.hermes.test_run_benchmarks import data_set, with_short_answers

rows = [
    {"problem": f"What is half of {i}?", "solution": rf"It is $\boxed{{\frac{{{i}}}{{2}}}}$.", "level": "Level 5"} for i in (1, 3)
]
data_set("DigitalLearningGmbH/MATH-lighteval", "algebra", {"train": rows, "test": [*rows, rows[0] | {"level": "Level 4"}]})
run, load_task = Run("leaderboard_math_algebra_hard", 4, True), suite_tasks.load_task
suite_tasks.load_task = lambda *asked: with_short_answers(load_task(*asked))
batching = Batching(max_new_tokens=8, batch_size=2, slots=4, context=2000, threads=1, engine="transformers")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
half = r"Final Answer: The final answer is $\frac{2}{4}$. I hope it is correct. Problem: What is $3$?"
found = {}
for backend, path in zip(("transformers", "gguf"), map(Path, sys.argv[1:])):
    for answer in ("its own", "a half"):
        folder = Path(backend, answer)
        with opened(path, batching, tokenizer, torch.float32) as chat:
            if answer == "a half":
                chat.generate = lambda prompts: [tokenizer(half)["input_ids"]] * len(prompts)
            run_benchmarks.run_all([run], folder, lambda: contextlib.nullcontext(chat), batching.context)
        found[str(folder)] = json.loads((folder / f"{run.label}.json").read_text())
        with gzip.open(folder / f"{run.label}.jsonl.gz", "rt") as file:
            log = [json.loads(line) for line in file]
        assert not any("Problem:" in row["filtered_resps"][0] or "exact_match_original" in row for row in log)
print(json.dumps(found))
"""
    command = [sys.executable, "-c", script, str(tiny_model_folder), str(gguf_file)]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name: result["metrics"] for name, result in found.items()} == {
        f"{backend}/{answer}": {"exact_match,none": grades}
        for backend in ("transformers", "gguf")
        for answer, grades in (("its own", [0.0, 0.0]), ("a half", [1.0, 0.0]))
    }
    assert {(result["n"], result["truncated"]) for result in found.values()} == {(2, 0)}
    assert len({result["questions"] for result in found.values()}) == 1


def test_mathematics_without_its_packages_says_how_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_tasks, "MATH", Path("nowhere"))
    with pytest.raises(UserError, match=r"nowhere: no such folder.*; run: \./setup\.sh math"):
        suite_tasks.use_math()


def test_vllm_of_one_of_several_processes_sees_its_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "x",
        "HOME": "/h",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    found = vllm_chat.variables(2, gpus=2)
    assert (found["CUDA_VISIBLE_DEVICES"], found["OMP_NUM_THREADS"], found["HOME"]) == ("6", "2", "/h")
    assert not {"RANK", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & found.keys()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert vllm_chat.variables(2, gpus=2)["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES" not in vllm_chat.variables(2, gpus=0)
