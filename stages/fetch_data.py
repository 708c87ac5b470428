"""Stage fetch_data: a pinned preference data set -> data/raw (one Parquet file a split, manifest.json).

The embedded source is data/embedded (see its README), whose held-out questions and plain answers come along. Another folder
(`source: ./my-data`) with Parquet, JSON (a row a line, or one list of rows) or CSV files, gzipped or not, is read the same way. Of a Hub
source, the files of its splits are downloaded at the exact commit; `datasets` says which they are, and what its card says of its licence
goes into the manifest. `splits` says which split of the source plays which part, `columns` and `format` how its tables are laid out
(hermes/data/pairs.py).

`mixed_with` names further sources, each with its columns and the share of its rows that is taken.

`decontaminate` names benchmark suites. Of their questions suites.parquet holds hashes, with which stages/subset.py finds pairs that repeat
one (hermes/data/decontamination.py).

The manifest has the sha256 of every file that was read of a folder, so that `make repro` sees a change there.

Every row of the source has its row here, or several where it has several candidates. One that is not of the layout has null parts, and
misfits.json, which is there only for such rows, says why; stages/subset.py stops at it or leaves it out. Only where no row of a split fits,
the parameters are wrong: that stops here.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, cast, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import get_dataset_config_names, load_dataset_builder
from datasets.exceptions import DatasetsError
from huggingface_hub import metadata_load

from hermes import hub, params
from hermes.artifacts import complete_file, complete_folder, open_parquet, sha256_file, write_manifest, write_parquet
from hermes.console import UserError, progress, say
from hermes.data.decontamination import FILE, write_questions
from hermes.data.misfits import Misfit, write_misfits
from hermes.data.pairs import PARTS, holds_messages, standard_batches, standard_schema
from hermes.data.tables import ENDINGS, json_rows, read_table, readable
from hermes.evaluation.benchmarks import SuiteName
from hermes.run import run_stage
from hermes.settings.data import DataSettings, Source, Split
from hermes.settings.sources import is_folder

RAW, EMBEDDED = Path("data/raw"), Path("data/embedded")
Misfits = dict[str, dict[int, Misfit]]  # by split and number of the row
CARD, MIXED_FROM = "README.md", "mixed_from"
PLAIN = ("split", "question", "answer")  # what a row of plain.jsonl needs
QUESTIONS = ("id", "topic", "kind", "constraint", "question", "split")  # columns of questions.parquet
BESIDE = ("questions.parquet", "plain.jsonl")  # what a folder may have beside its splits
CARD_KEYS = ("license", "license_name", "pretty_name", "authors")


class Params(params.Params):
    """Parameters of fetch_data."""

    data: DataSettings


def is_standard(source: Path, found: pa.Schema, settings: Source) -> bool:
    """Whether a table file is one that the stages read as it is."""
    is_layout = source.suffix == ".parquet" and settings.is_standard()
    return is_layout and all(found.field(name).type == kind for name, kind in PARTS.items() if name in found.names)


def common_schema(schemas: list[pa.Schema], where: str) -> pa.Schema:
    """The columns that all files of a split have alike; says which are left out."""

    def has(schema: pa.Schema, field: pa.Field) -> bool:
        return field.name in schema.names and schema.field(field.name).type == field.type

    common = [pa.field(field.name, field.type) for field in schemas[0] if all(has(other, field) for other in schemas)]
    if odd := sorted({name for schema in schemas for name in schema.names} - {field.name for field in common}):
        say(f"fetch_data: {where}: the files differ in {', '.join(odd)}, which is left out")
    return pa.schema(common)


def context_left_out(found: pa.Schema, settings: Source) -> str:
    """Why a table's column `context` is not read as the turns before a question; empty where it is, or where there is none."""
    if "context" not in found.names:
        return ""
    if settings.format != "plain":
        return f"is not read by `format: {settings.format}`"
    return "" if holds_messages(found.field("context").type) else "holds no messages"


