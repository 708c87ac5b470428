"""DVC as a child process: one run at a time in a folder, and signals passed on to it."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

import psutil

from hermes.console import UserError

SCRATCH = Path(".scratch")
DVC = (sys.executable, "-m", "dvc")
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def only_one(name: str) -> Iterator[IO[str]]:
    """Holds `.scratch/NAME.lock`; a child that is passed the file goes on holding it after a kill -9 of this process.

    Raises:
        UserError: another process holds it.
    """
    SCRATCH.mkdir(exist_ok=True)
    with (SCRATCH / f"{name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another `make {name}` is running in this folder; wait for it or stop it") from None
        yield lock


def environment() -> dict[str, str]:
    """This process's environment with the folder of its Python first in PATH.

    .venv need not be activated then, although a stage may call `python`.
    """
    folder = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": os.pathsep.join(filter(None, [folder, os.environ.get("PATH")]))}


def dvc(*arguments: str) -> str:
    """What a short DVC command prints; where it fails, a UserError that gives its reason."""
    done = subprocess.run([*DVC, *arguments], env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        why = done.stderr.rpartition("ERROR: ")[2].splitlines()
        raise UserError(f"`dvc {' '.join(arguments)}`: {why[0] if why else 'failed'}")
    return done.stdout


class Relay:
    """Passes the signals that end a run on to the child, so that this process outlives it and can clean up.

    The child has a process group of its own. DVC does not stop its stages when it is stopped, so the whole group has to
    get the signal. The terminal's Ctrl-C must not reach it twice. Ctrl-Z is relayed for that reason. Every signal is
    passed on as Ctrl-C, the one after which DVC cleans up, unless Ctrl-C is ignored (a shell's background job). A signal
    that was ignored at the start stays ignored (nohup). Exit codes are a shell's: 128 plus the signal's number. One relay
    may run several commands in turn; `received` is the number of a signal that came, and a later command gets it at once.
    """

    def __init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None
        self.starting = False
        self.received: int | None = None
        self.delivered = False  # or it came while no child was there to get it
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Relay":
        for number, handler in [*((number, self._end) for number in FORWARDED), (signal.SIGTSTP, self._pause)]:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self.previous[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    @property
    def sent(self) -> int:
        """The signal that the child gets for the one that came."""
        return signal.SIGINT if signal.SIGINT in self.previous else self.received or signal.SIGTERM

    def hold(self) -> None:
        """From here on a signal is kept in `received` also where no child is there."""
        self.starting = True

    def run(self, command: Sequence[str], lock: IO[str]) -> int:
        """Runs a command to its end; its exit code."""
        self.starting = True
        self.child = subprocess.Popen(
            command, env=environment(), stdin=subprocess.DEVNULL, process_group=0, pass_fds=[lock.fileno()]
        )
        if self.received is not None and not self.delivered:
            self._end(self.received, None)
        code = self.child.wait()
        while self.received is not None and self._is_left():  # a stage that saves, where DVC was killed beside it
            time.sleep(0.1)
        if code and self.received is not None:
            return 128 + self.received
        return code if code >= 0 else 128 - code

    def _end(self, number: int, frame: FrameType | None) -> None:
        if not self.starting:
            sys.exit(128 + number)
        self.received = number
        self.delivered = self._signal_child(self.sent)

    def _is_left(self) -> bool:
        """Whether a process of the child's group has not ended."""
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
                if (
                    self.child
                    and os.getpgid(process.pid) == self.child.pid
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    return True
        return False

    def _pause(self, number: int, frame: FrameType | None) -> None:
        self._signal_child(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._signal_child(signal.SIGCONT)

    def _signal_child(self, number: int) -> bool:
        """Whether a child was there to get it."""
        if self.child is None or (self.child.poll() is not None and not self._is_left()):
            return False
        with suppress(ProcessLookupError):  # it has just ended
            os.killpg(self.child.pid, number)
        return True
