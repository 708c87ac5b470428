"""The held-out pairs of data/subset, as the evaluation and its tasks read them."""

from pathlib import Path

import pyarrow as pa

from hermes.artifacts import open_parquet

SUBSET = Path("data/subset")


def read_pairs(split: str) -> pa.Table:
    """The pairs of a held-out split: question, chosen, rejected, and where the data has them context and other columns.

    Raises:
        UserError: the split is missing or damaged.
    """
    with open_parquet(SUBSET / f"{split}.parquet") as file:
        return file.read()