def standardize(sources: list[Path], target: Path, settings: Source, where: str) -> dict[int, Misfit]:
    """Writes the rows of table files, one after another, as one Parquet file in the standard layout; returns those that are not of theirs.

    A Parquet file that is in it already is copied as it is.

    Raises:
        UserError: a file is damaged, a column is missing, no row is of the layout, or the files do not fit together.
    """
    misfits: dict[int, Misfit] = {}
    number, tables = 0, [read_table(source, settings) for source in sources]
    schema = common_schema([standard_schema(found, settings, where) for found, _ in tables], where)
    for found, _ in tables:
        if why := context_left_out(found, settings):
            say(f"fetch_data: {where}: its column `context` {why}, and is left out")
            break
    with complete_file(target) as temporary:
        if len(sources) == 1 and is_standard(sources[0], tables[0][0], settings):
            number = sum(map(len, tables[0][1]))  # every row is read, so that a damaged one is found here
            shutil.copyfile(sources[0], temporary)
        else:
            with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
                for found, batches in tables:
                    if context_left_out(found, settings):
                        batches = ([{**row, "context": None} for row in batch] for batch in batches)
                    for batch, odd in standard_batches(batches, schema, settings):
                        writer.write_batch(batch)
                        misfits |= {number + i: misfit for i, misfit in odd.items()}
                        number += batch.num_rows
        if not number:
            raise UserError(f"{where}: has no rows")
        if len(misfits) == number:
            raise UserError(
                f"{where}, row 0: {misfits[0]}; no other row fits either, see `data.format` and `data.columns` in params.yaml"
            )
    return misfits


def source_files(folder: Path, settings: Source) -> dict[str, str]:
    """The sha256 of the files of a folder that are read, by name."""
    names = {f"{name}{ending}" for name in settings.splits.values() for ending in ENDINGS} | set(BESIDE)
    return {name: sha256_file(folder / name) for name in sorted(names) if (folder / name).is_file()}


def fetch_folder(folder: Path, settings: Source, target: Path) -> Misfits:
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
    if (questions := folder / BESIDE[0]).is_file():
        check_questions(questions)
        shutil.copyfile(questions, target / questions.name)
    if (plain := folder / BESIDE[1]).is_file():
        with readable(plain):
            rows = [plain_row(plain, number, row) for number, row in enumerate(json_rows(plain))]
        with complete_file(target / plain.name) as temporary:
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return misfits


def check_questions(path: Path) -> None:
    """Refuses held-out questions that evaluate could not ask.

    Raises:
        UserError: the file is damaged, or a column is missing or no text.
    """
    with readable(path):
        table = pq.read_table(path)
    for name in QUESTIONS:
        kind = table.schema.field(name).type if name in table.column_names else None
        if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"{path}: has no column `{name}` of texts; it needs {', '.join(QUESTIONS)}")
        if table[name].null_count:
            row = table[name].is_null().to_pylist().index(True)
            raise UserError(f"{path}, row {row}: `{name}` is None; expected text")
    if twice := [id for id, count in Counter(table["id"].to_pylist()).items() if count > 1]:
        raise UserError(
            f"{path}: two questions have the id {twice[0]!r:.40}; answers are compared by it, so give each its own"
        )


def plain_row(path: Path, number: int, row: dict[str, Any]) -> dict[str, Any]:
    """A row of the plain answers.

    Raises:
        UserError: a part is missing or no text.
    """
    for name in PLAIN:
        if not isinstance(row.get(name), str):
            raise UserError(f"{path}, row {number}: `{name}` is {row.get(name)!r:.60}; expected text")
        try:
            row[name].encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{path}, row {number}: `{name}` holds half a character ({error.reason})") from None
    if row["split"] not in get_args(Split):
        raise UserError(
            f"{path}, row {number}: `split` is {row['split']!r:.60}; expected one of {', '.join(get_args(Split))}"
        )
    return row


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


def fetch_hub(settings: Source, target: Path) -> tuple[Misfits, dict[str, Any]]:
    """Downloads the files of a Hub data set's splits at one commit and takes their rows; returns those that do not fit, and its terms.

    Raises:
        UserError: the Hub cannot give it, or has no such split.
    """
    source, revision = settings.source, str(settings.revision)
    listed = hub.list_files(source, revision, "dataset")
    files, known = split_files(source, revision, settings.config), {file.path for file in listed}
    for name in settings.splits.values():
        if name not in files:
            raise UserError(f"{source}@{revision}: has no split {name}; it has {', '.join(sorted(files))}")
        for file in files[name]:
            if not PurePosixPath(file).name.endswith(ENDINGS):
                raise UserError(f"{source}@{revision}: {file} is not one of {', '.join(ENDINGS)}")
            if file not in known:  # its card may name an address, or a file of this machine
                raise UserError(f"{source}@{revision}: split {name} is {file}, which is no file of its; choose another")
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


