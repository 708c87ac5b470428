"""A small graph is rebuilt in a clone: the same bits are said to be the same, and others by file, numbers and machine."""

import json
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from hermes.artifacts import read_json
from hermes.console import UserError
from tests.conftest import ROOT
from tools import machine, verify

MAKE = """\
import json, pathlib, sys
import pyarrow as pa, pyarrow.parquet as pq
seed = int(pathlib.Path(sys.argv[1]).read_text()) if len(sys.argv) > 1 else 1
pathlib.Path("timings").mkdir(exist_ok=True)
if sys.argv[-1] == "last":
    pathlib.Path("report.json").write_text(json.dumps({"score": seed, "n": [1, 2]}))
else:
    pathlib.Path("rows").mkdir(exist_ok=True)
    pq.write_table(pa.table({"x": [1.0, 2.0, 3.0 + seed]}), "rows/a.parquet")
    pathlib.Path("rows/b.txt").write_text("b")
pathlib.Path(f"timings/{sys.argv[-1]}.json").write_text("{}")
"""
GRAPH = """\
stages:
  first:
    cmd: {python} make.py seed first
    deps: [make.py, seed]
    outs: [rows]
  last:
    cmd: {python} make.py seed last
    deps: [make.py, rows]
    outs:
      - report.json:
          cache: false
"""


