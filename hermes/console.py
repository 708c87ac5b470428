"""How a stage meets the person who runs it: one-line errors, progress, and a record of when and where it ran."""

import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

TIMINGS = Path("timings")
T = TypeVar("T")


class UserError(Exception):
    """Something the person at the terminal can mend: says what was found, where, and what to do, in one line."""


def progress(items: Iterable[T], description: str, total: int | None = None, unit: str = "it") -> "tqdm[T]":
    """A progress bar over `items`; where nobody watches it prints a line every half minute at most."""
    interval = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(
        items, desc=description, total=total, unit=unit, mininterval=interval, file=sys.stderr, dynamic_ncols=True
    )


def run_stage(name: str, main: Callable[[], None]) -> None:
    """Runs a stage's `main`; turns its errors into one line and exit code 1, and records its time beside the outputs.

    DVC removes a stage's outputs before it starts the stage, so a failure under DVC says how to get them back.

    `HERMES_TRACEBACK=1` shows the whole traceback. The record, `timings/NAME.json`, holds everything that may differ between
    two equal runs (clock, host, commit, duration) and is read by no stage.
    """
    started = datetime.now(UTC)
    clock = time.monotonic()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted; run the same command again to go on")
    except Exception as error:
        if os.environ.get("HERMES_TRACEBACK"):
            traceback.print_exc()
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        hint = "" if isinstance(error, UserError) else " (HERMES_TRACEBACK=1 shows where)"
        if "DVC_ROOT" in os.environ:
            hint += " [earlier outputs: .venv/bin/dvc checkout && git checkout reports]"
        sys.exit(f"{name}: {kind}{' '.join(str(error).split())}{hint}")
    record_timing(name, started, time.monotonic() - clock)


def record_timing(name: str, started: datetime, seconds: float) -> None:
    """Writes `timings/NAME.json`: when, where and from which commit a stage ran, and for how long."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    TIMINGS.mkdir(exist_ok=True)
    record = {
        "stage": name,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "host": platform.node(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "commit": commit,
    }
    (TIMINGS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
