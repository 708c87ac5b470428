"""How a stage or a tool begins and ends: params.yaml is checked, mistakes become one line, and a record says when and where it ran."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from hermes import bits
from hermes.console import UserError, escape_libraries, printable, warn
from hermes.settings import experiment
from hermes.shortage import lack

TIMINGS = Path("timings")


class Stopped(BaseException):
    """A signal asks this process to end. It is no Exception, so that no library takes it for an error of its own.

    Args:
        number: the signal.
        kept: what the next run goes on from, in words.
    """

    def __init__(self, number: int, kept: str = "") -> None:
        super().__init__(number)
        self.number, self.kept = number, kept


def stop(number: int, frame: FrameType | None) -> None:
    """A handler of signals that ends the process.

    Raises:
        Stopped: always.
    """
    raise Stopped(number)


def run_stage(name: str, main: Callable[[], None]) -> None:
    """Checks all of params.yaml, runs a stage's `main` as `run_tool` does, and records its time beside the outputs.

    DVC removes a stage's outputs before it starts the stage, so a failure under DVC says how to get them back.

    The record, `timings/NAME.json`, holds everything that may differ between two equal runs (clock, host, commit, duration) and is read
    by no stage.
    """

    def checked() -> None:
        bits.check(experiment.check().bits)
        main()

    started = datetime.now(UTC)
    clock = time.monotonic()
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, stop)
    hint = " [earlier outputs: .venv/bin/dvc checkout && git checkout reports]"
    run_tool(name, checked, hint if "DVC_ROOT" in os.environ else "")
    record_timing(name, started, time.monotonic() - clock)


def run_tool(name: str, main: Callable[[], int | None], hint: str = "") -> None:
    """Runs the `main` of a program; a mistake of the user is one line and exit code 1, any other error keeps its traceback.

    `HERMES_TRACEBACK=1` shows the traceback of a mistake too. Where `main` returns an exit code, the process ends with it.
    """
    escape_libraries()
    try:
        code = main()
    except (KeyboardInterrupt, Stopped) as error:
        number, kept = (error.number, error.kept) if isinstance(error, Stopped) else (signal.SIGINT, "")
        how = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        warn(f"{name}: {how}{kept}; run the same command again to go on")
        sys.exit(128 + number)
    except Exception as error:
        if isinstance(error, UserError) and not os.environ.get("HERMES_TRACEBACK"):
            sys.exit(f"{name}: {printable(str(error))}{hint}")
        if (lacking := lack(error)) and not os.environ.get("HERMES_TRACEBACK"):
            sys.exit(f"{name}: {printable(lacking)}{hint}")
        warn(*traceback.format_exc().splitlines())
        sys.exit(printable(f"{name}: {type(error).__name__}, see the traceback above{hint}"))
    if code:
        sys.exit(code)


def record_timing(name: str, started: datetime, seconds: float) -> None:
    """Writes `timings/NAME.json`: when, where and from which commit a stage ran, and for how long; the stage's work stands without it."""
    record = {
        "stage": name,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "host": platform.node(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    try:
        command = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        TIMINGS.mkdir(exist_ok=True)
        (TIMINGS / f"{name}.json").write_text(json.dumps(record | {"commit": commit}, indent=2) + "\n")
    except OSError as error:
        warn(f"{name}: done, but its time is not recorded: {error}")
