"""Stage fetch_data: a pinned preference data set -> data/raw (one Parquet file a split, manifest.json).

The embedded source is data/embedded (see its README), whose held-out questions and plain answers come along. Another folder
(`source: ./my-data`) with Parquet, JSON (a row a line, or one list of rows) or CSV files, gzipped or not, is read the same way. Of a Hub
source, the files of its splits are downloaded at the exact commit; `datasets` says which they are, and what its card says of its licence
goes into the manifest. `splits` says which split of the source plays which part, `columns` and `format` how its tables are laid out
(stages/pairs.py).

Every row of the source has its row here. One that is not of the layout has null parts, and misfits.json, which is there only for such
rows, says why; stages/subset.py stops at it or leaves it out. Only where no row of a split fits, the parameters are wrong: that stops here.
"""

import gzip
import json
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice, starmap
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from datasets import get_dataset_config_names, load_dataset_builder
from datasets.exceptions import DatasetsError
from huggingface_hub import metadata_load
from pydantic import field_validator, model_validator

from stages import hub, params
from stages.artifacts import complete_file, complete_folder, open_parquet, sha256_file, write_json
from stages.console import UserError, run_stage
from stages.pairs import Columns, Format, Misfit, standard_batches, standard_schema

RAW, EMBEDDED = Path("data/raw"), Path("data/embedded")
MISFITS = "misfits.json"
BATCH = 1024
CSV_BLOCK = 1 << 28  # bytes; a row has to fit in, and pyarrow's own 1 MB is less than some answers have
ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz")
Split = Literal["train", "validation", "test"]
Row = dict[str, Any]
Misfits = dict[str, dict[int, Misfit]]  # by split and number of the row
# What reading a file raises that is cut, or is not what its name says.
DAMAGE = (pa.ArrowException, OSError, EOFError, ValueError, zlib.error)
# The type of a JSON column by the types of its values; of another mixture each value is carried along as JSON text.
JSON_TYPES = {
    frozenset({bool}): pa.bool_(),
    frozenset({int}): pa.int64(),
    frozenset({float}): pa.float64(),
    frozenset({int, float}): pa.float64(),
}
CARD = "README.md"
CARD_KEYS = ("license", "license_name", "pretty_name", "authors")


class DataSettings(params.Settings):
    """Where the preference pairs come from, and how they are laid out there."""

    source: str
    revision: str | None
    config: str | None
    splits: dict[Split, str]
    format: Format
    columns: Columns

    @field_validator("splits")
    @classmethod
    def _has_all(cls, splits: dict[Split, str]) -> dict[Split, str]:
        if missing := sorted(set(get_args(Split)) - set(splits)):
            raise ValueError(f"says nothing of {missing[0]}; name a split for each of {', '.join(get_args(Split))}")
        return splits

    @model_validator(mode="after")
    def _fits_its_source(self) -> "DataSettings":
        if self.config is not None and is_folder(self.source):
            raise ValueError(
                f"`config` is {self.config!r}, and {self.source} is a folder, which has none; set it to null"
            )
        if self.columns.question is None and self.format != "messages":
            raise ValueError(f"`columns.question` is null, which `format: {self.format}` cannot be without; name it")
        return self


class Params(params.Params):
    """Parameters of fetch_data."""

    data: DataSettings


def is_folder(source: str) -> bool:
    """Whether a source is a folder here, rather than owner/name on the Hub."""
    return source == "embedded" or source.startswith((".", "/"))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what reading a table file raises into one line.

    Raises:
        UserError: the file is not readable as what its name says.
    """
    try:
        yield
    except DAMAGE as error:
        kind = next(ending for ending in ENDINGS if path.name.endswith(ending))
        raise UserError(f"{path}: not a readable {kind[1:]} file ({error})") from None


def read_all(path: Path, batches: Iterable[list[Row]]) -> Iterator[list[Row]]:
    """The batches of a file. What their consumer raises is no fault of the file."""
    waiting = iter(batches)
    while True:
        with readable(path):
            batch = next(waiting, None)
        if batch is None:
            return
        yield batch


@contextmanager
def opened(path: Path, columns: Columns) -> Iterator[tuple[pa.Schema, Iterator[list[Row]]]]:
    """The schema of a table file and its rows by batches; texts are read as texts, whatever they look like.

    Raises:
        UserError: the file is not readable as what its name says.
    """
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        with readable(path):
            file = open_parquet(path)
        with file:
            yield file.schema_arrow, read_all(path, (batch.to_pylist() for batch in file.iter_batches(BATCH)))
    elif name.endswith(".csv"):
        with readable(path):
            table = read_csv(path, columns)
        yield table.schema, (batch.to_pylist() for batch in table.to_batches(BATCH))
    else:
        with readable(path):
            schema = json_schema(json_rows(path))
        yield schema, read_all(path, json_batches(path, schema, columns))


def read_csv(path: Path, columns: Columns) -> pa.Table:
    """A CSV file, in which the columns that hold texts are not taken for dates or numbers."""
    texts = {name: pa.string() for name in (columns.question, columns.chosen, columns.rejected, columns.system) if name}
    return pyarrow.csv.read_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(block_size=CSV_BLOCK),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=texts),
    )


def json_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSON file: an object a line, or one list of objects.

    pyarrow's own reader takes texts for dates, knows no list, and refuses a row that is longer than its blocks.

    Raises:
        ValueError: it is not JSON.
        UserError: a row is no object.
    """
    with (
        gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else path.open(encoding="utf-8-sig") as file
    ):
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        number, first = next(lines, (0, "[]"))
        is_list = first.lstrip().startswith("[")
        rows = json.loads(first + file.read()) if is_list else starmap(json_line, chain([(number, first)], lines))
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                raise UserError(
                    f"{path}: row {number} is {str(row)[:60]!r}; expected an object with the columns as keys"
                )
            yield row


