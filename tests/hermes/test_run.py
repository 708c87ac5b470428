"""How a program ends: in one line where the user or the machine is why, with a traceback where nobody knows."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hermes.shortage import lack

ROOT = Path(__file__).parents[2]
WRITES = {
    "Python": "open(PATH, 'wb').write(b'x' * 10**6)",
    "JSON": "from hermes.artifacts import write_json; write_json(pathlib.Path(PATH), ['x' * 10**6])",
    "Parquet": "import pyarrow as pa, numpy as np; from hermes.artifacts import write_parquet; "
    "write_parquet(pathlib.Path(PATH), pa.table({'x': np.random.default_rng(0).random(10**5)}))",
    "safetensors": "import torch; from safetensors.torch import save_file; save_file({'x': torch.ones(10**6)}, PATH)",
}


def run(program: str, path: Path, limit: Callable[[], None] | None = None, **environment: str) -> tuple[int, list[str]]:
    """The exit code and the lines of the standard error of a program under run_tool, with limits of its own."""
    script = f"import pathlib, sys; PATH = {str(path)!r}\nfrom hermes.run import run_tool\n"
    script += f"def main():\n    {program}\nrun_tool('tool', main)"
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        preexec_fn=limit,
        check=False,
    )
    return ran.returncode, ran.stderr.splitlines()


@pytest.mark.parametrize("kind", WRITES)
def test_a_file_that_may_not_grow_is_told_in_one_line_and_is_not_there(kind: str, tmp_path: Path) -> None:
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # noqa: E731
    code, lines = run(WRITES[kind], tmp_path / "file", limit)
    assert code == 1
    assert len(lines) == 1, lines
    assert lines[0].startswith("tool: ")
    assert "larger than this process may write; raise `ulimit -f` and run the same command again" in lines[0]
    assert kind in ("Python", "safetensors") or not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_told_with_what_is_free() -> None:
    code, lines = run(WRITES["Python"], Path("/dev/full"))
    assert (code, len(lines)) == (1, 1)
    assert "no space left (" in lines[0]
    assert lines[0].endswith(" GiB free here); free some and run the same command again, it goes on")


def test_a_folder_that_is_not_writable_is_named(tmp_path: Path) -> None:
    code, lines = run("raise PermissionError(13, 'no', PATH)", tmp_path)  # root may write anywhere
    assert (code, lines) == (
        1,
        [f"tool: {tmp_path}: Permission denied; give this user the right to it and run the same command again"],
    )


@pytest.mark.parametrize(
    "program", ["x = bytearray(10**14)", "import torch; torch.empty(10**14)", "import numpy; numpy.ones(10**14)"]
)
def test_no_memory_is_told_in_one_line_and_names_the_planner(program: str, tmp_path: Path) -> None:
    code, lines = run(program, tmp_path)
    assert (code, len(lines)) == (1, 1), lines
    assert "not enough memory" in lines[0]
    assert "`make plan` says what a run needs" in lines[0]


def test_the_traceback_is_there_where_it_is_asked_for(tmp_path: Path) -> None:
    code, lines = run("raise MemoryError", tmp_path, HERMES_TRACEBACK="1")
    assert code == 1
    assert lines[0].startswith("Traceback")


def test_an_error_behind_another_is_found_and_an_unknown_one_is_not() -> None:
    error = RuntimeError("could not save")
    error.__cause__ = OSError(28, "No space left on device", "here")
    assert str(lack(error)).startswith("here: no space left")
    error.__context__, error.__cause__, error.__suppress_context__ = error.__cause__, None, False
    assert str(lack(error)).startswith("here: no space left")
    error.__suppress_context__ = True  # `from None`
    assert lack(error) is None
    assert lack(PermissionError(13, "a socket, of no name")) is None
    assert lack(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert lack(RuntimeError("shapes differ")) is None
    assert lack(FileNotFoundError(2, "No such file or directory", "x")) is None
