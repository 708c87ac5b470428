"""Rows that cannot be pairs: why, by split and number, in data/raw/misfits.json, which is there only where a row is such a one."""

from pathlib import Path

from hermes.artifacts import read_json, write_json

MISFITS = "misfits.json"
UNDECIDED = {"tie", "unlabelled"}  # kinds that a source of verdicts is expected to have


class Misfit(ValueError):
    """A row that cannot be a pair: what was found in it, and the kind that such rows are counted under."""

    def __init__(self, kind: str, found: str) -> None:
        super().__init__(found)
        self.kind = kind


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
    """The misfits of one split, given its table, by the numbers of their rows."""
    path = split.with_name(MISFITS)
    found = read_json(path).get(split.stem, {}) if path.is_file() else {}
    return {int(number): Misfit(**misfit) for number, misfit in found.items()}
