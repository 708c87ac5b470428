"""One experiment for each beta, or for each seed, through DVC's queue, and their comparison.

    python -m tools.sweep --betas 0.05,0.1,0.2         (or: make sweep BETAS=0.05,0.1,0.2)
    python -m tools.sweep --seeds 42,1,2               (or: make sweep SEEDS=42,1,2)

Each value becomes an experiment, `beta-0.05` or `seed-1` and so on, derived from the workspace as it is, and runs in a copy of the
tracked files. One worker takes them one after the other, since they share this machine. The worker is a process of its
own: this one queues, watches, and in the end compares those that succeeded. An experiment of that name on the same
commit is replaced; what has not changed since then comes out of DVC's run cache.
"""

import argparse
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from dvc.repo import Repo
from tqdm import tqdm

from hermes.console import UserError
from tools.dvc_runs import SCRATCH, environment, only_one

WORKER_LOG = SCRATCH / "sweep-worker.log"
# Read alike by Python, YAML 1.2, and git as part of a name.
NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?(e-?[0-9]+)?", re.ASCII)
SEED = re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII)
POLL_SECONDS, WORKER_CHECK_SECONDS, STOP_SECONDS = 2.0, 15.0, 60.0
WORKER_STARTS = 3  # a worker that goes away with experiments waiting is started again so many times
VANISHED_POLLS = 5  # a task that changes hands is in no list for a moment
UNFINISHED = ("Queued", "Running")
Tasks = dict[str, tuple[str, str]]  # revision -> (experiment, "Queued" | "Running" | "Success" | "Failed")


def parse_betas(text: str) -> list[str]:
    """The betas of a comma-separated list, in order and as they were written, which is also how they name experiments.

    Raises:
        UserError: an entry that is not a number above 0, or that comes twice; names it.
    """
    betas: list[str] = []
    for entry in (entry.strip() for entry in text.split(",")):
        if not NUMBER.fullmatch(entry) or not 0 < float(entry) < float("inf"):
            raise UserError(f"--betas {text}: {entry!r} is not a number above 0; write them like 0.05,0.1,0.2")
        if float(entry) in map(float, betas):
            raise UserError(f"--betas {text}: {entry} comes twice")
        betas.append(entry)
    return betas


def parse_seeds(text: str) -> list[str]:
    """The seeds of a comma-separated list, in order.

    Raises:
        UserError: an entry that is not a whole number below 10^9, or that comes twice; names it.
    """
    seeds: list[str] = []
    for entry in (entry.strip() for entry in text.split(",")):
        if not SEED.fullmatch(entry):
            raise UserError(f"--seeds {text}: {entry!r} is not a whole number; write them like 42,1,2")
        if entry in seeds:
            raise UserError(f"--seeds {text}: {entry} comes twice")
        seeds.append(entry)
    return seeds


def assignments(key: str, values: Sequence[str]) -> dict[str, str]:
    """What each experiment sets, by its name: {"beta-0.05": "beta=0.05", ...}."""
    return {f"{key}-{value}": f"{key}={value}" for value in values}


def tasks() -> Tasks:
    """What DVC's queue knows, finished tasks of earlier sweeps included."""
    with Repo(".") as repo:
        return {task["rev"]: (task["name"] or "", task["status"]) for task in repo.experiments.celery_queue.status()}


def has_worker() -> bool:
    """Whether a worker answers."""
    with Repo(".") as repo:
        return bool(repo.experiments.celery_queue.worker_status())


def dvc(*arguments: str) -> None:
    """Runs a DVC command.

    Raises:
        UserError: it fails; gives its last line.
    """
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise UserError(f"`dvc {' '.join(arguments)}`: {(lines or ['failed'])[-1].removeprefix('ERROR: ')}")


def existing(names: Collection[str]) -> list[str]:
    """Those of `names` that are experiments of the current commit already."""
    with Repo(".") as repo:
        found = repo.experiments.ls()
    return sorted({name for experiments in found.values() for name, _ in experiments} & set(names))


def queue(wanted: Mapping[str, str]) -> list[str]:
    """Queues one experiment per name and assignment, in order; the revisions of their tasks.

    Raises:
        UserError: the queue holds other unfinished tasks, which the worker would run as well, or DVC refuses one.
    """
    before = tasks()
    if waiting := [name or revision[:7] for revision, (name, status) in before.items() if status in UNFINISHED]:
        raise UserError(
            f"DVC's queue is not empty ({', '.join(waiting)}); wait, or clear it with "
            f"`.venv/bin/dvc queue kill NAME` and `.venv/bin/dvc queue remove --queued`"
        )
    for name in existing(wanted):
        print(f"{name}: an experiment of this commit already, it is replaced", flush=True)
        dvc("exp", "remove", name)
    for name, assignment in wanted.items():
        dvc("exp", "run", "--queue", "-S", assignment, "--name", name)
        print(f"{name}: queued", flush=True)
    added = {name: revision for revision, (name, _) in tasks().items() if revision not in before}
    return [added[name] for name in wanted]


