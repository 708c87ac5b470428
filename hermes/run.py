"""How a stage or a tool begins and ends: params.yaml is checked, mistakes become one line, and a record says when and where it ran."""

import errno
import json
import os
import platform
import re
import shutil
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

TIMINGS = Path("timings")
NO_MEMORY = ("can't allocate memory", "out of memory", "std::bad_alloc")  # of torch on a CPU and on CUDA, and of C++


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


def lack(error: BaseException | None) -> str | None:
    """What the machine lacked, and what to do, where that is why a library failed; None of another error.

    Libraries that are not Python's say it in words alone, so these are read, too.
    """
    while error is not None:
        said = " ".join(str(error).split())
        number = getattr(error, "errno", None)
        if found := re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", said):
            number = number or int(found[1] or found[2])
        named = getattr(error, "filename", None)
        where = named or Path.cwd()
        if number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in said:
            free = shutil.disk_usage(Path.cwd()).free / 2**30
            return f"{where}: no space left ({free:.1f} GiB free here); free some and run the same command again, it goes on"
        if number == errno.EFBIG:
            return f"{where}: the file would be larger than this process may write; raise `ulimit -f` and run the same command again"
        if number == errno.EROFS:
            return f"{where}: {os.strerror(number)}; make it writable and run the same command again"
        if named and number in (errno.EACCES, errno.EPERM):
            return f"{where}: {os.strerror(number)}; give this user the right to it and run the same command again"
        if isinstance(error, MemoryError) or number == errno.ENOMEM or any(words in said for words in NO_MEMORY):
            return f"not enough memory ({said[:200] or type(error).__name__}); `make plan` says what a run needs"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


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