def json_line(number: int, line: str) -> Any:
    """The value of one line.

    Raises:
        ValueError: it holds none; names the line.
    """
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}: {error.msg}") from None


def json_schema(rows: Iterable[Row]) -> pa.Schema:
    """The columns of JSON rows."""
    kinds: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.items():
            fits = not isinstance(value, int) or -(1 << 63) <= value < 1 << 63
            kinds.setdefault(name, set()).add(type(value) if fits else object)
    return pa.schema(
        [(name, JSON_TYPES.get(frozenset(found - {type(None)}), pa.string())) for name, found in kinds.items()]
    )


def json_batches(path: Path, schema: pa.Schema, columns: Columns) -> Iterator[list[Row]]:
    """The rows of a JSON file, all of its columns in each; what is carried along as JSON text is so already."""
    texts = [field.name for field in schema if field.type == pa.string() and field.name not in columns.used()]
    empty = dict.fromkeys(schema.names)
    waiting = json_rows(path)
    while rows := list(islice(waiting, BATCH)):
        yield [empty | row | {name: as_text(row.get(name)) for name in texts} for row in rows]


def as_text(value: Any) -> str | None:
    """A text as it is, anything else as JSON."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def standardize(sources: list[Path], target: Path, settings: DataSettings, where: str) -> dict[int, Misfit]:
    """Writes the rows of table files, one after another, as one Parquet file in the standard layout; returns those that are not of theirs.

    A Parquet file that is in it already is copied as it is.

    Raises:
        UserError: a file is damaged, a column is missing, no row is of the layout, or the files do not fit together.
    """
    if settings.columns.are_standard(settings.format) and len(sources) == 1 and sources[0].suffix == ".parquet":
        with opened(sources[0], settings.columns) as (found, _):
            standard_schema(found, settings.format, settings.columns, where)
        shutil.copyfile(sources[0], target)
        return {}
    misfits: dict[int, Misfit] = {}
    writer, number = None, 0
    with complete_file(target) as temporary:
        for source in sources:
            with opened(source, settings.columns) as (found, batches):
                schema = standard_schema(found, settings.format, settings.columns, where)
                if writer is None:
                    writer = pq.ParquetWriter(temporary, schema, compression="zstd")
                if schema != writer.schema:
                    raise UserError(f"{where}: {source.name} has other columns than {sources[0].name}")
                for batch, odd in standard_batches(batches, schema, settings.format, settings.columns):
                    writer.write_batch(batch)
                    misfits |= {number + i: misfit for i, misfit in odd.items()}
                    number += batch.num_rows
        if writer is not None:
            writer.close()
        if number and len(misfits) == number:
            raise UserError(
                f"{where}, row 0: {misfits[0]}; no other row fits either, see `data.format` and `data.columns` in params.yaml"
            )
    return misfits


def fetch_folder(folder: Path, settings: DataSettings, target: Path) -> Misfits:
    """Takes the splits of a folder, and its held-out questions and plain answers where it has them; returns the rows that do not fit.

    Raises:
        UserError: a split's file is missing, damaged, or laid out otherwise.
    """
    misfits: Misfits = {}
    for split, name in settings.splits.items():
        found = [folder / f"{name}{ending}" for ending in ENDINGS if (folder / f"{name}{ending}").is_file()]
        if len(found) > 1:
            raise UserError(f"{folder}: {found[0].name} and {found[1].name} are both split {name}; keep one")
        if not found:
            mend = (
                f"restore it with `git checkout {EMBEDDED}`"
                if folder == EMBEDDED
                else f"see `data.splits` in params.yaml; {', '.join(ENDINGS)} are read"
            )
            raise UserError(f"{folder / name}.parquet: no such file; {mend}")
        misfits[split] = standardize(found, target / f"{split}.parquet", settings, str(found[0]))
    for name in ("questions.parquet", "plain.jsonl"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    return misfits


def configurations(source: str, revision: str) -> list[str]:
    """The configurations of a Hub data set; none where it cannot be read."""
    try:
        return list(get_dataset_config_names(source, revision=revision))
    except (*hub.ERRORS, DatasetsError):
        return []


def split_files(source: str, revision: str, config: str | None) -> dict[str, list[str]]:
    """The files of each split of a Hub data set, or of one of its configurations, as `datasets` finds them.

    Raises:
        UserError: the Hub cannot give the data set, it has none, or it has several configurations and this is none of them.
    """
    try:
        found = load_dataset_builder(source, config, revision=revision).config.data_files or {}
    except (*hub.ERRORS, DatasetsError) as error:
        closed = hub.why_closed(source, "dataset")
        names = [] if closed else configurations(source, revision)
        if config not in names and len(names) > (1 if config is None else 0):  # one alone needs no name
            raise UserError(
                f"{source}@{revision}: `data.config` is {'null' if config is None else config}; it has the "
                f"configurations {', '.join(names)}: name one"
            ) from None
        raise hub.failure(closed or error, source, revision) from None
    start = f"hf://datasets/{source}@{revision}/"
    return {str(split): [str(file).removeprefix(start) for file in files] for split, files in found.items()}


def card_terms(card: Path) -> dict[str, Any]:
    """What the metadata of a data set's card say of its licence, its name and its authors; nothing where they are none."""
    try:
        stated = metadata_load(card) or {}
    except Exception:  # the YAML of others
        return {}
    return {key: stated[key] for key in CARD_KEYS if is_text(stated.get(key))}