def fetch(settings: Source, target: Path) -> tuple[Misfits, dict[str, Any]]:
    """Takes the splits of one source; returns the rows that do not fit, and what the manifest says of it."""
    if not is_folder(settings.source):
        misfits, card = fetch_hub(settings, target)
        return misfits, {"config": settings.config, "card": card}
    if settings.source == "embedded":  # which DVC watches
        return fetch_folder(EMBEDDED, settings, target), {}
    found = source_files(Path(settings.source), settings)  # before they are read: a change from now on is seen
    return fetch_folder(Path(settings.source), settings, target), {"source_files": found}


def count_rows(folder: Path, splits: Iterable[str]) -> dict[str, int]:
    """The number of rows of each split in a folder."""
    found = {}
    for split in splits:
        with open_parquet(folder / f"{split}.parquet") as file:
            found[split] = file.metadata.num_rows
    return found


def with_context(table: pa.Table) -> pa.Table:
    """A table with a column `context`, which is empty where it had none."""
    if "context" in table.column_names:
        return table
    return table.append_column("context", pa.array([[]] * len(table), PARTS["context"]))


def mix(target: Path, sources: list[tuple[Source, Path, Misfits]]) -> Misfits:
    """Makes one table a split of the tables of several sources, one behind the other; returns the rows of it that do not fit.

    The column `mixed_from` says of each row which source it is of. Columns that only some sources have are left out.

    Raises:
        UserError: only some sources have scores.
    """
    misfits: Misfits = {}
    for split in get_args(Split):
        tables: list[pa.Table] = []
        has_context = False
        found: dict[int, Misfit] = {}
        for settings, folder, odd in sources:
            with open_parquet(folder / f"{split}.parquet") as file:
                table = file.read()
            if MIXED_FROM in table.column_names:
                raise UserError(f"{settings.source}: has a column `{MIXED_FROM}`, which mixing makes itself; rename it")
            has_context |= "context" in table.column_names
            count = max(1, round(table.num_rows * getattr(settings, "share", 1.0)))
            taken = [i * table.num_rows // count for i in range(count)]
            first = sum(other.num_rows for other in tables)
            found |= {first + place: odd[split][row] for place, row in enumerate(taken) if row in odd.get(split, {})}
            names = pa.array([settings.source] * count, pa.string())
            tables.append(table.take(taken).append_column(MIXED_FROM, names))
        if len({"delta_score" in table.column_names for table in tables}) > 1:
            raise UserError(
                "params.yaml: `data.mixed_with`: some sources have scores and others have none; name or drop all"
            )
        if has_context:  # a source without earlier turns has none
            tables = [with_context(table) for table in tables]
        schema = common_schema([table.schema for table in tables], f"mixed {split}")
        parts = [table.select(schema.names).cast(schema) for table in tables]
        write_parquet(target / f"{split}.parquet", pa.concat_tables(parts))
        misfits[split] = found
    return misfits


def fetch_questions(suites: list[SuiteName], target: Path) -> list[dict[str, Any]]:
    """Writes the hashes of the questions of suites; returns which task was read at which revision, with its number of questions."""
    from hermes.evaluation.suite_tasks import questions  # lm-eval takes seconds to import

    texts, read = questions(suites)
    write_questions(progress(texts, "questions", unit="text"), target)
    return read


def main() -> None:
    settings = params.load(Params).data
    with complete_folder(RAW) as target, TemporaryDirectory(dir=target.parent) as scratch:
        misfits, terms = fetch(settings, target)
        sources, mixed = [(cast(Source, settings), target, misfits)], []
        for number, share in enumerate(settings.mixed_with):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            odd, further = fetch(share, folder)
            sources.append((share, folder, odd))
            stated = {"source": share.source, "revision": share.revision, "share": share.share}
            mixed.append({**stated, "rows": count_rows(folder, share.splits), **further})
        if mixed:
            misfits = mix(target, sources)
        write_misfits(misfits, target)
        suites = fetch_questions(settings.decontaminate, target / FILE) if settings.decontaminate else []
        manifest = {
            "source": settings.source,
            "revision": settings.revision,
            "rows": count_rows(target, settings.splits),
            **terms,
            **({"mixed_with": mixed} if mixed else {}),
            **({"suites": suites} if suites else {}),
        }
        write_manifest(target, **manifest)


if __name__ == "__main__":
    run_stage("fetch_data", main)
