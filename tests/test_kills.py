"""Runs are killed at random moments, in every stage, and the next `dvc repro` has to end with the bits of a run that was never touched,
with nothing half-written left over, and from the last checkpoint on.

pytest -m slow tests/test_kills.py                                a kill of every way
.venv/bin/python -m tests.test_kills 77 >reports/kills.json       so many, and their log
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from hermes.artifacts import read_json
from hermes.params import read_yaml
from tests.conftest import load_embedded_tokenizer, write_random_llama
from tests.test_pipeline import ENVIRONMENT, dvc, make_clone, outs, run
from tools import machine

STAGES = (
    "fetch_data",
    "fetch_model",
    "subset",
    "tokenize",
    "reference",
    "train",
    "merge",
    "quantize",
    "compress",
    "evaluate",
    "report",
)
# Seven ways for eleven stages, so that 77 seeds in a row are every way in every stage.
WAYS = ("stage -9", "dvc -9", "both -9", "TERM", "INT", "stage TERM", "make TERM")
REPRO = (sys.executable, "-m", "dvc", "repro")
MAKE_REPRO = (sys.executable, "-m", "tools.repro")  # what `make repro` runs
MORE_STEPS = ["profiles.cpu.train.epochs=12", "profiles.cpu.train.checkpoint_steps=2"]


def stage_outs(folder: Path, stage: str) -> dict[str, str]:
    """The md5 of the outs of one stage in dvc.lock."""
    return {out["path"]: out["md5"] for out in read_yaml(folder / "dvc.lock")["stages"].get(stage, {}).get("outs", ())}


def forget(folder: Path, stage: str) -> None:
    """Makes DVC run a stage again: its outs and its entry in dvc.lock are gone, and DVC remembers no run of it."""
    lock = read_yaml(folder / "dvc.lock")
    for out in lock["stages"].pop(stage)["outs"]:
        path = folder / out["path"]
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "dvc.lock").write_text(json.dumps(lock))  # JSON is YAML
    shutil.rmtree(folder / ".dvc/cache/runs", ignore_errors=True)


def partials(folder: Path) -> list[str]:
    """What lies half-written beside outputs and in the scratch; training's checkpoints are none of it."""
    found = [path for name in ("data", "models", "reports") for path in (folder / name).rglob(".*.partial")]
    found += [path for path in (folder / ".scratch/check").glob("*") if path.suffix != ".lock"]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def checkpoint(folder: Path) -> int:
    """The step of the newest whole checkpoint."""
    found = (folder / ".scratch/train").glob("*/checkpoint-*/trainer_state.json")
    return max((int(path.parent.name.split("-")[1]) for path in found), default=0)


def kill(process: subprocess.Popen[bytes], way: str) -> None:
    """Ends a running `dvc repro` or `make repro` in one of `WAYS`."""
    parent = psutil.Process(process.pid)
    children = parent.children(recursive=True)
    if way in ("TERM", "INT"):  # as a terminal or a rented machine sends it, to the whole group
        os.killpg(process.pid, getattr(signal, f"SIG{way}"))
    if way == "make TERM":
        parent.terminate()
    if way == "stage TERM":
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.terminate()
    if way in ("dvc -9", "both -9"):
        parent.kill()
    if way in ("stage -9", "both -9"):
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
    process.wait(timeout=120)
    _, alive = psutil.wait_procs(children, timeout=120)  # a stage whose DVC was killed ends by itself
    assert not alive


def attempt(folder: Path, seed: int, seconds: dict[str, float]) -> dict[str, Any]:
    """Kills one stage of a finished run at a random moment and goes on; what was done, and what is wrong afterwards."""
    stage, way = STAGES[seed % len(STAGES)], WAYS[seed % len(WAYS)]
    moment = random.Random(seed).uniform(0, seconds[stage])
    wanted = stage_outs(folder, stage)
    forget(folder, stage)
    process = subprocess.Popen(
        [*(MAKE_REPRO if way == "make TERM" else REPRO), stage],
        cwd=folder,
        env=ENVIRONMENT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        process.wait(timeout=moment)
        was_running = False
    except subprocess.TimeoutExpired:
        was_running = True
        kill(process, way)
    left, saved = [] if "-9" in way else partials(folder), checkpoint(folder)
    output = dvc(folder, "repro", stage, check=False)
    # DVC was killed while it wrote dvc.lock or its list of paths in use, and `make repro` mends both
    is_broken = any(
        words in output
        for words in ("dvc.lock' is invalid", "dvc.lock' validation failed", "Unable to read RWLock-file")
    )
    if is_broken:
        output = run(folder, *MAKE_REPRO)
    resumed = re.search(r"train: goes on from checkpoint-(\d+)$", output, re.MULTILINE)
    found = stage_outs(folder, stage)
    wrong = sorted(path for path in wanted if found.get(path) != wanted[path])
    wrong += left + partials(folder)
    if stage == "train" and saved != (int(resumed[1]) if resumed else 0):
        wrong.append(f"{resumed and resumed[0]}, but {saved} is the last checkpoint")
    return {
        "seed": seed,
        "stage": stage,
        "way": way,
        "second": round(moment, 2),
        "was_running": was_running,
        "resumed_at": saved,
        "lock_broken": is_broken,
        "wrong": wrong,
        **({"output": output} if wrong else {}),
    }


def durations(folder: Path) -> dict[str, float]:
    """About how long each stage takes under DVC: its own time in the run before, and the start of DVC and Python, which is tried once."""
    took = {stage: float(read_json(folder / f"timings/{stage}.json")["seconds"]) for stage in STAGES}
    forget(folder, STAGES[0])
    started = time.monotonic()
    dvc(folder, "repro", STAGES[0])
    starting = time.monotonic() - started
    return {stage: starting + seconds for stage, seconds in took.items()}


def make_finished(root: Path, tiny_model: Path) -> tuple[Path, dict[str, float]]:
    """A small project whose stages have all run, and how long each takes."""
    clone = make_clone(root / "repository", tiny_model)
    run(clone, sys.executable, "-c", f"from tests.test_pipeline import override; override({MORE_STEPS!r})")
    dvc(clone, "repro")
    before = outs(clone)
    seconds = durations(clone)
    assert outs(clone) == before
    return clone, seconds


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> tuple[Path, dict[str, float]]:
    """Such a project."""
    return make_finished(tmp_path_factory.mktemp("kills"), tiny_model_folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(len(WAYS)))
def test_a_run_that_was_killed_ends_with_the_bits_of_one_that_was_not(
    seed: int, finished: tuple[Path, dict[str, float]]
) -> None:
    folder, seconds = finished
    found = attempt(folder, seed, seconds)
    assert found["wrong"] == [], found


def main(count: int) -> None:
    """Kills a project of its own so many times, and prints the log."""
    with tempfile.TemporaryDirectory() as root:
        folder, seconds = make_finished(Path(root), write_random_llama(Path(root) / "base", load_embedded_tokenizer()))
        log = []
        for seed in range(count):
            log.append(attempt(folder, seed, seconds))
            print(json.dumps(log[-1]), file=sys.stderr, flush=True)
    kills = ",\n".join(map(json.dumps, log))
    wrong = sum(bool(entry["wrong"]) for entry in log)
    print(f'{{"machine": {json.dumps(machine.facts())},\n"kills": [\n{kills}\n],\n"wrong": {wrong}}}')


if __name__ == "__main__":
    main(int(sys.argv[1]))
