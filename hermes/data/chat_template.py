"""The only place where a chat template is rendered: a program of others, so it has a sandbox, little time and little memory.

Transformers renders in Jinja's sandbox, which reaches no file and no attribute of Python's own, but computes what it is told to. The
first conversations are rendered in a copy of this process, which the kernel ends where they take too much. Each later one has the time
limit alone.
"""

import os
import resource
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hermes.console import UserError

Messages = Sequence[dict[str, str]]
SECONDS, GIBIBYTES = 5, 1  # of computing, and of memory beside what is there; a real template takes thousandths
WAITED = 60  # seconds by the clock, for one that does not compute either
USER, ANSWER = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes."}
FIRST: list[list[dict[str, str]]] = [
    [USER],
    [USER, ANSWER],
    [{"role": "system", "content": "Be brief."}, USER, ANSWER, USER],
]
TOO_MUCH = f"takes more than {SECONDS} seconds or {GIBIBYTES} GiB for a short conversation"


def apply(tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool = False) -> str:
    """The chat template's text of a conversation.

    Raises:
        TimeoutError: it takes too long.
        Exception: whatever the expressions of a template raise.
    """
    with time_limit():
        return str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
        )


@contextmanager
def time_limit() -> Iterator[None]:
    """Ends the block with a TimeoutError where it computes for too long; a thread beside the main one has no such clock."""

    def end(*received: Any) -> None:
        raise TimeoutError(f"takes more than {SECONDS} seconds of computing")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def check_bounded(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a chat template that cannot render short conversations in little time and memory; what else is wrong stays to be found.

    Raises:
        UserError: it takes too much.
    """
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # Python's, of threads and forks
        child = os.fork()
    if not child:
        try:
            code = 1
            _limit_process()
            for messages in FIRST:
                for begins in (False, True):
                    _try(tokenizer, messages, begins)
            code = 0
        finally:
            os._exit(code)  # nothing of the parent's is flushed or closed here
    if os.waitpid(child, 0)[1]:
        raise UserError(f"chat template: {TOO_MUCH}; use another template")


def _try(tokenizer: PreTrainedTokenizerBase, messages: Messages, begins: bool) -> None:
    try:
        tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=begins)
    except MemoryError:
        raise
    except Exception:  # what the template refuses is told by whoever renders that next
        return


def _limit_process() -> None:
    """Has the kernel end this process where it computes for long, and refuse it much memory."""
    devnull = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(devnull, stream)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(WAITED)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for kind, limit in ((resource.RLIMIT_AS, size + GIBIBYTES * 2**30), (resource.RLIMIT_CPU, SECONDS)):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
