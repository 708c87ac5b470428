"""Data and model arrive at exactly the pinned commit, complete or not at all; what goes wrong is one line."""

import gzip
import hashlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hermes import hub as hermes_hub
from hermes import params
from hermes.artifacts import sha256_file
from hermes.console import UserError
from hermes.data import tables
from hermes.model.base_check import check_base
from hermes.model.gguf_files import PROBES
from stages import fetch_data, fetch_model, subset
from tests.conftest import CHAT_TEMPLATE, cpu_params

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SPLITS = ("train", "validation", "test")
COLUMNS = {"question": "question", "chosen": "chosen", "rejected": "rejected", "score": "delta_score", "system": None}
ROWS = [
    {"question": f"q{i}", "chosen": f"c{i}", "rejected": f"r{i}", "delta_score": i / 8, "id": str(i)} for i in range(5)
]


PLAIN = '{"id": "a", "split": "test", "question": "What is tea?", "answer": "A drink – hot."}\n'
LARGE = (".safetensors", ".parquet", ".gz")


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub that a download at a pinned commit asks for: repository info, file tree, files.

    Large files are answered as the Hub does: a redirect to another place, which serves ranges.
    """

    # {"models/owner/name": {file: bytes}}, at COMMIT only; and all that was asked for.
    repositories: dict[str, dict[str, bytes]]
    asked: list[str]
    # Files whose connection is cut after so many bytes, so many times; files that arrive with other bytes; repositories for a token.
    cut: dict[str, list[int]]
    corrupt: set[str]
    gated: set[str]

    def log_message(self, *arguments: object) -> None:
        pass

    def send(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), Content_Type="application/json")

    @staticmethod
    def entries(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, object]]:
        """The files in a folder, and the folders in it where it is not read recursively."""
        inside = [name for name in sorted(files) if name.startswith(folder and f"{folder}/")]
        skip = len(folder) + 1 if folder else 0
        folders = {name[: name.index("/", skip)] for name in inside if "/" in name[skip:]}
        found: list[dict[str, object]] = [
            {"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(folders)
        ]
        for name in inside:
            if recursive or "/" not in name[skip:]:
                entry = {"type": "file", "path": name, "size": len(files[name]), "oid": git_blob(files[name])}
                if name.endswith(LARGE):
                    sha256 = hashlib.sha256(files[name]).hexdigest()
                    entry |= {"oid": "0" * 40, "lfs": {"oid": sha256, "size": len(files[name]), "pointerSize": 130}}
                found.append(entry)
        return found

    def may_read(self, name: str) -> bool:
        return name not in self.gated or self.headers.get("Authorization") == "Bearer hf_good"

    def answer(self) -> None:
        path, query = urlsplit(self.path).path, urlsplit(self.path).query
        self.asked.append(f"{self.command} {path} {self.headers.get('Range') or ''}".strip())
        if path.startswith("/storage/"):
            return self.send_range(path.removeprefix("/storage/"))
        posted = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        for name, files in self.repositories.items():
            if path in (f"/api/{name}", f"/api/{name}/revision/{COMMIT}"):
                info = {"id": name.split("/", 1)[1], "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
                return self.send_json(info)
            tree = f"/api/{name}/tree/{COMMIT}"
            if path == tree or path.startswith(f"{tree}/"):
                return self.send_json(
                    self.entries(files, path.removeprefix(tree).strip("/"), "recursive=true" in query.lower())
                )
            if path == f"/api/{name}/paths-info/{COMMIT}":
                return self.send_json(
                    [entry for entry in self.entries(files, "", True) if entry["path"] in parse_qs(posted)["paths"]]
                )
            if path == f"/api/{name}/auth-check":
                return self.send_json({}) if self.may_read(name) else self.send(401, X_Error_Code="GatedRepo")
            resolve = f"/{name.removeprefix('models/')}/resolve/{COMMIT}/"
            if path.startswith(resolve) and not self.may_read(name):
                return self.send(401, X_Error_Code="GatedRepo")
            if path.startswith(resolve) and path.removeprefix(resolve) in files:
                file = path.removeprefix(resolve)
                body = files[file]
                if file.endswith(LARGE):
                    linked = {"X_Linked_Size": str(len(body)), "X_Linked_Etag": f'"{hashlib.sha256(body).hexdigest()}"'}
                    return self.send(302, Location=f"/storage/{name}:{file}", X_Repo_Commit=COMMIT, **linked)  # type: ignore[arg-type]
                return self.send(200, body, ETag=f'"{git_blob(body)}"', X_Repo_Commit=COMMIT)
            if path.startswith((resolve, f"/api/{name}/")):
                return self.send(404, X_Error_Code="EntryNotFound" if path.startswith(resolve) else "RevisionNotFound")
        return self.send(404, X_Error_Code="RepoNotFound")

    def send_range(self, place: str) -> None:
        name, file = place.split(":")
        body = self.repositories[name][file]
        if file in self.corrupt:
            body = body[:-1] + bytes([body[-1] ^ 1])
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        headers = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if asked else {}
        if self.command == "GET" and self.cut.get(file):
            stop = self.cut[file].pop(0)
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.wfile.write(body[start:stop])
            self.close_connection = True
            return
        self.send(206 if asked else 200, body[start:], **headers)

    do_GET = do_HEAD = do_POST = answer


@pytest.fixture(scope="module")
def hub(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Hub on the loopback with the model tests/tiny, beside pickles and code, and the data set tests/pairs."""
    model = {path.name: path.read_bytes() for path in tiny_model_folder.iterdir() if path.name != "manifest.json"}
    model |= {"pytorch_model.bin": b"a pickle", "modeling_evil.py": b"raise SystemExit", "README.md": b"# tiny"}
    table = tmp_path_factory.mktemp("pairs") / "table.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), table)
    Hub.repositories = {
        "models/tests/tiny": model,
        "datasets/tests/pairs": {
            f"data/{split}-00000-of-00001.parquet": table.read_bytes() for split in ("train", "test")
        },
    }
    Hub.asked, Hub.cut, Hub.corrupt, Hub.gated = [], {}, set(), set()
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run stages in, that knows no Hub; retries there do not wait."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "dvc.yaml", "dvc.yaml")
    Path("quick").mkdir()
    Path("quick/sitecustomize.py").write_text("import time\ntime.sleep = lambda seconds: None\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), "quick"]))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HERMES_TRACEBACK", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path


def choose(
    section: str, source: str, revision: str | None, splits: dict[str, str] | None = None, **others: Any
) -> None:
    """Writes a params.yaml (JSON is YAML) that selects this source; splits that are not given are the first one given."""
    chosen: dict[str, Any] = {"source": source, "revision": revision}
    if section == "data":
        chosen |= {"config": None, "format": "plain", "columns": COLUMNS, "choice": None, "mixed_with": []} | others
    else:
        chosen |= {"chat_template": None} | others
    if splits:
        chosen["splits"] = dict.fromkeys(SPLITS, next(iter(splits.values()))) | splits
    Path("params.yaml").write_text(json.dumps(cpu_params(**{section: chosen})))


def run(stage: str, endpoint: str) -> subprocess.CompletedProcess[str]:
    """Runs a stage as a user does, against this Hub."""
    environment = os.environ | {"HF_ENDPOINT": endpoint}
    command = [sys.executable, "-m", f"stages.{stage}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def complaint(finished: subprocess.CompletedProcess[str], stage: str) -> str:
    """The one line in which a stage said why it failed."""
    assert finished.returncode == 1
    assert "Traceback" not in finished.stderr
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith(f"{stage}: ")]
    assert finished.stderr.rstrip().endswith(line)
    return line


@pytest.fixture
def no_network() -> str:
    """An address at which nobody listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{closed.getsockname()[1]}"


def embed(splits: tuple[str, ...] = SPLITS) -> None:
    """Writes a small data/embedded."""
    fetch_data.EMBEDDED.mkdir(parents=True)
    for split in splits:
        pq.write_table(
            pa.Table.from_pylist([row | {"split": split} for row in ROWS]), fetch_data.EMBEDDED / f"{split}.parquet"
        )
    pq.write_table(
        pa.Table.from_pylist([dict.fromkeys(fetch_data.QUESTIONS, "q")]), fetch_data.EMBEDDED / "questions.parquet"
    )
    (fetch_data.EMBEDDED / "plain.jsonl").write_text(PLAIN)


def test_embedded_data_arrives_unchanged_with_the_held_out_questions(workplace: Path) -> None:
    embed()
    choose("data", "embedded", None, dict(zip(SPLITS, SPLITS, strict=True)))
    fetch_data.main()
    manifest = json.loads(Path("data/raw/manifest.json").read_text())
    names = [*(f"{split}.parquet" for split in SPLITS), "plain.jsonl", "questions.parquet"]
    assert manifest["files"] == {name: sha256_file(fetch_data.EMBEDDED / name) for name in names}
    assert manifest["files"] == {name: sha256_file(Path("data/raw") / name) for name in names}
    assert manifest["rows"] == dict.fromkeys(SPLITS, len(ROWS))
    assert set(manifest) == {"source", "revision", "rows", "files"}
    assert (manifest["source"], manifest["revision"]) == ("embedded", None)


def test_a_split_may_play_another_part(workplace: Path) -> None:
    embed()
    choose("data", "embedded", None, {"train": "validation", "test": "train"})
    fetch_data.main()
    assert sorted(path.stem for path in Path("data/raw").glob("*.parquet")) == ["questions", *sorted(SPLITS)]
    assert pq.read_table("data/raw/train.parquet")["split"].unique().to_pylist() == ["validation"]
    assert pq.read_table("data/raw/test.parquet")["split"].unique().to_pylist() == ["train"]


def test_a_missing_split_is_named_and_leaves_the_earlier_data(workplace: Path) -> None:
    embed(splits=("train", "test"))
    choose("data", "embedded", None, {"train": "train"})
    fetch_data.main()
    before = {path.name: path.read_bytes() for path in Path("data/raw").iterdir()}
    choose("data", "embedded", None, {"train": "train", "validation": "validation"})
    with pytest.raises(UserError, match=r"^data/embedded/validation\.parquet: no such file; .*git checkout"):
        fetch_data.main()
    assert {path.name: path.read_bytes() for path in Path("data/raw").iterdir()} == before


@pytest.mark.parametrize("column", ["question", "chosen", "rejected", "delta_score"])
def test_a_missing_column_is_named_with_those_found(workplace: Path, column: str) -> None:
    embed()
    rows = [{name: value for name, value in row.items() if name != column} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), fetch_data.EMBEDDED / "train.parquet")
    choose("data", "embedded", None, {"train": "train"})
    with pytest.raises(UserError) as caught:
        fetch_data.main()
    found = ", ".join(rows[0])
    assert f"data/embedded/train.parquet: column `{column}` is missing; found {found}" in str(caught.value)


@pytest.mark.parametrize(
    "revision", [None, "", "main", COMMIT[:7], COMMIT[:39], COMMIT + "0", COMMIT.upper(), COMMIT + "\n"]
)
@pytest.mark.parametrize("stage", ["fetch_data", "fetch_model"])
def test_only_a_full_commit_is_a_revision(workplace: Path, stage: str, revision: str | None) -> None:
    section = stage.removeprefix("fetch_")
    choose(section, "tests/tiny", revision, {"train": "train"} if section == "data" else None)
    module = {"fetch_data": fetch_data, "fetch_model": fetch_model}[stage]
    with pytest.raises(
        UserError, match=rf"`profiles\.cpu\.{section}`: `revision` is .*pin the full 40-digit commit of tests/tiny"
    ) as caught:
        module.main()
    assert repr(revision or "") in str(caught.value) or repr(revision) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("data/raw").exists()
    assert not Path("models/base").exists()


@pytest.mark.parametrize("source", ["", "~/mine", "my mine", "a/b/c"])
@pytest.mark.parametrize("stage", ["fetch_data", "fetch_model"])
def test_a_source_that_is_neither_a_name_nor_a_folder_is_refused(workplace: Path, stage: str, source: str) -> None:
    section, module = stage.removeprefix("fetch_"), {"fetch_data": fetch_data, "fetch_model": fetch_model}[stage]
    choose(section, source, None, {"train": "train"} if section == "data" else None)
    with pytest.raises(UserError, match=rf"`source` is '{source}'; write .*begins with \./ or /$"):
        module.main()


@pytest.mark.parametrize("source", ["embedded", "./mine"])
@pytest.mark.parametrize("stage", ["fetch_data", "fetch_model"])
def test_a_revision_is_not_claimed_for_what_has_none(workplace: Path, stage: str, source: str) -> None:
    section, module = stage.removeprefix("fetch_"), {"fetch_data": fetch_data, "fetch_model": fetch_model}[stage]
    choose(section, source, "abc", {"train": "train"} if section == "data" else None)
    with pytest.raises(UserError, match=rf"`revision` is 'abc', and {source} is no Hub repository; set it to null$"):
        module.main()


def test_a_model_with_code_of_its_own_is_refused_before_its_weights_come(
    workplace: Path, hub: str, tiny_model_folder: Path
) -> None:
    shutil.copytree(tiny_model_folder, "mine")
    Path("mine/tokenizer_evil.py").write_text("raise SystemExit")
    choose("model", "./mine", None)
    fetch_model.main()
    assert not list(Path("models/base").glob("*.py"))
    config = Path("mine/tokenizer_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoTokenizer": ["x.Y", None]}}))
    with pytest.raises(UserError, match=r"^mine: tokenizer_config\.json names code of the model's own \(`auto_map`\)"):
        fetch_model.main()
    Hub.repositories["models/tests/code"] = {path.name: path.read_bytes() for path in Path("mine").iterdir()}
    mark = len(Hub.asked)
    choose("model", "tests/code", COMMIT)
    assert "tests/code: tokenizer_config.json names code" in complaint(run("fetch_model", hub), "fetch_model")
    assert not [line for line in Hub.asked[mark:] if "model.safetensors" in line or ".py" in line]


def test_a_model_from_the_hub_is_the_pinned_one_without_pickles_and_code(
    workplace: Path, hub: str, tiny_model_folder: Path
) -> None:
    choose("model", "tests/tiny", COMMIT)
    finished = run("fetch_model", hub)
    assert finished.returncode == 0, finished.stderr
    wanted = json.loads((tiny_model_folder / "manifest.json").read_text())["files"]
    manifest = json.loads(Path("models/base/manifest.json").read_text())
    assert manifest == {"source": "tests/tiny", "revision": COMMIT, "files": wanted}
    assert {
        path.name: sha256_file(path) for path in Path("models/base").iterdir() if path.name != "manifest.json"
    } == wanted


def test_data_from_the_hub_are_the_rows_of_the_pinned_commit(workplace: Path, hub: str) -> None:
    choose("data", "tests/pairs", COMMIT, {"train": "train", "validation": "test"})
    finished = run("fetch_data", hub)
    assert finished.returncode == 0, finished.stderr
    for split in ("train", "validation"):
        assert pq.read_table(f"data/raw/{split}.parquet").to_pylist() == ROWS
    manifest = json.loads(Path("data/raw/manifest.json").read_text())
    assert manifest["revision"] == COMMIT
    assert (manifest["config"], manifest["card"]) == (None, {})  # it has no card
    assert manifest["files"] == {f"{split}.parquet": sha256_file(Path(f"data/raw/{split}.parquet")) for split in SPLITS}


def test_a_repository_without_safetensors_is_refused(workplace: Path, hub: str) -> None:
    Hub.repositories["models/tests/pickled"] = {"config.json": b"{}", "pytorch_model.bin": b"a pickle"}
    choose("model", "tests/pickled", COMMIT)
    line = complaint(run("fetch_model", hub), "fetch_model")
    assert f"tests/pickled@{COMMIT}: has no safetensors weights" in line
    assert not Path("models/base").exists()


def test_weights_in_a_folder_of_the_repository_and_those_of_other_programs_are_left_out(
    workplace: Path, hub: str
) -> None:
    others = ("original/model.safetensors", "consolidated.safetensors", "adapter_model.safetensors")
    files = {"config.json": b"{}", "model.safetensors": b"weights", **dict.fromkeys(others, b"others")}
    Hub.repositories["models/tests/folders"] = files
    choose("model", "tests/folders", COMMIT)
    assert run("fetch_model", hub).returncode == 0
    manifest = json.loads(Path("models/base/manifest.json").read_text())
    assert sorted(manifest["files"]) == ["config.json", "model.safetensors"]


def asked_since(mark: int, file: str) -> list[str]:
    return [line for line in Hub.asked[mark:] if line.startswith("GET /storage/") and f":{file}" in line]


def scratch() -> list[str]:
    """What is left of downloads."""
    return sorted(path.name for path in Path(".scratch/hub").rglob("*") if path.is_file())


MB = 1 << 20
LARGE_FILE = random.Random(0).randbytes(25 * MB)  # the Hub's client keeps what came in pieces of 10 MB


@pytest.fixture
def large(hub: str) -> str:
    """The Hub, with a model of 25 MB."""
    Hub.repositories["models/tests/large"] = {"config.json": b"{}", "model.safetensors": LARGE_FILE}
    return hub


def test_a_download_that_is_cut_goes_on_where_it_stopped(workplace: Path, large: str) -> None:
    Hub.cut, mark = {"model.safetensors": [12 * MB, 23 * MB]}, len(Hub.asked)
    choose("model", "tests/large", COMMIT)
    finished = run("fetch_model", large)
    assert finished.returncode == 0, finished.stderr
    ranges = [line.rpartition(" ")[2] for line in asked_since(mark, "model.safetensors")]
    assert ranges[1:] == [f"bytes={10 * MB}-", f"bytes={20 * MB}-"]
    assert Path("models/base/model.safetensors").read_bytes() == LARGE_FILE
    assert scratch() == []


def test_a_run_goes_on_where_one_that_failed_stopped(workplace: Path, large: str) -> None:
    Hub.cut = {"model.safetensors": [12 * MB] * 50}  # nothing comes after that
    choose("model", "tests/large", COMMIT)
    line = complaint(run("fetch_model", large), "fetch_model")
    assert f"tests/large@{COMMIT}: cannot be fetched from the Hub" in line
    assert "model.safetensors.partial" in scratch()
    Hub.cut, mark = {}, len(Hub.asked)
    assert run("fetch_model", large).returncode == 0
    assert [entry.rpartition(" ")[2] for entry in asked_since(mark, "model.safetensors")] == [f"bytes={10 * MB}-"]
    assert not [
        entry for entry in Hub.asked[mark:] if entry.startswith("GET") and "config.json" in entry
    ]  # complete already
    assert Path("models/base/model.safetensors").read_bytes() == LARGE_FILE
    assert scratch() == []


@pytest.mark.parametrize(
    ("stage", "file"), [("fetch_model", "model.safetensors"), ("fetch_data", "data/train-00000-of-00001.parquet")]
)
def test_bytes_of_another_hash_are_removed(workplace: Path, hub: str, stage: str, file: str) -> None:
    section, source = stage.removeprefix("fetch_"), {"fetch_model": "tests/tiny", "fetch_data": "tests/pairs"}[stage]
    choose(section, source, COMMIT, {"train": "train"} if section == "data" else None)
    Hub.corrupt = {file}
    line = complaint(run(stage, hub), stage)
    assert (
        f"{source}@{COMMIT}: {file} arrived with another hash than the Hub lists; it is removed, run this again" in line
    )
    Hub.corrupt = set()
    assert run(stage, hub).returncode == 0
    assert scratch() == []


@pytest.mark.parametrize("stage", ["fetch_data", "fetch_model"])
def test_an_unknown_commit_and_an_unknown_repository_are_told_apart(workplace: Path, hub: str, stage: str) -> None:
    section, source = stage.removeprefix("fetch_"), {"fetch_model": "tests/tiny", "fetch_data": "tests/pairs"}[stage]
    splits = {"train": "train"} if section == "data" else None
    choose(section, source, "f" * 40, splits)
    assert complaint(run(stage, hub), stage).endswith(
        f"{source}@{'f' * 40}: the Hub knows no such commit of it; see its history"
    )
    choose(section, "tests/nothing", COMMIT, splits)
    assert "tests/nothing@" in (line := complaint(run(stage, hub), stage))
    assert line.endswith("the Hub shows no such repository; check the name, and HF_TOKEN if it is private")


@pytest.mark.parametrize("stage", ["fetch_data", "fetch_model"])
def test_a_gated_repository_opens_with_a_token(
    workplace: Path, hub: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, source = stage.removeprefix("fetch_"), {"fetch_model": "tests/tiny", "fetch_data": "tests/pairs"}[stage]
    choose(section, source, COMMIT, {"train": "train"} if section == "data" else None)
    Hub.gated = {"models/tests/tiny", "datasets/tests/pairs"}
    try:
        monkeypatch.delenv("HF_TOKEN", raising=False)
        line = complaint(run(stage, hub), stage)
        assert line.endswith("it is gated: accept its licence on its page, and set HF_TOKEN to a token of that account")
        monkeypatch.setenv("HF_TOKEN", "hf_good")
        assert run(stage, hub).returncode == 0
    finally:
        Hub.gated = set()


def test_a_split_of_several_files_in_another_layout(workplace: Path, hub: str) -> None:
    """UltraFeedback's: whole conversations beside the prompt, and the scores of both answers."""

    def shard(start: int) -> bytes:
        rows = [
            {
                "prompt": f"q{i}",
                "chosen": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"c{i}"}],
                "rejected": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"r{i}"}],
                "score_chosen": 9.0,
                "score_rejected": float(i),
            }
            for i in range(start, start + 3)
        ]
        return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())

    Hub.repositories["datasets/tests/feedback"] = {f"data/train-0000{i}.jsonl.gz": shard(3 * i) for i in range(2)}
    columns = {
        "question": "prompt",
        "chosen": "chosen",
        "rejected": "rejected",
        "score": ["score_chosen", "score_rejected"],
        "system": None,
    }
    choose("data", "tests/feedback", COMMIT, {"train": "train"}, format="messages", columns=columns)
    finished = run("fetch_data", hub)
    assert finished.returncode == 0, finished.stderr
    expected = [
        {"context": [], "question": f"q{i}", "chosen": f"c{i}", "rejected": f"r{i}", "delta_score": 9.0 - i}
        for i in range(6)
    ]
    assert pq.read_table("data/raw/train.parquet").to_pylist() == expected
    choose("data", "tests/feedback", COMMIT, {"train": "train", "test": "test"}, format="messages", columns=columns)
    assert complaint(run("fetch_data", hub), "fetch_data").endswith("has no split test; it has train")


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "csv", "csv.gz"])
def test_a_folder_of_other_files_is_read_too(workplace: Path, ending: str) -> None:
    Path("mine").mkdir()
    rows: list[dict[str, Any]] = [
        {"Frage": f"a\nb, {i}", "chosen": str(i), "rejected": "", "delta_score": i, "id": i} for i in range(3)
    ]
    if ending.startswith("csv"):
        lines = ["Frage,chosen,rejected,delta_score,id"] + [
            f'"{row["Frage"]}",{row["chosen"]},,{row["id"]},{row["id"]}' for row in rows
        ]
    else:
        lines = [json.dumps(row) for row in rows]
    content = ("\n".join(lines) + "\n").encode()
    for split in SPLITS:
        (Path("mine") / f"{split}.{ending}").write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    choose("data", "./mine", None, {"train": "train"}, columns=COLUMNS | {"question": "Frage"})
    fetch_data.main()
    expected = [
        {
            "question": row["Frage"],
            "chosen": row["chosen"],
            "rejected": "",
            "delta_score": float(row["delta_score"]),
            "id": row["id"],
        }
        for row in rows
    ]
    assert pq.read_table("data/raw/train.parquet").to_pylist() == expected
    (Path("mine") / f"train.{ending}").write_bytes(b'{"a": \n"')
    with pytest.raises(UserError, match=rf"^mine/train\.{ending}: "):
        fetch_data.main()


