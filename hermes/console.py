"""How a program meets the person who runs it: one-line errors and progress."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
SECRET = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)|\bhf_[A-Za-z0-9]{20,}")  # who asks, in an address; a token of the Hub
LAYOUT = warnings.formatwarning


class UserError(Exception):
    """Something the person at the terminal can mend: says what was found, where, and what to do, in one line."""


class Lines(tqdm):
    """A progress bar that is a line now and then, for logs and pipes: no carriage returns and no drawing."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Writes the state as a line of its own."""
        if not pos:
            print(msg or str(self), file=self.fp, flush=True)

    def moveto(self, n: int) -> None:
        """Leaves the cursor where it is."""


def progress(items: Iterable[T], description: str, unit: str = "it") -> "tqdm[T]":
    """A progress bar over `items`; where nobody watches, a line at the beginning, every half minute at most, and at the end."""
    watched = sys.stderr.isatty()
    return (tqdm if watched else Lines)(
        items,
        desc=printable(description),
        unit=f" {unit}",
        mininterval=0.5 if watched else 30.0,
        maxinterval=float("inf"),
        file=sys.stderr,
        dynamic_ncols=watched,
        disable=False,
        bar_format=None
        if watched
        else "{desc}: {n_fmt} of {total_fmt}{unit}, {elapsed} gone, {remaining} to go{postfix}",
    )


def escaped(text: str) -> str:
    """A text in which what would steer a terminal is spelt out: control characters, direction marks and ends of lines.

    Tokens and passwords are left out, as errors of libraries hold addresses.
    """
    for name in SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in SECRET.sub("***", text))


def printable(text: str) -> str:
    """The same on one line, with one space for each run of white space."""
    return escaped(" ".join(text.split()))


def say(*lines: object) -> None:
    """Shows lines; whatever names and values they hold, each stays one line and steers nothing."""
    for line in lines:
        print(escaped(str(line)), flush=True)


def warn(*lines: object) -> None:
    """The same beside the output, on stderr."""
    for line in lines:
        print(escaped(str(line)), file=sys.stderr, flush=True)


def escape_libraries() -> None:
    """Has what libraries log and warn of escaped too, as they name tokens and values of the files of others."""

    def record(*args: Any, **named: Any) -> logging.LogRecord:
        made = logging.LogRecord(*args, **named)
        with suppress(Exception):  # whose arguments do not fit, which logging tells itself
            made.msg, made.args = by_line(made.getMessage()), ()
        return made

    logging.setLogRecordFactory(record)
    warnings.formatwarning = lambda *args, **named: by_line(LAYOUT(*args, **named))


def by_line(text: str) -> str:
    """A text of several lines, each escaped."""
    return "\n".join(map(escaped, text.split("\n")))
