"""How a program meets the person who runs it: one-line errors and progress."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


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
        desc=description,
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


def printable(text: str) -> str:
    """A text on one line, in which what would steer a terminal is spelt out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))