def mine(content: bytes, name: str = "train.jsonl") -> None:
    """A folder whose only file is every split."""
    Path("mine").mkdir(exist_ok=True)
    (Path("mine") / name).write_bytes(content)


def fetched(**others: Any) -> list[dict[str, Any]]:
    """The rows that fetch_data makes of that file."""
    choose("data", "./mine", None, {"train": "train"}, **others)
    fetch_data.main()
    return pq.read_table("data/raw/train.parquet").to_pylist()


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("ending", ["json", "json.gz", "jsonl"])
def test_a_json_file_may_be_one_list_of_rows(workplace: Path, ending: str) -> None:
    content = ("\ufeff\n " + json.dumps(ROWS, indent=2)).encode()
    mine(gzip.compress(content) if ending.endswith("gz") else content, f"train.{ending}")
    assert fetched() == ROWS


@pytest.mark.parametrize("ending", ["json", "csv"])
def test_a_row_may_be_larger_than_a_reader_likes(workplace: Path, ending: str) -> None:
    rows = [row | {"chosen": "ä" * 3_000_000} for row in ROWS]
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    mine(as_lines(rows) if ending == "json" else "\n".join(lines).encode(), f"train.{ending}")
    assert [row["chosen"] for row in fetched()] == [row["chosen"] for row in rows]


