"""Fixtures of the tests of both fetching stages."""

import os
import shutil
import socket
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.stages.fetching import LARGE_FILE, ROOT, ROWS, Hub


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


@pytest.fixture
def no_network() -> str:
    """An address at which nobody listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{closed.getsockname()[1]}"


@pytest.fixture
def large(hub: str) -> str:
    """The Hub, with a model of 25 MB."""
    Hub.repositories["models/tests/large"] = {"config.json": b"{}", "model.safetensors": LARGE_FILE}
    return hub
