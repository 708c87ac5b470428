"""W&B on real sockets: a server that is away, silent or refusing stops no training, and what was logged stays to be sent."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
KEY = "c0ffee" * 6 + "cafe"
PARAMS = "wandb: {enabled: true, project: p}\nprofile: p\nprofiles: {p: {}}\n"
LOGS = """
import sys
from hermes.training import tracking
tracking.SECONDS = 3
with tracking.Tracking.start({"beta": 0.1}) as run:
    run.log({"loss": 0.6931}, step=1)
    if "fails" in sys.argv:
        raise ValueError("the training failed")
"""


@contextmanager
def server(code: int) -> Iterator[tuple[str, list[str]]]:
    """A W&B server that answers everything with one code, and with what a run needs where that is 200; the paths asked for."""
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append(self.path)
            answer = json.dumps(self.answer(body) if code == 200 else {}).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_PUT = do_POST

        def answer(self, body: bytes) -> object:
            if self.path != "/graphql":
                return {}
            asks = json.loads(body)
            if "UpsertBucket" in asks["query"]:
                project = {"id": "1", "name": "p", "entity": {"id": "2", "name": "e"}}
                run = {"id": "3", "name": "r", "displayName": "r", "config": "{}", "historyLineCount": 0}
                return {"data": {"upsertBucket": {"bucket": {**run, "project": project}, "inserted": True}}}
            files = [{"name": name, "uploadUrl": f"{url}/{name}"} for name in asks["variables"].get("files", [])]
            return {"data": {"createRunFiles": {"runID": "3", "uploadHeaders": [], "files": files}}}

        def log_message(self, *args: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as http:
        url = f"http://127.0.0.1:{http.server_port}"
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield url, asked
        http.shutdown()


def workspace(folder: Path) -> None:
    (folder / "params.yaml").write_text(PARAMS)
    (folder / "dvc.yaml").write_text("stages: {}\n")


def log(folder: Path, url: str, *words: str, key: str = KEY) -> tuple[str, Path]:
    """Logs a step in a process of its own; what it said, and the folder of the run."""
    workspace(folder)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", LOGS, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "WANDB_BASE_URL": url, "WANDB_API_KEY": key},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == ("fails" in words), done.stderr
    assert time.monotonic() - started < 60
    (run,) = (folder / ".scratch/wandb/wandb").glob("offline-run-*")
    assert KEY.encode() not in b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert KEY not in done.stdout + done.stderr
    return done.stdout + done.stderr, run


def kept(said: str, run: Path, start: str) -> bool:
    """Whether one line says how to send the run that is kept."""
    (line,) = said.splitlines()
    sent = re.fullmatch(rf"W&B {start}; to send it: \.venv/bin/wandb sync (\S+)", line)
    return sent is not None and Path(sent[1]) == run and next(run.glob("*.wandb")).stat().st_size > 0


def test_a_run_is_sent_when_training_has_ended(tmp_path: Path) -> None:
    with server(200) as (url, asked):
        said, run = log(tmp_path, url)
    assert said == f"W&B has the run in {run}\n"
    assert "/files/e/p/r/file_stream" in asked
    assert "/sdk/otel/v1/metrics" not in asked


@pytest.mark.parametrize("code", [401, 500])
def test_a_server_that_refuses_costs_no_run(code: int, tmp_path: Path) -> None:
    with server(code) as (url, asked):
        said, run = log(tmp_path, url)
    assert asked
    assert kept(said, run, "did not take the run")


@pytest.mark.parametrize("listens", [True, False])
def test_a_server_that_is_silent_or_away_is_not_waited_for(listens: bool, tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listens:
            silent.listen()  # the kernel accepts, and nobody answers
        said, run = log(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert kept(said, run, "did not take the run")


def test_without_a_key_nothing_is_sent_and_a_later_sync_sends_it(tmp_path: Path) -> None:
    with server(200) as (url, asked):
        said, run = log(tmp_path, url, key="")
        assert asked == []
        assert kept(said, run, "keeps the run in a folder")
        environment = os.environ | {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY}
        subprocess.run([sys.executable, "-m", "wandb", "sync", str(run)], env=environment, check=True, timeout=100)
        assert "/files/e/p/r/file_stream" in asked


def test_a_training_that_fails_sends_nothing_and_its_error_stays(tmp_path: Path) -> None:
    with server(200) as (url, asked):
        said, run = log(tmp_path, url, "fails")
    assert asked == []
    assert kept(next(line for line in said.splitlines() if line.startswith("W&B")), run, "keeps the run in a folder")
    assert said.endswith("ValueError: the training failed\n")


READ_BACK = """
import json, sys
from pathlib import Path
from hermes.training.tracking import Artifact, Tracking
for part in ("train", "resumed"):
    with Tracking.start({"beta": 0.1}, "a1b2c3") as run:
        run.log({"loss": 0.6931}, step=1 if part == "train" else 2)
with Tracking.start({"beta": 0.1}, "a1b2c3") as run:
    made = Artifact("models-adapter", "model", "0123.dir", {"data/tokens": "4567.dir"})
    run.results(3, {"strict_accuracy.merged": 0.7}, (["id", "base"], [["q1", "No."]]), [Path("loss.png")], [made])
"""


def records(run: Path) -> list[Any]:
    """What wandb wrote into an offline run."""
    from wandb.proto import wandb_internal_pb2

    from tests.hermes.leveldb_log import read_log

    (file,) = run.glob("*.wandb")
    return [
        wandb_internal_pb2.Record.FromString(data)  # type: ignore[attr-defined]
        for data in read_log(file.read_bytes())
    ]


def test_an_offline_run_is_read_back_with_one_id_its_answers_and_the_lineage_of_its_artifacts(tmp_path: Path) -> None:
    workspace(tmp_path)
    Figure().savefig(tmp_path / "loss.png")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_API_KEY": ""}
    done = subprocess.run(
        [sys.executable, "-c", READ_BACK], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    runs = sorted((tmp_path / ".scratch/wandb/wandb").glob("offline-run-*"))
    found = [record for run in runs for record in records(run)]
    assert {record.run.run_id for record in found if record.WhichOneof("record_type") == "run"} == {"a1b2c3"}
    steps = [record.history.step.num for record in found if record.WhichOneof("record_type") == "history"]
    assert steps == [1, 2, 3]
    logged = [record.artifact for record in found if record.WhichOneof("record_type") == "artifact"]
    (artifact,) = (one for one in logged if one.type == "model")
    assert json.loads(artifact.metadata) == {"md5": "0123.dir", "made_from": {"data/tokens": "4567.dir"}}
    assert [(entry.path, entry.ref) for entry in artifact.manifest.contents] == [
        ("models-adapter", "dvc://md5/0123.dir")
    ]
    tables = [path for run in runs for path in run.rglob("*.table.json")]
    assert json.loads(tables[0].read_text())["data"] == [["q1", "No."]]
    sent = [path for run in runs for path in run.rglob("*") if path.is_file() and path.parent.name != "logs"]
    assert str(tmp_path).encode() not in b"".join(path.read_bytes() for path in sent)
    last = done.stderr.strip().splitlines()[-1]  # names every part of the run, which W&B puts together
    assert all(run.name in last for run in runs)


def test_an_address_that_is_none_turns_it_off_in_one_line(tmp_path: Path) -> None:
    workspace(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_BASE_URL": "nonsense"}
    command = [sys.executable, "-c", LOGS]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.startswith("W&B is off: ")
    assert done.stderr.count("\n") == 1