@pytest.mark.parametrize("ending", ["json", "csv"])
def test_texts_that_look_like_dates_stay_texts(workplace: Path, ending: str) -> None:
    dates = {"question": "2024-09-24", "chosen": "2024-09-24T10:00:00Z", "rejected": "1"}
    content = as_lines([dates | {"delta_score": 1}])
    if ending == "csv":
        content = f"{','.join(dates)},delta_score\n{','.join(dates.values())},1\n".encode()
    mine(content, f"train.{ending}")
    assert fetched() == [dates | {"delta_score": 1.0}]


def test_messages_in_json_lines_and_columns_of_every_kind_are_carried_along(workplace: Path) -> None:
    turns = [{"role": "user", "content": "2024-09-24"}]
    rows: list[dict[str, Any]] = [
        {
            "chosen": [*turns, {"role": "assistant", "content": "2024-09-25", "weight": 1}],
            "rejected": [*turns, {"role": "assistant", "content": "no"}],
            "id": 1,
            "tags": ["a", {"b": None}],
            "when": "2024-09-24",
            "mixed": "one",
        },
        {
            "chosen": [*turns, {"role": "assistant", "content": "yes"}],
            "rejected": "no",
            "id": 2.5,
            "mixed": 2,
            "huge": 1 << 70,
        },
    ]
    rows[1]["rejected"] = [*turns, {"role": "assistant", "content": "no"}]
    mine(as_lines(rows))
    columns = COLUMNS | {"question": None, "score": None}
    context: dict[str, Any] = {"context": [], "question": "2024-09-24", "rejected": "no"}
    assert fetched(format="messages", columns=columns) == [
        context
        | {
            "chosen": "2024-09-25",
            "id": 1,
            "tags": '["a", {"b": null}]',
            "when": "2024-09-24",
            "mixed": "one",
            "huge": None,
        },
        context | {"chosen": "yes", "id": 2.5, "tags": None, "when": None, "mixed": "2", "huge": str(1 << 70)},
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (as_lines(ROWS) + b"\n{oops\n", r"not a readable jsonl file \(line 7: Expecting property name"),
        (as_lines(ROWS) + b"3\n", r"row 5 is '3'; expected an object with the columns as keys"),
        (b'[{"question": "q"}, ', r"not a readable jsonl file \("),
        (b"\xff\xfe", r"not a readable jsonl file \(.*codec can't decode"),
        (b"", r"has no rows"),
        (b"[]", r"has no rows"),
        (as_lines(ROWS) + b'{"a": ' + b"[" * 100_000, r"not a readable jsonl file \(line 6: maximum recursion depth"),
        (as_lines([{"question": "q"}]), r"column `chosen` is missing; found question; see `data\.columns`"),
        (as_lines(ROWS) + b'{"id": 1, "id": 2}\n', r"not a readable jsonl file \(line 6: the key 'id' is in an object twice\)"),
        (as_lines(ROWS) + b'{"id": {"a": [{"b": 1, "b": 1}]}}', r"not a readable jsonl file \(line 6: the key 'b' is in an"),
        (b'[{"id": 1, "id": 2}]', r"not a readable jsonl file \(the key 'id' is in an object twice\)"),
        (as_lines(ROWS) + b'{"id": ' + b"7" * 5000 + b"}", r"not a readable jsonl file \(line 6: a number has too many digits\)"),
    ],
)  # fmt: skip
def test_a_damaged_json_file_is_one_line(workplace: Path, content: bytes, message: str) -> None:
    mine(content)
    with pytest.raises(UserError, match=rf"^mine/train\.jsonl: {message}"):
        fetched()


