"""Tables of others: Parquet, CSV and JSON files, gzipped or not, as batches of rows."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice, starmap
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from hermes.console import UserError
from hermes.settings.data import Layout

Row = dict[str, Any]
BATCH = 1024
CSV_BLOCK = 1 << 28  # bytes; a row has to fit in, and pyarrow's own 1 MB is less than some answers have
ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz")
# What reading a file raises that is cut, or is not what its name says.
DAMAGE = (pa.ArrowException, OSError, EOFError, ValueError, RecursionError, zlib.error)


MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


class Large(int):
    """An integer that a float column would round."""


class Turns(list[Any]):
    """The messages before a question."""


# The type of a JSON column by the types of its values; of another mixture each value is carried along as JSON text.
JSON_TYPES = {
    frozenset({Large}): pa.int64(),
    frozenset({int, Large}): pa.int64(),
    frozenset({bool}): pa.bool_(),
    frozenset({int}): pa.int64(),
    frozenset({float}): pa.float64(),
    frozenset({int, float}): pa.float64(),
}


@contextmanager
def readable(path: Path, where: str = "") -> Iterator[None]:
    """Turns what reading a table file raises into one line.

    Raises:
        UserError: the file is not readable as what its name says.
    """
    try:
        yield
    except DAMAGE as error:
        kind = next(ending for ending in ENDINGS if path.name.endswith(ending))
        raise UserError(f"{path}: not a readable {kind[1:]} file ({where}{error})") from None


def read_all(path: Path, batches: Iterable[list[Row]]) -> Iterator[list[Row]]:
    """The batches of a file. What their consumer raises is no fault of the file."""
    read, waiting = 0, iter(batches)
    while True:
        with readable(path, f"row {read} or one behind it: "):
            batch = next(waiting, None)
        if batch is None:
            return
        yield batch
        read += len(batch)


def read_table(path: Path, layout: Layout) -> tuple[pa.Schema, Iterator[list[Row]]]:
    """The schema of a table file and its rows by batches; texts are read as texts, whatever they look like.

    Raises:
        UserError: the file is empty, or not readable as what its name says.
    """
    name = path.name.removesuffix(".gz")
    batches: Iterator[list[Row]]
    with readable(path):
        if name.endswith(".parquet"):
            file = pq.ParquetFile(path, memory_map=True)
            schema, batches = file.schema_arrow, (batch.to_pylist() for batch in file.iter_batches(BATCH))
        elif name.endswith(".csv"):
            table = read_csv(path, layout)
            schema, batches = table.schema, (batch.to_pylist() for batch in table.to_batches(BATCH))
        else:
            schema = json_schema(json_rows(path))
            batches = json_batches(path, schema, layout)
        names = schema.names  # of bytes that may be no text
    if not names:
        raise UserError(f"{path}: has no rows")
    return schema, read_all(path, batches)


def read_csv(path: Path, layout: Layout) -> pa.Table:
    """A CSV file, in which the columns that hold texts are not taken for dates or numbers."""
    named = layout.columns
    candidates = layout.choice.candidates if layout.choice else []
    parts = [
        named.question,
        named.chosen,
        named.rejected,
        named.system,
        *([] if isinstance(candidates, str) else candidates),
    ]
    texts = {name: pa.string() for name in parts if name}
    return pyarrow.csv.read_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(block_size=CSV_BLOCK),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=texts),
    )


def json_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSON file: an object a line, or one list of objects.

    The readers of pyarrow and `datasets` take texts for dates, and refuse a file for one half character.

    Raises:
        ValueError: it is not JSON.
        UserError: a row is no object.
    """
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        number, first = next(lines, (0, "[]"))
        is_list = first.lstrip().startswith("[")
        rows = parsed(first + file.read()) if is_list else starmap(json_line, chain([(number, first)], lines))
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                raise UserError(
                    f"{path}: row {number} is {str(row)[:60]!r}; expected an object with the columns as keys"
                )
            yield row


def parsed(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, or an object has a key twice.
    """

    def distinct(pairs: list[tuple[str, Any]]) -> Row:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(
                f"the key {next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))!r} is in an object twice"
            )
        return found

    try:
        return json.loads(text, object_pairs_hook=distinct)
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # int() refuses thousands of digits with advice for programmers
        raise ValueError("a number has too many digits" if "digits" in str(error) else str(error)) from None


def json_line(number: int, line: str) -> Any:
    """The value of one line.

    Raises:
        ValueError: it holds none; names the line.
    """
    try:
        return parsed(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: {getattr(error, 'msg', error)}") from None


def is_message(value: Any) -> bool:
    """Whether a JSON value is a message, in the keys of OpenAI or of ShareGPT."""
    return isinstance(value, dict) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys())


def kind_of(name: str, value: Any) -> type:
    """The type of a JSON value, as `JSON_TYPES` tells them apart."""
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        return object
    if type(value) is int and abs(value) > 1 << 53:
        return Large
    is_turns = name == "context" and isinstance(value, list) and all(map(is_message, value))
    return Turns if is_turns else type(value)


def json_schema(rows: Iterable[Row]) -> pa.Schema:
    """The columns of JSON rows."""
    kinds: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.items():
            kinds.setdefault(name, set()).add(kind_of(name, value))
    return pa.schema(
        [
            (name, MESSAGES if Turns in found else JSON_TYPES.get(frozenset(found - {type(None)}), pa.string()))
            for name, found in kinds.items()
        ]
    )


def json_batches(path: Path, schema: pa.Schema, layout: Layout) -> Iterator[list[Row]]:
    """The rows of a JSON file, all of its columns in each; what is carried along as JSON text is so already."""
    used = {part for name in layout.used() for part in (name, name.partition(".")[0])}
    texts = [field.name for field in schema if field.type == pa.string() and field.name not in used]
    empty = dict.fromkeys(schema.names)
    waiting = json_rows(path)
    while rows := list(islice(waiting, BATCH)):
        yield [empty | row | {name: as_text(row.get(name)) for name in texts} for row in rows]


def as_text(value: Any) -> str | None:
    """A text as it is, anything else as JSON."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