def git(*arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with results of two stages, committed, whose hashes are recorded."""
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.chdir(root)
    Path("make.py").write_text(MAKE)
    Path("seed").write_text("1")
    Path("dvc.yaml").write_text(GRAPH.format(python=sys.executable))
    Path("params.yaml").write_text("bits: portable\nprofile: cpu\nprofiles: {cpu: {}, quick: {}}\n")
    Path(".gitignore").write_text("rows\ntimings\n.scratch\n")
    git("init", "-q")
    for command in (["init", "-q"], ["repro", "-q"]):
        subprocess.run([sys.executable, "-m", "dvc", *command], check=True, capture_output=True)
    Path("reports").mkdir()
    verify.record(root)
    git("add", "-A")
    git("commit", "-q", "-m", "results")
    (root / verify.SCRATCH).mkdir(exist_ok=True)
    return root


def test_what_is_rebuilt_with_the_same_bits_is_said_so_and_the_clone_is_gone(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert verify.verify(project, "cpu", "portable", None) == 0
    said = capfd.readouterr().out
    assert "first: the same bits (2 files)" in said
    assert "last: the same bits (1 files)" in said
    assert "machine: as the one that made the committed results" in said
    assert not list((project / verify.SCRATCH).glob("verify-*"))


def test_up_to_a_stage_only_what_ran_is_compared(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert verify.verify(project, "cpu", "portable", "first") == 0
    said = capfd.readouterr().out
    assert "first: the same bits" in said
    assert "last: the same" not in said


def test_other_bits_are_told_by_file_and_number_and_the_clone_stays(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("seed").write_text("2")
    git("commit", "-q", "-am", "another seed, and hashes of the old one")
    known = read_json(verify.HASHES)
    known["cpu"]["portable"]["made_on"]["cpu"]["model"] = "another one"
    verify.HASHES.write_text(json.dumps(known))
    assert verify.verify(project, "cpu", "portable", None) == 1
    said = capfd.readouterr().out
    assert "first: 1 of 2 files differ" in said
    assert "rows/a.parquet: 1 numbers differ, by up to 1 (x: 1)" in said
    assert "report.json: 1 numbers differ, by up to 1 (score: 1)" in said
    assert "another one there" in said
    (clone,) = (project / verify.SCRATCH).glob("verify-*")
    assert (clone / "report.json").is_file()


@pytest.mark.parametrize(
    ("tolerated", "exact", "code", "said"),
    [
        (1.0, (), 0, "last: other bits, 1 numbers within tolerance (1 files)"),
        (0.5, (), 1, "report.json: score is 2, committed 1; 0.5 are tolerated"),
        (1.0, ("first",), 1, "first: 1 of 2 files differ"),
    ],
)
def test_where_no_bits_are_promised_numbers_have_tolerances(
    tolerated: float,
    exact: tuple[str, ...],
    code: int,
    said: str,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    Path("seed").write_text("2")
    git("commit", "-q", "-am", "another seed, and hashes of the old one")
    monkeypatch.setattr(verify, "can", lambda bits: False)
    monkeypatch.setattr(verify, "EXACT", exact)
    monkeypatch.setattr(verify, "TOLERANCES", {"report.json": {"score": tolerated}})
    assert verify.verify(project, "cpu", "portable", None) == code
    out = capfd.readouterr().out
    assert "no bits are promised on this machine" in out
    assert said in out
    assert ("first: other bits, to be judged by later numbers" in out) == (not exact)


def test_a_number_that_is_gone_is_out_of_tolerance(tmp_path: Path) -> None:
    committed, found = tmp_path / "a.json", tmp_path / "b.json"
    committed.write_text('{"a": {"x": 1, "y": 2}, "z": 3}')
    found.write_text('{"a": {"x": NaN}, "z": 9}')
    count, lines = verify.out_of_tolerance(committed, found, {"a.*": 0.5})
    assert count == 2
    assert lines == ["a.x is nan, committed 1; 0.5 are tolerated", "a.y is missing"]


def test_the_tolerances_are_of_numbers_that_the_committed_results_have() -> None:
    for path, tolerances in verify.TOLERANCES.items():
        found = verify.numbers(ROOT / path)
        for pattern in tolerances:
            assert any(fnmatch(name, pattern) for name in found), (path, pattern)


@pytest.mark.parametrize("stage", ["nonsense", "--help", "-f", ""])
def test_what_is_no_stage_is_refused_before_anything_is_built(stage: str, project: Path) -> None:
    with pytest.raises(UserError, match=r"^no stage .*; choose one of first"):
        verify.verify(project, "cpu", "portable", stage)
    assert not list((project / verify.SCRATCH).glob("verify-*"))


def test_a_rebuild_that_fails_leaves_no_clone(project: Path) -> None:
    known = read_json(verify.HASHES)
    known["cpu"]["portable"]["stages"]["nonsense"] = {}
    verify.HASHES.write_text(json.dumps(known))
    assert verify.verify(project, "cpu", "portable", "nonsense") == 255
    assert not list((project / verify.SCRATCH).glob("verify-*"))


def test_without_hashes_of_the_profile_nothing_is_built(project: Path) -> None:
    with pytest.raises(UserError, match="has no hashes of the profile quick with `bits: portable`"):
        verify.verify(project, "quick", "portable", None)


def test_results_that_are_not_up_to_date_are_not_recorded(project: Path) -> None:
    Path("seed").write_text("3")
    with pytest.raises(UserError, match="not all stages are up to date"):
        verify.record(project)


def test_numbers_are_compared_in_every_format(tmp_path: Path) -> None:
    def both(name: str) -> tuple[Path, Path]:
        return tmp_path / f"a-{name}", tmp_path / f"b-{name}"

    left, right = both("x.csv")
    left.write_text("step,loss\n1,0.5\n2,0.25\n")
    right.write_text("step,loss\n1,0.5\n2,0.125\n")
    assert verify.distance(left, right, ".csv") == "1 numbers differ, by up to 0.125 (1.loss: 1)"
    left, right = both("x.jsonl")
    left.write_text('{"a": 1}\n{"a": [1, null]}\n')
    right.write_text('{"a": 1}\n{"b": [1, null]}\n')
    assert verify.distance(left, right, ".jsonl") == "2 values are in one of them alone, such as 1.a.0"
    left, right = both("x.safetensors")
    save_file({"w": torch.zeros(2, 2), "v": torch.ones(3)}, left)
    save_file({"w": torch.eye(2) / 4, "v": torch.ones(3)}, right)
    assert verify.distance(left, right, ".safetensors") == "2 numbers differ, by up to 0.25 (w: 2)"
    left, right = both("x.parquet")
    pq.write_table(pa.table({"p": [[0.5, np.nan], [1.0]]}), left)
    pq.write_table(pa.table({"p": [[0.5, np.nan], [2.0]]}), right)
    assert verify.distance(left, right, ".parquet") == "1 numbers differ, by up to 1 (p: 1)"
    assert verify.distance(left, left, ".parquet") == "the same numbers, in other words"
    assert verify.distance(left, right, ".gguf").endswith(" bytes")


def test_what_two_machines_have_not_in_common_is_named() -> None:
    here = machine.facts()
    assert machine.differences(here, here) == []
    there = json.loads(json.dumps(here)) | {"python": "2.7"}
    there["cpu"] |= {"flags": ["avx2"]}
    assert f"python: {here['python']} here, 2.7 there" in machine.differences(here, there)
    assert any(
        line.startswith("cpu flags: ") and line.endswith("avx2 there") for line in machine.differences(here, there)
    )


def test_instruction_sets_are_read_from_cpuinfo(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor: 0\nmodel name\t: A CPU\nflags\t\t: fpu avx2 fma avx512f other\n")
    assert machine.cpu(file) == {"model": "A CPU", "flags": ["avx2", "fma", "avx512f"]}
    assert machine.cpu(tmp_path / "none")["flags"] == []