@pytest.mark.parametrize(
    ("values", "carried"),
    [
        ([2**53 + 1, 0.5, None], [str(2**53 + 1), "0.5", None]),  # a column of floats would round it
        ([2**53 + 1, -7, None], [2**53 + 1, -7, None]),
        ([2**63, 1, 2], [str(2**63), "1", "2"]),
        ([2**53, 0.5, 1], [2.0**53, 0.5, 1.0]),
    ],
)
def test_a_large_number_is_carried_to_its_last_digit(workplace: Path, values: list[Any], carried: list[Any]) -> None:
    mine(as_lines([row | {"id": value} for row, value in zip(ROWS, values, strict=False)]))
    assert [row["id"] for row in fetched()] == carried


BEFORE = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]  # fmt: skip
ASKED = COLUMNS | {"question": "asked"}


def asked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their question under another name."""
    return [{("asked" if name == "question" else name): value for name, value in row.items()} for row in rows]


def misfit_kinds(split: str = "train") -> dict[str, str]:
    """Why rows are no pairs, by their numbers."""
    found = json.loads(Path("data/raw/misfits.json").read_text())[split]
    return {number: misfit["kind"] for number, misfit in found.items()}


def test_turns_before_a_plain_question_are_kept_whatever_the_file(workplace: Path) -> None:
    rows = [row | {"context": context} for row, context in zip(ROWS, (BEFORE, [], BEFORE[:1]), strict=False)]
    found = {}
    mine(as_lines(rows))
    found["lines"] = fetched()
    mine(as_lines(asked(rows)))
    found["lines, renamed"] = fetched(columns=ASKED)
    Path("mine/train.jsonl").unlink()
    pq.write_table(pa.Table.from_pylist(rows), "mine/train.parquet")
    found["as it is"] = fetched()
    pq.write_table(pa.Table.from_pylist(asked(rows)), "mine/train.parquet")
    found["renamed"] = fetched(columns=ASKED)
    assert found == dict.fromkeys(found, rows)


def test_the_turns_of_lines_may_be_null_or_odd_in_some_rows(workplace: Path) -> None:
    contexts = (
        BEFORE,
        None,
        [{"role": "robot", "content": "Beep."}],
        [{"role": None, "content": "?"}],
        [*BEFORE, BEFORE[0]],
    )
    rows = [row | {"context": context} for row, context in zip(ROWS, contexts, strict=True)]
    mine(as_lines(rows))
    assert [row["context"] for row in fetched()] == [BEFORE, [], None, None, None]
    assert misfit_kinds() == {"2": "other_role", "3": "no_messages", "4": "late_system_prompt"}


@pytest.mark.parametrize(
    "odd",
    ["a passage", [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], [{"role": "user"}], [None], 3],
)
def test_one_odd_row_takes_the_turns_of_no_other(workplace: Path, odd: Any) -> None:
    mine(as_lines([row | {"context": context} for row, context in zip(ROWS, (BEFORE, odd, []), strict=False)]))
    context = [row["context"] for row in fetched()]
    assert (context[0], context[2]) == (BEFORE, [])


@pytest.mark.parametrize(
    ("kind", "scores"),
    [
        (pa.int64(), [3, 1, 2]),
        (pa.int8(), [3, 1, 2]),
        (pa.float32(), [0.5, 0.25, 2]),
        (pa.decimal128(6, 3), [Decimal("1.5"), Decimal("-2.125"), Decimal(7)]),
    ],
    ids=str,
)
@pytest.mark.parametrize("named", [COLUMNS, ASKED], ids=["standard", "renamed"])
def test_numbers_of_every_type_are_scores(
    workplace: Path, kind: pa.DataType, scores: list[Any], named: dict[str, Any]
) -> None:
    rows = ROWS[:3] if named is COLUMNS else asked(ROWS[:3])
    table = pa.Table.from_pylist(rows).drop_columns("delta_score")
    Path("mine").mkdir()
    pq.write_table(table.append_column("delta_score", pa.array(scores, kind)), "mine/train.parquet")
    assert [row["delta_score"] for row in fetched(columns=named)] == [float(score) for score in scores]
    assert pq.read_schema("data/raw/train.parquet").field("delta_score").type == pa.float64()


@pytest.mark.parametrize(
    ("scores", "kinds"),
    [
        ([True, 0.5, False, 1, None], {"0": "no_score", "2": "no_score", "4": "missing_value"}),
        (["0.5", 0.5, 1, 1, [1]], {"0": "no_score", "4": "no_score"}),
    ],
)
def test_a_score_that_is_no_number_is_a_misfit_of_its_row(
    workplace: Path, scores: list[Any], kinds: dict[str, str]
) -> None:
    mine(as_lines([row | {"delta_score": score} for row, score in zip(ROWS, scores, strict=True)]))
    wanted = [None if str(number) in kinds else float(score) for number, score in enumerate(scores)]
    assert [row["delta_score"] for row in fetched()] == wanted
    assert misfit_kinds() == kinds


@pytest.mark.parametrize("score", ["0.5", True])
def test_a_standard_table_whose_scores_are_no_numbers_is_refused(workplace: Path, score: Any) -> None:
    Path("mine").mkdir()
    pq.write_table(pa.Table.from_pylist([row | {"delta_score": score} for row in ROWS]), "mine/train.parquet")
    with pytest.raises(
        UserError,
        match=rf"^mine/train\.parquet, row 0: delta_score is \[{score!r}\]; expected numbers; no other row fits",
    ):
        fetched()


def test_texts_that_are_stored_as_categories_are_texts(workplace: Path) -> None:
    Path("mine").mkdir()
    table = pa.Table.from_pylist(ROWS)
    for name in ("question", "rejected", "id"):
        place = table.column_names.index(name)
        table = table.set_column(place, name, table[name].dictionary_encode())
    pq.write_table(table, "mine/train.parquet")
    assert fetched() == ROWS
    assert pq.read_schema("data/raw/train.parquet").field("question").type == pa.string()


def test_messages_as_json_text_are_named_for_what_they_are(workplace: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    mine(as_lines([row | {"chosen": json.dumps(turns), "rejected": json.dumps(turns)} for row in ROWS]))
    for layout in ("plain", "messages"):
        with pytest.raises(
            UserError, match=r"^mine/train\.jsonl, row 0: .* messages as JSON text.*; store them as lists; no"
        ):
            fetched(format=layout)


@pytest.mark.parametrize("where", ["question", "id"])
def test_two_columns_of_one_name_are_refused(workplace: Path, where: str) -> None:
    names = [*ROWS[0], where]
    message = rf"^mine/train\.(csv|parquet): two columns are named `{where}`; rename one$"
    mine(
        "\n".join([",".join(names), *(",".join([*map(str, row.values()), "x"]) for row in ROWS)]).encode(), "train.csv"
    )
    with pytest.raises(UserError, match=message):
        fetched()
    Path("mine/train.csv").unlink()
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table.append_column(where, table[where]), "mine/train.parquet")
    with pytest.raises(UserError, match=message):
        fetched()


def test_a_table_without_rows_is_named(workplace: Path) -> None:
    mine(",".join(ROWS[0]).encode() + b"\n", "train.csv")
    with pytest.raises(UserError, match=r"^mine/train\.csv: has no rows$"):
        fetched()
    Path("mine/train.csv").unlink()
    pq.write_table(pa.Table.from_pylist(ROWS)[:0], "mine/train.parquet")
    with pytest.raises(UserError, match=r"^mine/train\.parquet: has no rows$"):
        fetched()
    assert not Path("data/raw").exists()


def test_a_row_that_no_column_can_hold_keeps_its_place(workplace: Path) -> None:
    rows = [dict(row) for row in ROWS]
    rows[1]["id"] = "half \ud83d"
    rows[3]["delta_score"] = 10**400
    mine(as_lines(rows))
    raw = fetched()
    assert [row["question"] for row in raw] == ["q0", None, "q2", None, "q4"]
    assert [row["id"] for row in raw] == ["0", None, "2", "3", "4"]
    found = json.loads(Path("data/raw/misfits.json").read_text())["train"]
    assert {number: misfit["kind"] for number, misfit in found.items()} == {"1": "not_storable", "3": "no_score"}


def test_rubbish_inside_a_table_that_is_only_copied_is_found(workplace: Path) -> None:
    Path("mine").mkdir()
    rows = [row | {"chosen": random.Random(i).randbytes(99).hex()} for i, row in enumerate(ROWS * 999)]
    pq.write_table(pa.Table.from_pylist(rows), "mine/train.parquet", compression="zstd", row_group_size=1024)
    content = bytearray(Path("mine/train.parquet").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 9999] = random.Random(0).randbytes(9999)
    Path("mine/train.parquet").write_bytes(content)
    with pytest.raises(
        UserError, match=r"^mine/train\.parquet: not a readable parquet file \(row 2048 or one behind it: "
    ):
        fetched()
    assert not Path("data/raw").exists()


def test_a_file_that_is_cut_is_named(workplace: Path) -> None:
    mine(gzip.compress(as_lines(ROWS * 100))[:-20], "train.jsonl.gz")
    with pytest.raises(UserError, match=r"^mine/train\.jsonl\.gz: not a readable jsonl\.gz file"):
        fetched()
    Path("mine/train.jsonl.gz").unlink()
    renamed = COLUMNS | {"question": "asked"}
    rows = [
        {"asked": random.Random(i).randbytes(9).hex(), "chosen": "a", "rejected": "b", "delta_score": 1.0}
        for i in range(9)
    ]
    pq.write_table(pa.Table.from_pylist(rows), "mine/train.parquet", compression="zstd")
    content = bytearray(Path("mine/train.parquet").read_bytes())
    content[4:200] = bytes(196)  # the first pages; the footer stays
    Path("mine/train.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"^mine/train\.parquet: not a readable parquet file"):
        fetched(columns=renamed)


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_what_fails_while_rows_are_written_is_not_blamed_on_the_source(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    Path("mine").mkdir()
    rows = [{("asked" if name == "question" else name): value for name, value in row.items()} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), "mine/train.parquet")
    if ending == "jsonl":
        Path("mine/train.parquet").unlink()
        mine(as_lines(rows))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_batch", full)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device$"):
        fetched(columns=COLUMNS | {"question": "asked"})


def test_rows_of_another_layout_are_kept_for_subset_to_judge(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost on the way: every row of the source is one of data/raw, and each odd one is counted by its kind."""
    monkeypatch.setattr(tables, "BATCH", 2)
    turn = {"role": "user", "content": "q"}
    rows: list[dict[str, Any]] = [
        {
            "chosen": [turn, {"role": "assistant", "content": f"a{i}"}],
            "rejected": [turn, {"role": "assistant", "content": "b"}],
        }
        for i in range(6)
    ]
    rows[1]["chosen"] = [turn]
    rows[4]["rejected"] = [turn | {"content": "else"}, {"role": "assistant", "content": "b"}]
    mine(as_lines(rows))
    raw = fetched(format="messages", columns=COLUMNS | {"question": None, "score": None})
    assert [row["chosen"] for row in raw] == ["a0", None, "a2", "a3", None, "a5"]
    manifest = json.loads(Path("data/raw/manifest.json").read_text())
    assert manifest["rows"] == dict.fromkeys(SPLITS, 6)
    assert manifest["files"]["misfits.json"] == sha256_file(Path("data/raw/misfits.json"))
    rules = {"k": None, "near_duplicate_similarity": None} | dict.fromkeys(
        ("drop_empty", "drop_identical", "drop_exact_duplicates", "drop_evaluation_leaks"), False
    )

    def cut(drop_malformed: bool) -> None:
        Path("params.yaml").write_text(json.dumps(cpu_params(subset=rules | {"drop_malformed": drop_malformed})))
        subset.main()

    with pytest.raises(
        UserError, match=r"^data/raw/test\.parquet, row 1: the last message of `chosen` is not the assistant's; "
    ):
        cut(drop_malformed=False)
    cut(drop_malformed=True)
    report = json.loads(subset.REPORT.read_text())["train"]
    assert report["removed"] == {"malformed_no_answer": 1, "malformed_different_turns": 1}
    assert report["malformed_rows"] == {"no_answer": [1], "different_turns": [4]}
    assert (report["read"], report["kept"]) == (6, 4)


