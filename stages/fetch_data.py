"""Stage fetch_data: a pinned preference data set -> data/raw (one Parquet file a split, manifest.json).

The embedded source is data/embedded (see its README), whose held-out questions and plain answers come along. Another folder of
Parquet files (`source: ./my-data`) is read the same way. A Hub source is loaded at its exact commit with `datasets`. `splits`
says which split of the source plays which part.
"""

import re
import shutil
from pathlib import Path
from typing import Literal, get_args

import datasets
import pyarrow as pa
from pydantic import field_validator

from stages import params
from stages.artifacts import complete_folder, open_parquet, sha256_file, write_json, write_parquet
from stages.console import UserError, run_stage

RAW, EMBEDDED = Path("data/raw"), Path("data/embedded")
COLUMNS = ("question", "chosen", "rejected", "delta_score")
Split = Literal["train", "validation", "test"]


class DataSettings(params.Settings):
    """Where the preference pairs come from."""

    source: str
    revision: str | None
    splits: dict[Split, str]

    @field_validator("splits")
    @classmethod
    def _has_all(cls, splits: dict[Split, str]) -> dict[Split, str]:
        if missing := sorted(set(get_args(Split)) - set(splits)):
            raise ValueError(f"says nothing of {missing[0]}; name a split for each of {', '.join(get_args(Split))}")
        return splits


class Params(params.Params):
    """Parameters of fetch_data."""

    data: DataSettings


def check_columns(table: pa.Schema, where: str) -> None:
    """Refuses a table that is not in the Hermes schema.

    Raises:
        UserError: a column is missing; names it and those found.
    """
    missing = [name for name in COLUMNS if name not in table.names]
    if missing:
        raise UserError(
            f"{where}: column `{missing[0]}` is missing; found {', '.join(table.names)}; expected {', '.join(COLUMNS)}"
        )


def fetch_folder(folder: Path, splits: dict[Split, str], target: Path) -> None:
    """Copies the splits of a folder, and its held-out questions and plain answers where it has them.

    Raises:
        UserError: a split's file is missing or damaged.
    """
    for split, name in splits.items():
        source = folder / f"{name}.parquet"
        if not source.is_file():
            mend = (
                f"restore it with `git checkout {EMBEDDED}`"
                if folder == EMBEDDED
                else "see `data.splits` in params.yaml"
            )
            raise UserError(f"{source}: no such file; {mend}")
        open_parquet(source).close()  # a damaged file is told by its own name
        shutil.copyfile(source, target / f"{split}.parquet")
    for name in ("questions.parquet", "plain.jsonl"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)


def fetch_hub(source: str, revision: str | None, splits: dict[Split, str], target: Path) -> None:
    """Loads a Hub data set at one commit and writes its splits as Parquet.

    Raises:
        UserError: the revision is not a full commit, or the Hub cannot give the split.
    """
    if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise UserError(f"params.yaml: `data.revision` is {revision!r}; pin the full 40-digit commit of {source}")
    for split, name in splits.items():
        try:
            loaded = datasets.load_dataset(source, revision=revision, split=name)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise UserError(
                f"{source}@{revision}, split {name}: cannot be fetched ({error}); check name, network and HF_TOKEN"
            ) from None
        write_parquet(target / f"{split}.parquet", loaded.data.table.combine_chunks())


def is_folder(source: str) -> bool:
    """Whether a source is a folder here, rather than owner/name on the Hub."""
    return source == "embedded" or source.startswith((".", "/"))


def main() -> None:
    settings = params.load(Params).data
    with complete_folder(RAW) as target:
        if is_folder(settings.source):
            fetch_folder(EMBEDDED if settings.source == "embedded" else Path(settings.source), settings.splits, target)
        else:
            fetch_hub(settings.source, settings.revision, settings.splits, target)
        rows = {}
        for split in settings.splits:
            with open_parquet(target / f"{split}.parquet") as file:
                check_columns(file.schema_arrow, f"{settings.source}, split {split}")
                rows[split] = file.metadata.num_rows
        manifest = {
            "source": settings.source,
            "revision": settings.revision,
            "rows": rows,
            "files": {path.name: sha256_file(path) for path in sorted(target.iterdir())},
        }
        write_json(target / "manifest.json", manifest)


if __name__ == "__main__":
    run_stage("fetch_data", main)