def is_text(value: Any) -> bool:
    """Whether a value is a text, or a list of some."""
    return bool(value) and all(isinstance(part, str) for part in (value if isinstance(value, list) else [value]))


def fetch_hub(settings: DataSettings, target: Path) -> tuple[Misfits, dict[str, Any]]:
    """Downloads the files of a Hub data set's splits at one commit and takes their rows; returns those that do not fit, and its terms.

    Raises:
        UserError: the revision is not a full commit, the Hub cannot give it, or has no such split.
    """
    source, revision = settings.source, hub.check_revision(settings.revision, "data.revision", settings.source)
    listed = hub.list_files(source, revision, "dataset")
    files = split_files(source, revision, settings.config)
    for name in settings.splits.values():
        if name not in files:
            raise UserError(f"{source}@{revision}: has no split {name}; it has {', '.join(sorted(files))}")
        for file in files[name]:
            if not PurePosixPath(file).name.endswith(ENDINGS):
                raise UserError(f"{source}@{revision}: {file} is not one of {', '.join(ENDINGS)}")
    wanted = {CARD, *(file for name in settings.splits.values() for file in files[name])}
    folder = hub.download(source, revision, "dataset", [file for file in listed if file.path in wanted])
    misfits: Misfits = {}
    for split, name in settings.splits.items():
        where = f"{source}@{revision}, split {name}"
        paths = [folder / file for file in files[name]]
        misfits[split] = standardize(paths, target / f"{split}.parquet", settings, where)
    terms = card_terms(folder / CARD) if (folder / CARD).is_file() else {}
    hub.forget(folder)
    return misfits, terms


def write_misfits(misfits: Misfits, path: Path) -> None:
    """Writes why rows do not fit, by split and number; nothing where all do."""
    found = {
        split: {str(number): {"kind": misfit.kind, "found": str(misfit)} for number, misfit in rows.items()}
        for split, rows in misfits.items()
        if rows
    }
    if found:
        write_json(path, found)


def main() -> None:
    settings = params.load(Params).data
    with complete_folder(RAW) as target:
        on_the_hub: dict[str, Any] = {}
        if is_folder(settings.source):
            folder = EMBEDDED if settings.source == "embedded" else Path(settings.source)
            misfits = fetch_folder(folder, settings, target)
        else:
            misfits, card = fetch_hub(settings, target)
            on_the_hub = {"config": settings.config, "card": card}
        write_misfits(misfits, target / MISFITS)
        rows = {}
        for split in settings.splits:
            with open_parquet(target / f"{split}.parquet") as file:
                rows[split] = file.metadata.num_rows
        manifest = {
            "source": settings.source,
            "revision": settings.revision,
            "rows": rows,
            **on_the_hub,
            "files": {path.name: sha256_file(path) for path in sorted(target.iterdir())},
        }
        write_json(target / "manifest.json", manifest)


if __name__ == "__main__":
    run_stage("fetch_data", main)