def test_where_no_row_fits_the_parameters_are_wrong(workplace: Path) -> None:
    mine(as_lines(ROWS))
    with pytest.raises(
        UserError, match=r"^mine/train\.jsonl, row 0: 'q0' is not made of ChatML turns; no other row fits"
    ):
        fetched(format="chatml")
    assert not Path("data/raw").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": "de"}, r"`config` is 'de', and \./mine is a folder, which has none"),
        (
            {"columns": COLUMNS | {"question": None}},
            r"`columns\.question` is null, which `format: plain` cannot be without",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(workplace: Path, change: dict[str, Any], message: str) -> None:
    mine(as_lines(ROWS))
    with pytest.raises(UserError, match=message):
        fetched(**change)


CONFIGURED = """---
license: cc-by-4.0
pretty_name: Pairs in two languages
configs:
- config_name: de
  data_files: [{split: train, path: de/*.jsonl}]
- config_name: fr
  data_files: [{split: train, path: fr/*.jsonl}]
---
# Pairs
"""


def test_of_several_configurations_one_is_named(workplace: Path, hub: str) -> None:
    files = {f"{name}/train.jsonl": as_lines([row | {"id": name} for row in ROWS]) for name in ("de", "fr")}
    Hub.repositories["datasets/tests/configured"] = files | {"README.md": CONFIGURED.encode()}
    for config in (None, "en"):
        choose("data", "tests/configured", COMMIT, {"train": "train"}, config=config)
        said = "null" if config is None else config
        assert complaint(run("fetch_data", hub), "fetch_data").endswith(
            f"tests/configured@{COMMIT}: `data.config` is {said}; it has the configurations de, fr: name one"
        )
    choose("data", "tests/configured", COMMIT, {"train": "train"}, config="fr")
    finished = run("fetch_data", hub)
    assert finished.returncode == 0, finished.stderr
    assert pq.read_table("data/raw/train.parquet").to_pylist() == [row | {"id": "fr"} for row in ROWS]
    manifest = json.loads(Path("data/raw/manifest.json").read_text())
    assert manifest["config"] == "fr"
    assert manifest["card"] == {"license": "cc-by-4.0", "pretty_name": "Pairs in two languages"}
    assert scratch() == []


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        (
            "---\nlicense: [mit, apache-2.0]\nauthors: [A, B]\n---\n",
            {"license": ["mit", "apache-2.0"], "authors": ["A", "B"]},
        ),
        ("---\nlicense: other\nlicense_name: x\n---\n", {"license": "other", "license_name": "x"}),
        ("---\nlicense:\npretty_name: 3\n---\n", {}),
        ("---\nlicense: {a: b}\nauthors: [1]\n---\n", {}),
        ("---\n: [\n---\n", {}),
        ("---\n- a\n---\n", {}),
        ("# The licence is MIT\n", {}),
    ],
)
def test_only_what_a_card_says_in_its_metadata_is_a_term(workplace: Path, text: str, terms: dict[str, Any]) -> None:
    Path("README.md").write_text(text)
    assert fetch_data.card_terms(Path("README.md")) == terms


