"""The checks of `make gpu-check`, on tiny models and the CPU: each passes or says what it needs, and fails where it is to find a fault."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest

from hermes.artifacts import read_json

ROOT = Path(__file__).parent.parent
NEEDS_GPUS = {"paging", "memory[4 layers of 8B]", "two processes[ddp]", "two processes[fsdp]"}


def run_checks(folder: Path, *options: str) -> tuple[int, list[str], dict[str, Any]]:
    """The exit code of the checks, run in a folder on the CPU, the lines that they print, and their record."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", str(ROOT / "tests/gpu"), "--gpu-device", "cpu", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines(), read_json(folder / ".scratch/gpu-check/cpu.json")


@pytest.mark.slow
def test_every_check_passes_on_a_cpu_or_says_what_it_needs(tmp_path: Path) -> None:
    code, printed, record = run_checks(tmp_path)
    assert code == 0, "\n".join(printed)
    lines = {line["name"]: line for line in record["lines"]}
    assert {name for name, line in lines.items() if line["verdict"] == "skip"} == NEEDS_GPUS
    assert {line["verdict"] for name, line in lines.items() if name not in NEEDS_GPUS} == {"pass"}
    assert all("needs" in lines[name]["finding"] for name in NEEDS_GPUS)
    assert lines["resume"]["finding"].endswith("resumed to the same losses")
    assert lines["bfloat16 forward"]["numbers"]["stock"] > 0
    assert record["left"] == []
    assert record["machine"]["bitsandbytes"] == bitsandbytes.__version__
    for line in record["lines"]:
        assert any(row.split() == f"{line['name']} {line['verdict']} {line['finding']}".split() for row in printed)
    assert [path.name for path in tmp_path.iterdir()] == [".scratch"]
    assert [path.name for path in (tmp_path / ".scratch/gpu-check").iterdir()] == ["cpu.json"]


@pytest.mark.slow
def test_a_check_fails_where_what_it_checks_is_broken_and_a_run_cut_short_leaves_its_record(tmp_path: Path) -> None:
    code, printed, record = run_checks(tmp_path, "-p", "tests.broken_gpu_checks")
    assert code == pytest.ExitCode.INTERRUPTED, "\n".join(printed)
    verdicts = {line["name"]: line["verdict"] for line in record["lines"]}
    assert {name for name, verdict in verdicts.items() if verdict != "fail"} == {"paging", "memory[4 layers of 8B]"}
    assert len(verdicts) == 15
    assert record["left"] == ["two processes[ddp]", "two processes[fsdp]"]
    findings = {line["name"]: line["finding"] for line in record["lines"]}
    assert "attention_math" in findings["attention kernel"]
    assert "TypeError: 'str' object is not callable" in findings["llama cpp"]
    assert findings["training"].endswith("; train: no memory")
    assert "training ended before it could be killed" in findings["resume"]
    assert any(row.startswith("training ") and row.endswith("train: no memory") for row in printed)


@pytest.mark.slow
def test_without_a_gpu_they_say_so_in_one_line_and_other_tests_run_without_them(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q"]
    alone = subprocess.run([*command, "-m", "gpu", ROOT / "tests/gpu"], cwd=tmp_path, capture_output=True, text=True)
    assert alone.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = (alone.stdout + alone.stderr).strip().splitlines()
    assert "no CUDA device here" in line
    assert "--gpu-device cpu" in line
    others = ["--ignore-glob", "tests/[!g]*", "tests"]
    among = subprocess.run([*command, *others], cwd=ROOT, capture_output=True, text=True)
    assert among.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert "17 deselected" in among.stdout
