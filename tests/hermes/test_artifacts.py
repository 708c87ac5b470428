"""Files that stages hand to each other are whole or absent, and equal content has equal hashes."""

import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from hermes.artifacts import (
    DAYS_KEPT,
    check_together,
    complete_file,
    complete_folder,
    open_parquet,
    prune_scratch,
    read_json,
    sha256_file,
    sha256_folder,
    write_json,
    write_manifest,
    write_parquet,
)
from hermes.console import UserError


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_file_keeps_its_earlier_content_when_writing_fails(tmp_path: Path, error: type[BaseException]) -> None:
    path = write(tmp_path, {"a.txt": "earlier"}) / "a.txt"
    with pytest.raises(error), complete_file(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        assert path.read_text() == "earlier"
        raise error
    assert tree(tmp_path) == {"a.txt": b"earlier"}


def test_a_file_that_was_never_whole_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="half way"), complete_file(tmp_path / "a.txt") as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise ValueError("half way")
    assert tree(tmp_path) == {}


def test_a_whole_file_replaces_the_earlier_one(tmp_path: Path) -> None:
    path = write(tmp_path, {"a.txt": "earlier and longer"}) / "a.txt"
    with complete_file(path) as temporary:
        temporary.write_text("later")
    assert tree(tmp_path) == {"a.txt": b"later"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_folder_keeps_its_earlier_content_when_writing_fails(tmp_path: Path, error: type[BaseException]) -> None:
    write(tmp_path, {"out/a.txt": "earlier", "out/deep/b.txt": "earlier"})
    with pytest.raises(error), complete_folder(tmp_path / "out") as temporary:  # noqa: PT012
        write(temporary, {"a.txt": "half"})
        raise error
    assert tree(tmp_path) == {"out/a.txt": b"earlier", "out/deep/b.txt": b"earlier"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_whole_folder_replaces_the_earlier_one_and_all_in_it(tmp_path: Path) -> None:
    write(tmp_path, {"out/a.txt": "earlier", "out/deep/b.txt": "earlier"})
    with complete_folder(tmp_path / "out") as temporary:
        write(temporary, {"c.txt": "later"})
    assert tree(tmp_path) == {"out/c.txt": b"later"}


def test_what_a_killed_run_left_does_not_get_into_the_folder(tmp_path: Path) -> None:
    with complete_folder(tmp_path / "out") as temporary:
        leftover = temporary
    write(leftover, {"half.txt": "of a killed run"})
    with complete_folder(tmp_path / "out") as temporary:
        assert temporary == leftover
        write(temporary, {"a.txt": "later"})
    assert tree(tmp_path) == {"out/a.txt": b"later"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_without_a_number_is_refused_and_leaves_the_earlier_file(tmp_path: Path, value: float) -> None:
    write_json(tmp_path / "a.json", {"loss": 1.0})
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": [value]})
    assert tree(tmp_path) == before


def test_json_is_read_back_as_written_and_does_not_depend_on_the_order_of_keys(tmp_path: Path) -> None:
    value: dict[str, Any] = {"b": [1, 2.5, None, True], "a": {"é": "日本", "c": ""}}
    write_json(tmp_path / "one.json", value)
    write_json(tmp_path / "two.json", dict(reversed(value.items())))
    assert read_json(tmp_path / "one.json") == value == json.loads((tmp_path / "one.json").read_text(encoding="utf-8"))
    assert sha256_file(tmp_path / "one.json") == sha256_file(tmp_path / "two.json")


def test_missing_and_damaged_json_are_told_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.json: no such file; run `dvc repro`"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b'{"half": ')
    with pytest.raises(UserError, match=r"a\.json: not valid JSON .*; delete it and run `dvc repro`"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"a\.json: not valid JSON"):
        read_json(tmp_path / "a.json")


def test_the_hash_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    (tmp_path / "a").write_bytes(content)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_the_hash_of_a_folder_ignores_order_of_making_time_and_place(tmp_path: Path) -> None:
    files = {"a.txt": "1", "b/c.txt": "2", "b/a.txt": "3", "z": ""}
    one = write(tmp_path / "one", files)
    two = write(tmp_path / "two", dict(reversed(files.items())))
    for path in two.rglob("*"):
        os.utime(path, (0, 0))
    (two / "an empty folder").mkdir()
    assert sha256_folder(one) == sha256_folder(two)


@pytest.mark.parametrize(
    "files",
    [
        {"a.txt": "1", "b.txt": "3"},
        {"a.txt": "1", "c.txt": "2"},
        {"a.txt": "2", "b.txt": "1"},
        {"a.txt": "1", "d/b.txt": "2"},
        {"a.txt": "1"},
        {"a.txt": "1", "b.txt": "2", "c.txt": ""},
        {"a.txt": "12", "b.txt": ""},
    ],
)
def test_the_hash_of_a_folder_depends_on_names_and_content(tmp_path: Path, files: dict[str, str]) -> None:
    one, two = write(tmp_path / "one", {"a.txt": "1", "b.txt": "2"}), write(tmp_path / "two", files)
    assert sha256_folder(one) != sha256_folder(two)


def test_a_table_is_written_to_the_same_bytes_and_read_back(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "é", ""], "ids": [[1], [], [2, 3]], "score": [0.1, -1.0, 2e-9]})
    for name in ("one", "two"):
        write_parquet(tmp_path / name, table)
    assert sha256_file(tmp_path / "one") == sha256_file(tmp_path / "two")
    with open_parquet(tmp_path / "one") as file:
        assert file.read().equals(table)


OLD = ("train/a", "train/locked", "hub/models--o--n/main", "check/tmp1", "rehearsal/a40", "verify-1", "tmp2")
RECENT = ("train/b", "verify-2", "suites/c")


def test_what_killed_runs_left_is_removed_when_it_is_old_and_nobody_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder is as old as its newest file; what saves work later on (suites) stays."""
    monkeypatch.chdir(tmp_path)
    past = time.time() - (DAYS_KEPT + 1) * 86400
    for name in (*OLD, *RECENT):
        write(tmp_path / ".scratch" / name, {"old": "1", "newest": "2"})
    for path in (*(tmp_path / ".scratch").rglob("*"),):
        if path.name != "newest" or path.parent.name not in ("b", "verify-2"):
            os.utime(path, (past, past))
    with FileLock(tmp_path / ".scratch/train/locked.lock"):
        prune_scratch("train")
    kept = {path.parent.relative_to(tmp_path / ".scratch").as_posix() for path in tmp_path.rglob("newest")}
    assert kept == {*RECENT, "train/locked"}
    assert not [path for path in tmp_path.rglob("*.lock") if path.name != "locked.lock"]
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert said.startswith("train: removed from .scratch what nothing has changed for 14 days: check/tmp1, hub/")
    os.utime(tmp_path / ".scratch/train/locked", (past, past))
    prune_scratch("verify")
    assert "train/locked" in capsys.readouterr().out
    prune_scratch("verify")
    assert capsys.readouterr().out == ""


def test_missing_and_damaged_parquet_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.parquet: no such file; run `dvc repro` to make it"):
        open_parquet(tmp_path / "a.parquet")
    pq.write_table(pa.table({"a": list(range(1000))}), tmp_path / "whole.parquet")
    for content in (b"", b"PAR1", b"not parquet at all", (tmp_path / "whole.parquet").read_bytes()[:-9]):
        (tmp_path / "a.parquet").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file") as caught:
            open_parquet(tmp_path / "a.parquet")
        assert "\n" not in str(caught.value)


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two folders, the second made from the first."""
    monkeypatch.chdir(tmp_path)
    made, source = Path("made"), Path("source")
    for folder in (source, made):
        folder.mkdir()
        (folder / "weights").write_bytes(b"abc")
    (made / "inner").mkdir()
    (made / "inner/more").write_text("more")
    write_manifest(source, revision="1")
    write_manifest(made, made_from=check_together(source))
    return source, made


def test_a_manifest_has_what_is_stated_and_all_hashes(pair: tuple[Path, Path]) -> None:
    source, made = pair
    abc = hashlib.sha256(b"abc").hexdigest()
    assert read_json(source / "manifest.json") == {"revision": "1", "files": {"weights": abc}}
    assert read_json(made / "manifest.json") == {
        "files": {"inner/more": hashlib.sha256(b"more").hexdigest(), "weights": abc},
        "made_from": {"source": sha256_file(source / "manifest.json")},
    }
    hashes = {str(folder): sha256_file(folder / "manifest.json") for folder in pair}
    assert check_together(*pair) == hashes
    write_manifest(source, {"weights": "known"}, revision="1")
    assert read_json(source / "manifest.json")["files"] == {"weights": "known"}


@pytest.mark.parametrize(
    ("name", "content", "how"),
    [
        ("weights", b"abd", "differs"),
        ("weights", None, "is missing"),
        ("inner/more", b"less", "differs"),
        ("inner/other", b"", "does not belong there"),
        (".hidden", b"", "does not belong there"),
    ],
)
def test_a_file_that_is_not_as_its_manifest_says_is_refused(
    pair: tuple[Path, Path], name: str, content: bytes | None, how: str
) -> None:
    path = pair[1] / name
    path.unlink() if content is None else path.write_bytes(content)
    message = rf"^made: {re.escape(name)} {how}, says its manifest\.json; delete it and run `dvc repro`$"
    with pytest.raises(UserError, match=message):
        check_together(*pair)
    check_together(pair[0])


def test_a_folder_made_from_another_is_refused_where_both_are_read(pair: tuple[Path, Path]) -> None:
    source, made = pair
    (source / "weights").write_bytes(b"abd")
    write_manifest(source)
    for folder in pair:
        check_together(folder)
    message = r"^made: was made from another source than the one here; delete it and run `dvc repro`$"
    with pytest.raises(UserError, match=message):
        check_together(made, source)


@pytest.mark.parametrize("content", ["{}", '{"files": []}', '{"files": null, "made_from": 1}', "[]", "{", None])
def test_a_damaged_manifest_is_refused_in_one_line(pair: tuple[Path, Path], content: str | None) -> None:
    path = pair[1] / "manifest.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=r"^made.*manifest\.json.*run `dvc repro`") as error:
        check_together(*pair)
    assert "\n" not in str(error.value)