def test_a_folder_is_a_data_set_too_with_or_without_held_out_questions(workplace: Path) -> None:
    embed()
    fetch_data.EMBEDDED.rename("mine")
    choose("data", "./mine", None, {"train": "test"})
    fetch_data.main()
    read = json.loads(Path("data/raw/manifest.json").read_text())["source_files"]
    wanted = {"plain.jsonl", "questions.parquet", "test.parquet"}  # the others play no part
    assert read == {name: sha256_file(Path("mine") / name) for name in wanted}
    names = ["manifest.json", "plain.jsonl", "questions.parquet", *(f"{split}.parquet" for split in sorted(SPLITS))]
    assert sorted(path.name for path in Path("data/raw").iterdir()) == names
    assert sha256_file(Path("data/raw/train.parquet")) == sha256_file(Path("mine/test.parquet"))
    for name in ("questions.parquet", "plain.jsonl"):
        (Path("mine") / name).unlink()
    fetch_data.main()
    assert not {"questions.parquet", "plain.jsonl"} & {path.name for path in Path("data/raw").iterdir()}
    Path("mine/cut.parquet").write_bytes(b"PAR1")
    choose("data", "./mine", None, {"train": "cut"})
    with pytest.raises(UserError, match=r"^mine/cut\.parquet: not a readable parquet file"):
        fetch_data.main()
    choose("data", "./mine", None, {"train": "dev"})
    with pytest.raises(UserError, match=r"^mine/dev\.parquet: no such file; see `data\.splits`"):
        fetch_data.main()


def test_a_folder_is_a_model_too(workplace: Path, tiny_model_folder: Path) -> None:
    wanted = json.loads((tiny_model_folder / "manifest.json").read_text())["files"]
    Path("mine").symlink_to(tiny_model_folder)
    choose("model", "./mine", None)
    fetch_model.main()
    manifest = json.loads(Path("models/base/manifest.json").read_text())
    read = wanted | {"manifest.json": sha256_file(tiny_model_folder / "manifest.json")}
    assert manifest == {"source": "./mine", "revision": "local", "files": wanted, "source_files": read}
    choose("model", "./nothing", None)
    with pytest.raises(UserError, match="holds no safetensors model"):
        fetch_model.main()
    assert json.loads(Path("models/base/manifest.json").read_text()) == manifest


def test_a_rebuilt_base_says_how_it_was_made(workplace: Path, tiny_model_folder: Path) -> None:
    shutil.copytree(tiny_model_folder, "mine")
    made = {"recipe": {"seed": 42}, "versions": {"mergekit": "0.1"}}
    Path("mine/manifest.json").write_text(json.dumps(made | {"files": {}}))
    choose("model", "./mine", None)
    fetch_model.main()
    manifest = json.loads(Path("models/base/manifest.json").read_text())
    assert {key: manifest[key] for key in made} == made
    assert manifest["files"]


def test_a_chat_template_takes_the_place_of_the_models(workplace: Path, tiny_model_folder: Path) -> None:
    Path("mine").symlink_to(tiny_model_folder)
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    choose("model", "./mine", None, chat_template=template)
    fetch_model.main()
    messages = [{"role": "user", "content": "Hi"}]
    assert AutoTokenizer.from_pretrained("models/base").apply_chat_template(messages, tokenize=False) == "[user]Hi"
    assert "chat_template.jinja" in json.loads(Path("models/base/manifest.json").read_text())["files"]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for %}", "TemplateSyntaxError: Expected an expression, got 'end of statement block'"),
        ("{{ 1 // (messages | length - 2) }}", "ZeroDivisionError: integer division or modulo by zero"),
        ("{{ messages[0] + 1 }}", "TypeError: unsupported operand type\\(s\\) for \\+: 'dict' and 'int'"),
        ("{{ messages[9]['content'] }}", "UndefinedError: list object has no element 9"),
    ],
)
def test_a_chat_template_that_renders_no_conversation_is_refused(
    workplace: Path, tiny_model_folder: Path, template: str, why: str
) -> None:
    Path("mine").symlink_to(tiny_model_folder)
    choose("model", "./mine", None, chat_template=template)
    with pytest.raises(
        UserError, match=rf"^params\.yaml: `model\.chat_template` does not render a conversation \({why}\)$"
    ):
        fetch_model.main()
    assert not Path("models/base").exists()


@pytest.mark.parametrize("path", ["../x.parquet", "/tmp/x.parquet", "data/../../x.parquet", "..", "a\0b.parquet"])
def test_a_listed_file_outside_of_the_repository_is_refused(workplace: Path, hub: str, path: str) -> None:
    Hub.repositories["datasets/tests/outside"] = {"train.csv": b"a,b\n1,2\n", path: b"question\nx\n"}
    choose("data", "tests/outside", COMMIT, {"train": "train"})
    said = complaint(run("fetch_data", hub), "fetch_data")
    assert f"lists {path!r}, which is no file of its folder" in said.replace("\\\\", "\\")
    assert not Path("data/raw").exists()


@pytest.mark.parametrize("path", ["..", "../x", "/x", "a/../../x", "", "a\0"])
def test_a_path_that_leaves_its_folder_is_known(path: str) -> None:
    assert not hermes_hub.stays_inside(path)


@pytest.mark.parametrize("path", ["x", "a/b.parquet", "a..b/c", "..a"])
def test_a_path_that_stays_is_known(path: str) -> None:
    assert hermes_hub.stays_inside(path)


