"""Data and model arrive at exactly the pinned commit, complete or not at all; what goes wrong is one line."""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.utils import filter_repo_objects  # it is documented there

from stages import fetch_data, fetch_model
from stages.artifacts import sha256_file
from stages.console import UserError

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SPLITS = ("train", "validation", "test")
PIPELINE = "stages: {s: {params: ['profiles.${profile}.data', 'profiles.${profile}.model']}}\n"
ROWS = [
    {"question": f"q{i}", "chosen": f"c{i}", "rejected": f"r{i}", "delta_score": i / 8, "id": str(i)} for i in range(5)
]


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub that a download at a pinned commit asks for: repository info, file tree, files."""

    # {"models/owner/name": {file: bytes}}, at COMMIT only; and all that was asked for.
    repositories: dict[str, dict[str, bytes]]
    asked: list[str]

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
                oid = hashlib.sha1(files[name]).hexdigest()
                found.append({"type": "file", "path": name, "size": len(files[name]), "oid": oid})
        return found

    def answer(self) -> None:
        path, query = urlsplit(self.path).path, urlsplit(self.path).query
        self.asked.append(f"{self.command} {path}")
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
            resolve = f"/{name.removeprefix('models/')}/resolve/{COMMIT}/"
            if path.startswith(resolve) and path.removeprefix(resolve) in files:
                body = files[path.removeprefix(resolve)]
                return self.send(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=COMMIT)
            if path.startswith((resolve, f"/api/{name}/")):
                return self.send(404, X_Error_Code="EntryNotFound" if path.startswith(resolve) else "RevisionNotFound")
        return self.send(404, X_Error_Code="RepoNotFound")

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
    Hub.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run stages in, that knows no Hub; retries there do not wait."""
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").write_text(PIPELINE)
    Path("quick").mkdir()
    Path("quick/sitecustomize.py").write_text("import time\ntime.sleep = lambda seconds: None\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), "quick"]))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HERMES_TRACEBACK", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path


def choose(section: str, source: str, revision: str | None, splits: dict[str, str] | None = None) -> None:
    """Writes a params.yaml (JSON is YAML) that selects this source; splits that are not given are the first one given."""
    chosen: dict[str, Any] = {"source": source, "revision": revision}
    if splits:
        chosen["splits"] = dict.fromkeys(SPLITS, next(iter(splits.values()))) | splits
    Path("params.yaml").write_text(json.dumps({"profile": "x", "profiles": {"x": {section: chosen}}}))


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
    pq.write_table(pa.Table.from_pylist([{"id": "q", "question": "?"}]), fetch_data.EMBEDDED / "questions.parquet")
    (fetch_data.EMBEDDED / "plain.jsonl").write_text("{}\n")


def test_embedded_data_arrives_unchanged_with_the_held_out_questions(workplace: Path) -> None:
    embed()
    choose("data", "embedded", None, dict(zip(SPLITS, SPLITS, strict=True)))
    fetch_data.main()
    manifest = json.loads(Path("data/raw/manifest.json").read_text())
    names = [*(f"{split}.parquet" for split in SPLITS), "plain.jsonl", "questions.parquet"]
    assert manifest["files"] == {name: sha256_file(fetch_data.EMBEDDED / name) for name in names}
    assert manifest["files"] == {name: sha256_file(Path("data/raw") / name) for name in names}
    assert manifest["rows"] == dict.fromkeys(SPLITS, len(ROWS))
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


@pytest.mark.parametrize("column", fetch_data.COLUMNS)
def test_a_missing_column_is_named_with_those_found(column: str) -> None:
    names = [name for name in fetch_data.COLUMNS if name != column]
    schema = pa.schema([(name, pa.string()) for name in names])
    with pytest.raises(UserError) as caught:
        fetch_data.check_columns(schema, "owner/name, split train")
    assert f"owner/name, split train: column `{column}` is missing; found {', '.join(names)}" in str(caught.value)


def test_columns_beside_the_expected_are_welcome() -> None:
    fetch_data.check_columns(pa.schema([(name, pa.string()) for name in (*fetch_data.COLUMNS, "id")]), "here")


@pytest.mark.parametrize(
    "revision", [None, "", "main", COMMIT[:7], COMMIT[:39], COMMIT + "0", COMMIT.upper(), COMMIT + "\n"]
)
@pytest.mark.parametrize("stage", ["fetch_data", "fetch_model"])
def test_only_a_full_commit_is_a_revision(workplace: Path, stage: str, revision: str | None) -> None:
    section = stage.removeprefix("fetch_")
    choose(section, "tests/tiny", revision, {"train": "train"} if section == "data" else None)
    module = {"fetch_data": fetch_data, "fetch_model": fetch_model}[stage]
    with pytest.raises(
        UserError, match=rf"`{section}\.revision` is .*pin the full 40-digit commit of tests/tiny"
    ) as caught:
        module.main()
    assert repr(revision or "") in str(caught.value) or repr(revision) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("data/raw").exists()
    assert not Path("models/base").exists()


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
    assert manifest["files"] == {f"{split}.parquet": sha256_file(Path(f"data/raw/{split}.parquet")) for split in SPLITS}


def stand_in_download(*names: str) -> Callable[..., None]:
    """A `snapshot_download` of a repository of empty files with these names."""

    def download(
        source: str, *, revision: str, local_dir: Path, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> None:
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (Path(local_dir) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(local_dir) / name).touch()

    return download


def test_a_repository_without_safetensors_is_refused(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_model, "snapshot_download", stand_in_download("config.json", "pytorch_model.bin"))
    choose("model", "tests/pickled", COMMIT)
    with pytest.raises(UserError, match=rf"tests/pickled@{COMMIT}: has no safetensors weights"):
        fetch_model.main()
    assert not Path("models/base").exists()


def test_weights_in_a_folder_of_the_repository_are_left_out(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("config.json", "model.safetensors", "original/model.safetensors")
    monkeypatch.setattr(fetch_model, "snapshot_download", stand_in_download(*names))
    choose("model", "tests/tiny", COMMIT)
    fetch_model.main()
    assert sorted(json.loads(Path("models/base/manifest.json").read_text())["files"]) == [
        "config.json",
        "model.safetensors",
    ]


def test_a_folder_is_a_data_set_too_with_or_without_held_out_questions(workplace: Path) -> None:
    embed()
    fetch_data.EMBEDDED.rename("mine")
    choose("data", "./mine", None, {"train": "test"})
    fetch_data.main()
    names = ["manifest.json", "plain.jsonl", "questions.parquet", *(f"{split}.parquet" for split in sorted(SPLITS))]
    assert sorted(path.name for path in Path("data/raw").iterdir()) == names
    assert sha256_file(Path("data/raw/train.parquet")) == sha256_file(Path("mine/test.parquet"))
    for name in ("questions.parquet", "plain.jsonl"):
        (Path("mine") / name).unlink()
    fetch_data.main()
    assert not {"questions.parquet", "plain.jsonl"} & {path.name for path in Path("data/raw").iterdir()}
    Path("mine/cut.parquet").write_bytes(b"PAR1")
    choose("data", "./mine", None, {"train": "cut"})
    with pytest.raises(UserError, match=r"^mine/cut\.parquet: not a readable Parquet file"):
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
    assert manifest == {"source": "./mine", "revision": "local", "files": wanted}
    choose("model", "./nothing", None)
    with pytest.raises(UserError, match="holds no safetensors model"):
        fetch_model.main()
    assert json.loads(Path("models/base/manifest.json").read_text()) == manifest


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
