"""The training pairs that show what a model's weights are used for, before they are rounded."""

from pathlib import Path

from hermes.artifacts import open_parquet
from hermes.console import UserError

TOKENS = Path("data/tokens")


def calibration_ids(count: int, folder: Path = TOKENS) -> list[list[int]]:
    """The ids of prompt and chosen answer of so many training pairs, evenly spaced in the order of the file; of all where there are fewer.

    Raises:
        UserError: the table is missing or damaged, or has no pair.
    """
    path = folder / "train.parquet"
    with open_parquet(path) as file:
        table = file.read(["prompt_ids", "chosen_ids"])
    rows, found = len(table), min(count, len(table))
    if not found:
        raise UserError(f"{path}: has no pair to calibrate on; see reports/data.json")
    return [
        table["prompt_ids"][row].as_py() + table["chosen_ids"][row].as_py()
        for row in (i * rows // found for i in range(found))
    ]