def test_a_card_that_names_a_file_of_this_machine_reads_none(workplace: Path, hub: str) -> None:
    secret = workplace / "secret.csv"
    secret.write_text("question,chosen,rejected\nprivate,a,b\n")
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {secret}\n---\n"
    Hub.repositories["datasets/tests/reaching"] = {"README.md": card.encode(), "train.csv": b"a\n1\n"}
    choose("data", "tests/reaching", COMMIT, {"train": "train"})
    said = complaint(run("fetch_data", hub), "fetch_data")
    assert "private" not in said
    assert not Path("data/raw").exists()


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/x.safetensors", "..", "", 5])
def test_an_index_that_names_weights_elsewhere_is_refused(workplace: Path, tiny_model_folder: Path, name: Any) -> None:
    shutil.copytree(tiny_model_folder, "mine")
    Path("mine/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    choose("model", "./mine", None)
    with pytest.raises(UserError, match=r"^model\.safetensors\.index\.json: names the file .*, which is not beside it"):
        fetch_model.main()
    assert not Path("models/base").exists()


def test_no_token_and_no_password_is_said_where_the_hub_refuses(
    workplace: Path, hub: str, no_network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "hf_" + "canary" * 6
    monkeypatch.setenv("HF_TOKEN", token)
    Hub.gated.add("models/tests/tiny")
    choose("model", "tests/tiny", COMMIT)
    for endpoint in (hub, no_network):
        for address in (
            endpoint,
            endpoint.replace("://", f"://someone:{token}@"),
            endpoint.replace("://", "://someone:s3cret@"),
        ):
            done = run("fetch_model", address)
            assert complaint(done, "fetch_model")
            assert token not in done.stdout + done.stderr
            assert "s3cret" not in done.stdout + done.stderr
    Hub.gated.clear()
    written = [path for path in workplace.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    assert not written


def test_a_chat_template_without_an_end_is_refused(workplace: Path, tiny_model_folder: Path) -> None:
    Path("mine").symlink_to(tiny_model_folder)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    choose("model", "./mine", None, chat_template=loop)
    with pytest.raises(UserError, match=r"^params\.yaml: `model\.chat_template`: chat template: takes more than 5 s"):
        fetch_model.main()
    assert not Path("models/base").exists()


OWN = CHAT_TEMPLATE.replace("You are a helpful assistant", "You are terse")
OTHER = CHAT_TEMPLATE.replace("You are a helpful assistant", "You are verbose")


def place_templates(folder: Path, places: tuple[str, ...]) -> None:
    """Other templates in each of these files, and none in the rest."""
    (folder / "chat_template.jinja").unlink()
    for name in places:
        path = folder / name
        if name.endswith(".jinja"):
            path.write_text(OTHER)
        else:
            found = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(found | {"chat_template": OTHER + "{# of this file #}"}))


def check_only_template(template: str) -> None:
    """The base has this template in one place, and its manifest the hash of every file as it is."""
    base = Path("models/base")
    assert (base / "chat_template.jinja").read_text() == template
    assert not (base / "chat_template.json").exists()
    assert "chat_template" not in json.loads((base / "tokenizer_config.json").read_text())
    assert AutoTokenizer.from_pretrained(base).chat_template == template
    files = {path.name: sha256_file(path) for path in base.iterdir() if path.name != "manifest.json"}
    assert json.loads((base / "manifest.json").read_text())["files"] == files


PLACES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


@pytest.mark.parametrize(
    ("chosen", "places"),
    [(OWN, PLACES[1:2]), (OWN, PLACES[2:]), (OWN, PLACES[::2]), (OWN, PLACES), (None, PLACES[::2]), (None, PLACES)],
    ids=lambda value: " and ".join(value) if isinstance(value, tuple) else "chosen" if value else "its own",
)
def test_a_base_has_one_chat_template(
    workplace: Path, tiny_model_folder: Path, chosen: str | None, places: tuple[str, ...]
) -> None:
    """llama.cpp's converter looks in another place first than Transformers."""
    place_templates(Path(shutil.copytree(tiny_model_folder, "mine")), places)
    choose("model", "./mine", None, chat_template=chosen)
    fetch_model.main()
    check_only_template(chosen or OTHER)


@pytest.mark.slow
@pytest.mark.parametrize("places", [PLACES[1:2], PLACES[2:], PLACES], ids=" and ".join)
def test_llama_cpp_reads_the_chat_template_that_was_chosen(
    workplace: Path, tiny_model_folder: Path, places: tuple[str, ...]
) -> None:
    place_templates(Path(shutil.copytree(tiny_model_folder, "mine")), places)
    choose("model", "./mine", None, chat_template=OWN)
    fetch_model.main()
    check_base(Path("models/base"))


def test_the_hash_of_a_file_that_was_written_anew_is_not_the_hubs(
    workplace: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch_hub(source: str, commit: str, target: Path) -> tuple[str, dict[str, str]]:
        shutil.copytree(tiny_model_folder, target, dirs_exist_ok=True)
        (target / "manifest.json").unlink()
        place_templates(target, PLACES)
        return commit, {path.name: sha256_file(path) for path in target.iterdir()}

    monkeypatch.setattr(fetch_model, "fetch_hub", fetch_hub)
    for chosen in (OWN, None):
        choose("model", "tests/tiny", COMMIT, chat_template=chosen)
        fetch_model.main()
        check_only_template(chosen or OTHER)


def test_weights_of_other_programs_beside_a_model_are_left_out(workplace: Path, tiny_model_folder: Path) -> None:
    wanted = json.loads((tiny_model_folder / "manifest.json").read_text())["files"]
    shutil.copytree(tiny_model_folder, "mine")
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        shutil.copy("mine/model.safetensors", f"mine/{name}")
    choose("model", "./mine", None)
    fetch_model.main()
    assert json.loads(Path("models/base/manifest.json").read_text())["files"] == wanted
    Path("mine/model.safetensors").unlink()
    with pytest.raises(UserError, match=r"`model\.source` is 'mine', which holds no safetensors model$"):
        fetch_model.main()


def test_a_tokenizer_in_its_older_files_comes_along(
    workplace: Path, tiny_model_folder: Path, embedded_tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = Path(shutil.copytree(tiny_model_folder, "mine"))
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
    (folder / "added_tokens.json").write_text(json.dumps({"<|mine|>": len(model["vocab"])}))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "GPT2Tokenizer"}))
    choose("model", "./mine", None)
    fetch_model.main()
    tokenizer = AutoTokenizer.from_pretrained("models/base")
    for text in (*PROBES, CHAT_TEMPLATE, "a<|im_end|>b"):
        assert tokenizer(text)["input_ids"] == embedded_tokenizer(text)["input_ids"]
    assert tokenizer("<|mine|>")["input_ids"] == [len(embedded_tokenizer)]


@pytest.mark.parametrize("stage", ["fetch_data", "fetch_model"])
def test_no_network_is_one_line_and_leaves_the_earlier_files(workplace: Path, no_network: str, stage: str) -> None:
    section = stage.removeprefix("fetch_")
    earlier = {"data": Path("data/raw"), "model": Path("models/base")}[section] / "earlier"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    choose(section, "tests/tiny", COMMIT, {"train": "train"} if section == "data" else None)
    line = complaint(run(stage, no_network), stage)
    assert f"tests/tiny@{COMMIT}" in line
    assert re.search(r"check (the )?name, (the )?network and HF_TOKEN$", line)
    assert [path.name for path in earlier.parent.iterdir()] == ["earlier"]
    assert [path.name for path in earlier.parent.parent.iterdir()] == [earlier.parent.name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"split": "test", "question": "q", "answer": ["a"]}',
            r"plain\.jsonl, row 0: `answer` is \['a'\]; expected text",
        ),
        ('{"split": "test", "question": "q"}', r"plain\.jsonl, row 0: `answer` is None; expected text"),
        ("{", r"plain\.jsonl: not a readable jsonl file \(line 1"),
        (
            PLAIN + json.dumps(json.loads(PLAIN) | {"question": "half \ud83d"}),
            r"^data/embedded/plain\.jsonl, row 1: `question` holds half a character \(surrogates not allowed\)$",
        ),
        (
            PLAIN.replace("test", "tets"),
            r"^data/embedded/plain\.jsonl, row 0: `split` is 'tets'; expected one of train, validation, test$",
        ),
    ],
)
def test_plain_answers_that_evaluate_could_not_read_are_refused(workplace: Path, text: str, message: str) -> None:
    embed()
    choose("data", "embedded", None, dict(zip(SPLITS, SPLITS, strict=True)))
    (fetch_data.EMBEDDED / "plain.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        fetch_data.main()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, r"^data/embedded/questions\.parquet: not a readable parquet file \("),
        (
            {"kind": None},
            r"^data/embedded/questions\.parquet: has no column `kind` of texts; it needs id, topic, kind, ",
        ),
        ({"question": [None]}, r"^data/embedded/questions\.parquet, row 0: `question` is None; expected text$"),
        ({"constraint": [3]}, r"^data/embedded/questions\.parquet: has no column `constraint` of texts; it needs id, "),
    ],
    ids=["rubbish", "without kind", "null", "numbers"],
)
def test_held_out_questions_that_evaluate_could_not_read_are_refused(
    workplace: Path, change: dict[str, Any] | None, message: str
) -> None:
    embed()
    choose("data", "embedded", None, dict(zip(SPLITS, SPLITS, strict=True)))
    columns = {name: ["q"] for name in fetch_data.QUESTIONS} | (change or {})
    path = fetch_data.EMBEDDED / "questions.parquet"
    texts = {
        name: pa.array(values, pa.int64() if values == [3] else pa.string())
        for name, values in columns.items()
        if values
    }
    pq.write_table(pa.table(texts), path)
    if change is None:
        path.write_bytes(b"id,topic,kind\n")
    with pytest.raises(UserError, match=message) as error:
        fetch_data.main()
    assert "\n" not in str(error.value)
    assert not Path("data/raw").exists()


