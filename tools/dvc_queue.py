"""Experiments in DVC's queue, several at once, a GPU each: started, watched and, where the run is interrupted, ended."""

import os
import re
import subprocess
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from hermes.console import UserError, say, warn
from tools.dvc_runs import DVC, Relay, dvc, environment

WAITING = ("Queued", "Running")  # of an experiment in DVC's queue
COPIES = Path(".dvc/tmp/exps")  # of the tracked files, in which DVC runs experiments
POLL, PATIENCE = 2.0, 30  # seconds between two looks at it, and how many are enough for what should take one
DEAD = 150  # looks in a row that find no process where something is said to run: a worker was killed, and DVC does not notice


def states() -> dict[str, str]:
    """Each experiment of DVC's queue by its name, or its hash where it has none: Queued, Running, Success or Failed."""
    heading, *lines = dvc("queue", "status").splitlines() or [""]
    name, created = heading.find("Name"), heading.find("Created")
    found = {}
    for line in lines:
        state = line.split()[-1] if line else ""
        if state in (*WAITING, "Success", "Failed"):
            found[line[name:created].strip() or line.split()[0]] = state
    return found


def workers() -> int:
    """How many workers DVC's queue has."""
    found = re.search(r"Worker status: (\d+) active, (\d+) idle", dvc("queue", "status"))
    return int(found[1]) + int(found[2]) if found else 0


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in chosen.split(",") if gpu]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    found = [line for line in listed.splitlines() if line.startswith("GPU ")]  # parts of one (MIG) are lines below it
    return [str(number) for number, _ in enumerate(found)]


def in_copies() -> list[psutil.Process]:
    """The processes that compute experiments."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(COPIES.resolve()):
                found.append(process)
    return found


def end_queued(names: Collection[str], number: int) -> None:
    """Takes experiments that wait out of the queue, and ends those that run by a signal, and their stages, as DVC does not."""
    told, quiet = set[int](), 0
    while left := {name: state for name, state in states().items() if name in names and state in WAITING}:
        if waiting := [name for name, state in left.items() if state == "Queued"]:
            with suppress(UserError):  # one has just begun
                dvc("queue", "remove", *waiting)
        running = in_copies()
        for process in running:
            with suppress(psutil.Error):
                if process.pid not in told:
                    told.add(process.pid)
                    process.send_signal(number)
        if (quiet := 0 if running or waiting else quiet + 1) > PATIENCE:
            give_up(left)
            break
        time.sleep(POLL)


def give_up(names: Iterable[str]) -> None:
    """Says how to end what DVC has for running, and no process computes."""
    for name in names:
        warn(f"{name}: its worker has died, and DVC has it for running; end it: .venv/bin/dvc queue kill {name}")


def run_queued(wanted: Mapping[str, list[str]], jobs: int, relay: Relay) -> list[str]:
    """Runs experiments through DVC's queue, so many at once; the names of those that succeeded. A signal ends all of them."""
    while ended := [name for name in states() if name in wanted]:  # of an earlier sweep
        dvc("queue", "remove", *ended)
    for name, values in wanted.items():
        dvc("exp", "run", "--queue", *(f"--set-param={value}" for value in values), "--name", name)
    relay.hold()
    devices = gpus()
    for worker in range(min(jobs, len(wanted))):
        own = {"CUDA_VISIBLE_DEVICES": devices[worker % len(devices)]} if devices else {}
        # It leaves a process that goes on and holds what it was given to write to, so that a pipe would not end.
        command = [*DVC, "queue", "start", "--jobs", str(worker + 1)]
        subprocess.run(
            command, env=environment() | own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True
        )
        for _ in range(PATIENCE):  # DVC starts one again that does not answer yet
            if workers() > worker or not any(states().get(name) == "Queued" for name in wanted):
                break
            time.sleep(POLL)
    told, quiet = dict.fromkeys(wanted, "Queued"), 0
    while True:
        found = told | {
            name: state for name, state in states().items() if name in wanted
        }  # one is on no list while it is taken
        for name in (name for name in wanted if found.get(name) != told.get(name)):
            say(f"{name}: {found[name].lower()}")
            if found[name] == "Failed":
                warn(f"{name}: failed; `.venv/bin/dvc queue logs {name}` says why")
        told = found
        if relay.received:
            end_queued(wanted, relay.sent)
            break
        if not (left := [name for name, state in found.items() if state in WAITING]):
            break
        if (quiet := 0 if in_copies() else quiet + 1) > DEAD:
            give_up(left)
            break
        time.sleep(POLL)
    return [name for name, state in told.items() if state == "Success"]
