"""The benchmark suites of the models that are evaluated: asked of one after another, and written as the report and its readers find them.

What they are is hermes/evaluation/benchmarks.py, how one task is asked hermes/evaluation/run_benchmarks.py.
"""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hermes.artifacts import read_json, scratch_folder, write_json
from hermes.console import UserError, say
from hermes.evaluation import benchmarks, run_benchmarks
from hermes.evaluation.chat_models import ChatModel
from hermes.settings.evaluate import EvaluateSettings

Opener = Callable[[Path], AbstractContextManager[ChatModel]]


def ask(
    settings: EvaluateSettings,
    dtype: torch.dtype,
    open_model: Opener,
    paths: dict[str, Path],
    open_written: Opener | None = None,
    share: tuple[int, int] = (0, 1),
) -> dict[str, Path]:
    """The folder of each model that suites are asked of, with the results and logs of all tasks; nothing where there are no suites.

    Args:
        settings: which suites of which models, and the batches.
        dtype: of a folder's weights when they are computed with.
        open_model: opens the model at a path.
        paths: the models that are evaluated, by name.
        open_written: opens what writes a folder's answers, if it is another.
        share: (k, n), process k of n, which runs every n-th task from its k-th on.

    Raises:
        UserError: something is missing (hermes/evaluation/run_benchmarks.py), or a model was not asked the questions of those before it.
    """
    runs = benchmarks.runs(settings.suites)
    folders: dict[str, Path] = {}
    files = paths if settings.suite_types == "all" else settings.suite_types
    if unknown := {*files} - {*paths}:
        raise UserError(
            f"params.yaml: `evaluate.suite_types` names {min(unknown)}, which `evaluate.types` does not evaluate"
        )
    asked = {name: path for name, path in paths.items() if runs and name in ("base", "merged", *files)}
    for name, path in asked.items():
        say(f"suites on {name}")
        folders[name] = scratch_folder("suites") / run_benchmarks.folder_name(path, settings, dtype)
        own = runs[share[0] :: share[1]]
        written = partial(open_written, path) if open_written and path.is_dir() else None
        run_benchmarks.run_all(own, folders[name], partial(open_model, path), settings.context, written)
        if share == (0, 1):
            benchmarks.check_questions(results_of(runs, folders))
    return folders


def results_of(runs: list[benchmarks.Run], folders: dict[str, Path]) -> dict[str, dict[benchmarks.Run, Any]]:
    """For each model the result of each run."""
    return {name: {run: read_json(folder / f"{run.label}.json") for run in runs} for name, folder in folders.items()}


def write(settings: EvaluateSettings, folders: dict[str, Path], target: Path) -> None:
    """Writes suites.json, which the report shows, and suites/MODEL/, the results and logs of the tasks."""
    runs = benchmarks.runs(settings.suites)
    results = results_of(runs, folders)
    write_json(
        target / "suites.json", {name: benchmarks.summary(benchmarks.SUITES[name], results) for name in settings.suites}
    )
    for name, folder in folders.items():
        (target / "suites" / name).mkdir(parents=True)
        for file in (f"{run.label}.{ending}" for run in runs for ending in ("json", "jsonl.gz")):
            shutil.copyfile(folder / file, target / "suites" / name / file)