def test_held_out_questions_may_be_large_texts_as_polars_writes_them(workplace: Path) -> None:
    embed()
    choose("data", "embedded", None, dict(zip(SPLITS, SPLITS, strict=True)))
    questions = {name: pa.array(["q"], pa.large_string()) for name in fetch_data.QUESTIONS}
    pq.write_table(pa.table(questions), fetch_data.EMBEDDED / "questions.parquet")
    fetch_data.main()
    assert pq.read_table("data/raw/questions.parquet").to_pylist() == [dict.fromkeys(fetch_data.QUESTIONS, "q")]


def test_plain_answers_behind_a_byte_order_mark_are_read(workplace: Path) -> None:
    embed()
    choose("data", "embedded", None, dict(zip(SPLITS, SPLITS, strict=True)))
    (fetch_data.EMBEDDED / "plain.jsonl").write_text("\ufeff" + PLAIN)
    fetch_data.main()
    assert Path("data/raw/plain.jsonl").read_text() == PLAIN


def test_a_column_named_context_is_left_out_and_said_where_the_format_makes_its_own(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embed()
    turns = [{"role": "assistant", "content": "Yes."}]
    rows = [row | {"chosen": turns, "rejected": turns, "context": "a passage"} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), fetch_data.EMBEDDED / "train.parquet")
    choose("data", "embedded", None, dict(zip(SPLITS, SPLITS, strict=True)))
    settings = params.load(fetch_data.Params).data.model_copy(update={"format": "messages"})
    assert fetch_data.standardize([fetch_data.EMBEDDED / "train.parquet"], Path("out.parquet"), settings, "here") == {}
    assert pq.read_table("out.parquet")["context"].to_pylist() == [[]] * len(ROWS)
    assert "here: its column `context` is not read by `format: messages`, and is left out" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_a_column_named_context_that_holds_text_is_left_out_and_said(
    workplace: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    rows = [row | {"context": "a passage"} for row in ROWS]
    mine(as_lines(rows), f"train.{ending}")
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), "mine/train.parquet")
    assert fetched() == ROWS
    said = f"fetch_data: mine/train.{ending}: its column `context` holds no messages, and is left out\n"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("notes", [("text", 1), (None, "text")])
def test_shards_that_differ_in_a_column_that_nobody_reads_go_together(
    workplace: Path, capsys: pytest.CaptureFixture[str], notes: tuple[Any, Any]
) -> None:
    tables = [pa.Table.from_pylist([row | {"note": note} for row in ROWS]) for note in notes]
    paths = [Path(f"shard-{i}.parquet") for i in range(2)]
    for table, path in zip(tables, paths, strict=True):
        pq.write_table(table, path)
    choose("data", "embedded", None, {"train": "train"})
    settings = params.load(fetch_data.Params).data
    assert fetch_data.standardize(paths, Path("out.parquet"), settings, "here") == {}
    assert pq.read_table("out.parquet").to_pylist() == 2 * ROWS
    assert "the files differ in note, which is left out" in capsys.readouterr().out


def further(columns: dict[str, Any] = COLUMNS, **others: Any) -> dict[str, Any]:
    """The folder ./more, all of it, as an entry of `data.mixed_with`."""
    own = {"source": "./more", "revision": None, "config": None, "splits": dict(zip(SPLITS, SPLITS, strict=True))}
    return {**own, "format": "plain", "columns": columns, "choice": None, "share": 1.0, **others}


def mixed(first: list[dict[str, Any]], second: list[dict[str, Any]], **others: Any) -> list[dict[str, Any]]:
    """The rows that fetch_data makes of two folders of standard tables."""
    for name, rows in (("mine", first), ("more", second)):
        Path(name).mkdir(exist_ok=True)
        for split in SPLITS:
            pq.write_table(pa.Table.from_pylist(rows), f"{name}/{split}.parquet")
    return fetched(mixed_with=[further(**others)])


WITH_CONTEXT = [row | {"context": BEFORE[:1]} for row in ROWS]
WITH_SYSTEM = [row | {"system": "Be kind."} for row in ROWS]


@pytest.mark.parametrize("before", ["context", "system"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_source_without_earlier_turns_is_mixed_with_one_that_has_some(
    workplace: Path, before: str, is_first: bool
) -> None:
    if before == "context":
        found = mixed(*((WITH_CONTEXT, ROWS) if is_first else (ROWS, WITH_CONTEXT)))
    else:
        found = mixed(ROWS, WITH_SYSTEM, columns=COLUMNS | {"system": "system"})
    has_some = [False, True] if before == "system" or not is_first else [True, False]
    assert [row["context"] for row in found] == [BEFORE[:1] if some else [] for some in has_some for _ in ROWS]
    assert [{name: row[name] for name in ROWS[0]} for row in found] == 2 * ROWS


def test_whole_and_broken_scores_are_mixed(workplace: Path) -> None:
    whole = [row | {"delta_score": i} for i, row in enumerate(ROWS)]
    assert [row["delta_score"] for row in mixed(whole, ROWS)] == [
        *map(float, range(5)),
        *(row["delta_score"] for row in ROWS),
    ]


@pytest.mark.parametrize("strict", ["mine", "more"])
def test_a_column_that_may_not_be_null_is_mixed_with_one_that_may(workplace: Path, strict: str) -> None:
    mixed(ROWS, ROWS)
    table = pa.Table.from_pylist(ROWS)
    whole = table.cast(pa.schema([field.with_nullable(False) for field in table.schema]))
    for split in SPLITS:
        pq.write_table(whole, f"{strict}/{split}.parquet")
    found = fetched(mixed_with=[further()])
    assert [{name: value for name, value in row.items() if name != "mixed_from"} for row in found] == 2 * ROWS


def test_a_column_that_mixing_makes_itself_is_refused(workplace: Path) -> None:
    with pytest.raises(UserError, match=r"^\./more: has a column `mixed_from`, which mixing makes itself; rename it$"):
        mixed(ROWS, [row | {"mixed_from": "elsewhere"} for row in ROWS])
    assert not Path("data/raw").exists()


def test_training_on_the_split_that_is_asked_leaves_nothing(workplace: Path) -> None:
    mine(as_lines(ROWS))
    fetched()  # one file is every split
    Path("params.yaml").write_text(json.dumps(cpu_params(subset={"k": 2})))
    with pytest.raises(
        UserError,
        match=r"^data/raw/train\.parquet: none of its 5 pairs is left \(5 leaks_from_evaluation\); see `subset`",
    ):
        subset.main()


def test_sources_are_mixed_each_by_its_share_and_its_own_columns(workplace: Path) -> None:
    embed()
    Path("more").mkdir()
    other = [{"prompt": f"q{i}", "good": f"yes {i}", "bad": "no", "points": float(i)} for i in range(10)]
    other[4]["good"] = None
    for split in SPLITS:
        pq.write_table(pa.Table.from_pylist(other), f"more/{split}.parquet")
    columns = {"question": "prompt", "chosen": "good", "rejected": "bad", "score": "points", "system": None}
    share = further(columns, share=0.5)
    choose("data", "embedded", None, dict(zip(SPLITS, SPLITS, strict=True)), mixed_with=[share])
    fetch_data.main()
    rows = pq.read_table("data/raw/train.parquet").to_pylist()
    assert [row["question"] for row in rows] == [*(row["question"] for row in ROWS), "q0", "q2", None, "q6", "q8"]
    assert [row["mixed_from"] for row in rows] == ["embedded"] * len(ROWS) + ["./more"] * 5
    manifest = json.loads(Path("data/raw/manifest.json").read_text())
    assert manifest["rows"]["train"] == len(ROWS) + 5
    assert [(part["source"], part["share"], part["rows"]["train"]) for part in manifest["mixed_with"]] == [
        ("./more", 0.5, 10)
    ]
    assert list(json.loads(Path("data/raw/misfits.json").read_text())["train"]) == [str(len(ROWS) + 2)]
    share["columns"] = columns | {"score": None}
    choose("data", "embedded", None, dict(zip(SPLITS, SPLITS, strict=True)), mixed_with=[share])
    with pytest.raises(UserError, match="some sources have scores and others have none"):
        fetch_data.main()
