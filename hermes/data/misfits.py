"""Rows that cannot be pairs: why, by split and number, in data/raw/misfits.json, which is there only where a row is such a one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hermes.artifacts import REMAKE, read_object, write_json
from hermes.console import UserError

MISFITS = "misfits.json"
ROLES = ("system", "user", "assistant")
UNDECIDED = {"tie", "unlabelled"}  # kinds that a source of verdicts is expected to have


class Misfit(ValueError):
    """A row that cannot be a pair: what was found in it, and the kind that such rows are counted under."""

    def __init__(self, kind: str, found: str) -> None:
        super().__init__(found)
        self.kind = kind


def check_turns(turns: Sequence[Any]) -> None:
    """Refuses what no chat template could write in front of an answer.

    Raises:
        Misfit: a turn is no message, of another role, a late system prompt, or the last is not the user's.
    """
    for turn in turns:
        parts = turn if isinstance(turn, dict) else {}
        if not isinstance(parts.get("role"), str) or not isinstance(parts.get("content"), str):
            raise Misfit("no_messages", f"{str(turn)[:60]!r} is not a message with role and content")
        if parts["role"] not in ROLES:
            raise Misfit(
                "other_role", f"a message is of the role {parts['role'][:40]!r}; expected one of {', '.join(ROLES)}"
            )
    if not turns or turns[-1]["role"] != "user":
        raise Misfit("no_question", "what comes before the answers does not end with a user's message")
    if any(turn["role"] == "system" for turn in turns[1:]):
        raise Misfit("late_system_prompt", "a system prompt stands behind other messages")


def write_misfits(misfits: dict[str, dict[int, Misfit]], folder: Path) -> None:
    """Writes the misfits of each split, by the numbers of their rows; nothing where all rows fit."""
    found = {
        split: {str(number): {"kind": misfit.kind, "found": str(misfit)} for number, misfit in rows.items()}
        for split, rows in misfits.items()
        if rows
    }
    if found:
        write_json(folder / MISFITS, found)


def read_misfits(split: Path) -> dict[int, Misfit]:
    """The misfits of one split, given its table, by the numbers of their rows.

    Raises:
        UserError: the file is damaged.
    """
    path = split.with_name(MISFITS)
    found = read_object(path).get(split.stem, {}) if path.is_file() else {}
    try:
        return {int(number): Misfit(misfit["kind"], misfit["found"]) for number, misfit in found.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not the misfits of {split.stem} ({error!r}); {REMAKE}") from None
