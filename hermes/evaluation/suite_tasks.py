"""The tasks of lm-eval that suites name, with their data from the Hub.

The mathematics tasks are graded with antlr4 4.11, which DVC cannot live with. These packages lie in a folder of their own, .venv/math
(requirements-math.lock, `./setup.sh math`). It goes before .venv only in the process of a stage that has such a task.
"""

import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import lm_eval.tasks
import numpy as np
import torch
from datasets import disable_caching, enable_caching, load_dataset
from datasets.exceptions import DatasetsError
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager

from hermes import hub
from hermes.console import UserError
from hermes.evaluation.benchmarks import Run, SuiteName, needs_math, runs
from hermes.params import read_yaml

NOUS = Path(__file__).parent / "tasks/nous"
# Where the suites' tasks are; lm-eval reads every file of a folder, and all of its own take half a minute.
FOLDERS = "agieval arc gsm8k hellaswag leaderboard mmlu/default openbookqa piqa super_glue/boolq truthfulqa winogrande"
MATH = Path(sys.prefix) / "math"
REVISIONS: dict[str, str | None] = read_yaml(Path(__file__).with_name("revisions.yaml"))


def load_pinned(path: str, *arguments: Any, **options: Any) -> Any:
    """`datasets.load_dataset` at the commit that revisions.yaml has of this data set, if any."""
    return load_dataset(path, *arguments, **{"revision": REVISIONS.get(path)} | options)


def task_manager() -> TaskManager:
    """lm-eval's list of the tasks that suites name."""
    theirs = Path(lm_eval.tasks.__file__).parent
    return TaskManager(include_path=[NOUS, *(theirs / name for name in FOLDERS.split())], include_defaults=False)


def use_math() -> None:
    """Puts the packages of the mathematics tasks before those of .venv, in this process.

    Raises:
        UserError: they are not installed.
    """
    if not MATH.is_dir():
        raise UserError(
            f"{MATH}: no such folder, with which the tasks leaderboard_math are graded; run: ./setup.sh math"
        )
    sys.path.insert(0, str(MATH))


def prepare_ifeval() -> None:
    """Makes IFEval's language detection repeatable, and makes sure that what it splits sentences with has arrived.

    Raises:
        UserError: lm-eval could not download that.
    """
    import langdetect
    import nltk

    langdetect.DetectorFactory.seed = 0
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        raise UserError(
            "leaderboard_ifeval: NLTK's punkt_tab is not here and cannot be downloaded; check the network, "
            "or unpack it to ~/nltk_data/tokenizers"
        ) from None


def seed() -> None:
    """Seeds what tasks draw with: GPQA shuffles its choices when it is loaded, IFEval draws what a question leaves open when it grades."""
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)


def load_task(run: Run, manager: TaskManager) -> Task:
    """A task with its data, which the Hub gives where they are not here yet, and its number of examples.

    lm-eval makes the documents anew each time it asks for them. They are made once here. They do not come from the cache of data
    sets either: GPQA's would have the order that some earlier run of lm-eval left there.

    Raises:
        UserError: the data cannot be had, or what the task is graded with is missing.
    """
    seed()
    disable_caching()
    try:
        with patch.object(datasets, "load_dataset", load_pinned):  # lm-eval's tasks name no commit
            task: Any = manager.load([run.task])["tasks"][run.task]
    except (*hub.ERRORS, DatasetsError) as error:
        source = str((manager.task_index[run.task].cfg or {}).get("dataset_path"))
        raise UserError(
            f"task {run.task}: {hub.failure(hub.why_closed(source, 'dataset') or error, source, REVISIONS.get(source) or 'main')}"
        ) from None
    finally:
        enable_caching()
    task.test_docs = task.validation_docs = lambda: task.task_docs
    if run.task == "leaderboard_ifeval":
        prepare_ifeval()
    task.set_config("num_fewshot", run.shots)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    return task


def revision(task: Any) -> str | None:
    """The commit of the data set that a task was read from; None where it did not come from the Hub."""
    files = [file["filename"] for split in task.dataset.values() for file in split.cache_files]
    found = {part for file in files for part in Path(file).parts if re.fullmatch(r"[0-9a-f]{40}", part)}
    return found.pop() if len(found) == 1 else None


def load_tasks(wanted: Sequence[Run]) -> list[tuple[Run, Task]]:
    """The tasks of runs with their data.

    Raises:
        UserError: something is missing (`load_task`, `use_math`).
    """
    if any(needs_math(run.task) for run in wanted):
        use_math()
    manager = task_manager()
    return [(run, load_task(run, manager)) for run in wanted]


def texts(task: Any, row: Mapping[str, Any]) -> list[str]:
    """A question as its task shows it, and each text of its row."""
    shown = task.doc_to_text(row)
    if isinstance(shown, int):  # the choices are beginnings of the text, which the target ends
        shown = f"{task.doc_to_choice(row)[shown]} {task.doc_to_target(row)}"
    return [shown, *(value for value in row.values() if isinstance(value, str))]


def questions(names: Sequence[SuiteName]) -> tuple[Iterator[tuple[str, str, str]], list[dict[str, Any]]]:
    """All texts of the questions of suites, each behind its suite and task; and what was read: task, revision, number of questions.

    Raises:
        UserError: as `load_tasks`.
    """
    first = {run.task: (run, name) for name in reversed(names) for run in runs([name])}  # a task of several suites once
    loaded = [(first[run.task][1], run.task, task) for run, task in load_tasks([run for run, _ in first.values()])]
    read = [
        {"suite": suite, "task": name, "revision": revision(task), "questions": len(task.task_docs)}
        for suite, name, task in loaded
    ]
    return (
        (suite, name, text) for suite, name, task in loaded for row in task.task_docs for text in texts(task, row)
    ), read
