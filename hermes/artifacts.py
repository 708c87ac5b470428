"""Files that stages hand to each other: hashed, canonical, and never half-written."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from hermes.console import UserError, say
from hermes.shortage import lack

REMAKE = "delete it and run `dvc repro`"
MANIFEST = "manifest.json"
# What a killed run leaves in .scratch: checkpoints, downloads, and the working folders of stages and tools. Not what saves work later on.
LEFT_BEHIND = ("train/*", "hub/*/*", "check/*", "rehearsal/*", "verify-*", "tmp*")
DAYS_KEPT = 14


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal.

    Raises:
        UserError: the file is missing.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `dvc repro` to make it") from None


def sha256_folder(folder: Path) -> str:
    """The sha256 over the sorted relative names and contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def file_hashes(folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """The sha256 of every file of a folder but for its manifest, by name; some may be known."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: known.get(name) or sha256_file(folder / name) for name in names if name != MANIFEST}


def write_manifest(folder: Path, known: Mapping[str, str] = MappingProxyType({}), **stated: Any) -> None:
    """Writes what is stated of a folder, as `made_from` (`check_together`), and the sha256 of its files."""
    write_json(folder / MANIFEST, {**stated, "files": file_hashes(folder, known)})


def check_together(*folders: Path) -> dict[str, str]:
    """Refuses folders that are not as their manifests say, or of which one was made from another than is here.

    A folder's hash is that of its manifest, which has those of its files and of the folders that it was made from. Every byte is read
    once, about a second a gigabyte.

    Returns:
        the hash of each folder, for the manifest of what is made from them.

    Raises:
        UserError: names the folder.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; run `dvc repro` to make it")
    hashes = {folder.as_posix(): sha256_file(folder / MANIFEST) for folder in folders}
    for folder in folders:
        manifest = read_object(folder / MANIFEST)
        stated, made_from = (
            value if isinstance(value := manifest.get(name), dict) else {} for name in ("files", "made_from")
        )
        found = file_hashes(folder)
        for name in sorted({*found, *stated}):
            if found.get(name) != stated.get(name):
                how = "is missing" if name not in found else "differs" if name in stated else "does not belong there"
                raise UserError(f"{folder}: {name} {how}, says its {MANIFEST}; {REMAKE}")
        for name in sorted(hashes.keys() & made_from.keys()):
            if made_from[name] != hashes[name]:
                raise UserError(f"{folder}: was made from another {name} than the one here; {REMAKE}")
    return hashes


def scratch_folder(name: str) -> Path:
    """The folder `.scratch/NAME` of the checkout, also inside the temporary copies that DVC makes of it for experiments."""
    checkout = str(Path.cwd()).split("/.dvc/tmp/exps/")[0]
    return Path(checkout) / ".scratch" / name


def last_change(path: Path) -> float:
    """When a file or a folder, or anything in it, was changed last."""
    return max(one.lstat().st_mtime for one in (path, *path.rglob("*")))


def prune_scratch(name: str) -> None:
    """Removes what killed runs left in .scratch so many days ago, unless its lock is held; the program `name` says what."""
    root, removed = scratch_folder("."), []
    for path in sorted(path for pattern in LEFT_BEHIND for path in root.glob(pattern)):
        try:
            if path.suffix == ".lock" or time.time() - last_change(path) < DAYS_KEPT * 86400:
                continue
            with FileLock(f"{path}.lock", timeout=0):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                Path(f"{path}.lock").unlink()
        except (Timeout, OSError):  # it is in use, or not ours
            continue
        removed.append(path.relative_to(root).as_posix())
    if removed:
        say(f"{name}: removed from .scratch what nothing has changed for {DAYS_KEPT} days: {', '.join(removed)}")


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yields a temporary neighbour of `path` to write to; it takes the name only when the block has ended well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary neighbour of the folder `path`; it replaces the folder only when the block has ended well."""
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON with sorted keys; not-a-number values are refused, since no reader agrees on them."""
    with complete_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, mend: str = REMAKE) -> Any:
    """Reads a JSON file that a stage wrote; another one's has another `mend`.

    Raises:
        UserError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `dvc repro` to make it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); {mend}") from None


def read_object(path: Path, mend: str = REMAKE) -> dict[str, Any]:
    """Reads a JSON file that holds one object.

    Raises:
        UserError: as `read_json`, or it holds something else.
    """
    found = read_json(path, mend)
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds {str(found)[:40]!r}; expected an object; {mend}")
    return found


def write_parquet(path: Path, table: pa.Table) -> None:
    """Writes a table as zstd-compressed Parquet; equal tables give equal bytes under one pyarrow version."""
    with complete_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", compression_level=19, row_group_size=1024)


class StageTable(pq.ParquetFile):
    """A Parquet file that a stage wrote, whose rows may be damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(path, memory_map=True)

    def iter_batches(self, *args: Any, **kwargs: Any) -> Iterator[pa.RecordBatch]:
        with readable_table(self.path):
            yield from super().iter_batches(*args, **kwargs)

    def read(self, columns: Sequence[str] | None = None, **kwargs: Any) -> pa.Table:
        found = self.schema_arrow.names
        if missing := [name for name in columns or () if name not in found]:
            raise UserError(f"{self.path}: has no column `{missing[0]}`, but {', '.join(found)}; {REMAKE}")
        with readable_table(self.path):
            return super().read(columns, **kwargs)


@contextmanager
def readable_table(path: Path) -> Iterator[None]:
    """Turns what reading a Parquet file raises into one line.

    Raises:
        UserError: it is damaged.
    """
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `dvc repro` to make it") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if lack(error):
            raise
        raise UserError(f"{path}: not a readable Parquet file ({error}); {REMAKE}") from None


def open_parquet(path: Path) -> StageTable:
    """Opens a Parquet file that a stage wrote, without reading its rows.

    Raises:
        UserError: the file is missing or is not Parquet.
    """
    with readable_table(path):
        file = StageTable(path)
        _ = file.schema_arrow.names  # a damaged one may be no text
        return file