def start_worker() -> None:
    """Starts a worker that lives until the queue is empty.

    Its output goes to a file: it keeps what it is given open, so a pipe would not end before it.

    Raises:
        UserError: it does not start.
    """
    with WORKER_LOG.open("wb") as log:
        command = [sys.executable, "-m", "dvc", "queue", "start", "--jobs", "1"]
        if subprocess.run(command, env=environment(), stdout=log, stderr=log, check=False).returncode:
            raise UserError(f"DVC's queue does not start; {WORKER_LOG} says why")


def watch(revisions: Collection[str]) -> Tasks:
    """Waits for the tasks with these revisions, showing what runs; how each ended, without those that have vanished.

    Raises:
        UserError: the worker has gone for good and left some.
    """
    starts, vanished, looked = 1, 0, time.monotonic()
    with tqdm(total=len(revisions), desc="sweep", unit="experiment", dynamic_ncols=True, miniters=0) as bar:
        bar.mininterval = POLL_SECONDS if sys.stderr.isatty() else 60.0
        while True:
            ours = {revision: task for revision, task in tasks().items() if revision in revisions}
            unfinished = [name for name, status in ours.values() if status in UNFINISHED]
            running = ", ".join(name for name, status in ours.values() if status == "Running")
            bar.set_postfix_str(running, refresh=False)
            bar.update(len(ours) - len(unfinished) - bar.n)
            vanished = vanished + 1 if len(ours) < len(revisions) else 0
            if not unfinished and (not vanished or vanished > VANISHED_POLLS):
                return ours
            if time.monotonic() - looked > WORKER_CHECK_SECONDS:
                if not (has_worker() or has_worker()):  # a busy machine may miss one answer
                    if running or starts == WORKER_STARTS:
                        raise UserError(
                            f"the worker of DVC's queue is gone and left {', '.join(unfinished)}; see {WORKER_LOG} and "
                            f"`.venv/bin/dvc queue logs NAME`, clear it with `.venv/bin/dvc queue stop --kill`"
                        )
                    start_worker()
                    starts += 1
                looked = time.monotonic()
            time.sleep(POLL_SECONDS)


def stop(names: Collection[str]) -> None:
    """Takes waiting experiments out of the queue, interrupts the running one as Ctrl-C would, and waits for its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave it half stopped

    deadline = time.monotonic() + STOP_SECONDS
    asked: set[str] = set()
    while ours := {r: status for r, (name, status) in tasks().items() if name in names and status in UNFINISHED}:
        if time.monotonic() > deadline:
            raise UserError("the running experiment does not end; kill it with `.venv/bin/dvc queue stop --kill`")
        for verb, state in (("remove", "Queued"), ("kill", "Running")):  # in this order, or the next one starts
            revisions = [revision for revision, status in ours.items() if status == state and revision not in asked]
            if revisions:
                with suppress(UserError):  # it may have started, or ended, by now: look again
                    dvc("queue", verb, *revisions)
                    asked.update(revisions)
        time.sleep(POLL_SECONDS)
    dvc("queue", "stop")


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """A signal handler: ends like Ctrl-C."""
    raise KeyboardInterrupt


def sweep(wanted: Mapping[str, str]) -> int:
    """Queues, runs and compares the experiments (name: assignment); 1 where one failed or could not be compared.

    Raises:
        UserError: the queue cannot be used, or another sweep runs.
        KeyboardInterrupt: interrupted; the queue is stopped by then.
    """
    with only_one("sweep"):
        try:
            revisions = queue(wanted)
            start_worker()
            ended = watch(revisions)
        except KeyboardInterrupt:
            print("\nsweep: stopping", file=sys.stderr)
            stop(set(wanted))
            raise
        succeeded = [name for name, r in zip(wanted, revisions, strict=True) if ended.get(r, ("", ""))[1] == "Success"]
        for name, revision in zip(wanted, revisions, strict=True):
            if name not in succeeded:
                print(f"{name}: failed; see .venv/bin/dvc queue logs {revision[:7]}", file=sys.stderr)
        if not succeeded:
            return 1
        done = subprocess.run(
            [sys.executable, "-m", "tools.review", "--compare", *succeeded], env=environment(), check=False
        )
        return 1 if done.returncode or len(succeeded) < len(wanted) else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.sweep", description="Run one experiment for each value.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--betas", metavar="LIST", help="for example 0.05,0.1,0.2")
    what.add_argument("--seeds", metavar="LIST", help="for example 42,1,2")
    signal.signal(signal.SIGTERM, interrupt)
    try:
        given = parser.parse_args()
        if given.seeds is not None:
            return sweep(assignments("seed", parse_seeds(given.seeds)))
        return sweep(assignments("beta", parse_betas(given.betas)))
    except UserError as error:
        sys.exit(f"sweep: {error}")
    except KeyboardInterrupt:
        print("sweep: interrupted; experiments that had ended are kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
