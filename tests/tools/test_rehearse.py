"""The a40 profile from rows to 4-bit weights and a GGUF that writes, with Llama-3's own tokenizer, 2 narrow layers and 2 pairs."""

import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from transformers import GenerationConfig

from hermes.artifacts import read_json, write_json
from hermes.console import UserError
from hermes.model import llama3
from hermes.model.safetensors_stream import stored_tensors
from hermes.params import read_yaml
from tests.conftest import ROOT
from tools import plan, rehearse
from tools.quantization_plan import folder_size
from tools.rehearse import STAGES, markdown

NARROW = replace(llama3.SHAPE, layers=2, hidden=256, intermediate=512, heads=4, kv_heads=2, head_size=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished rehearsal."""
    folder = tmp_path_factory.mktemp("rehearsal")
    write_json(folder / "found.json", rehearse.rehearse("a40", NARROW, 2, folder))
    return folder


def test_what_the_stages_depend_on_of_the_repository_is_copied() -> None:
    """In a second; that it suffices is seen by the slow tests."""
    stages = read_yaml(ROOT / "dvc.yaml")["stages"]
    needed = {dependency for name in STAGES for dependency in stages[name]["deps"]}
    outputs = {
        next(iter(out)) if isinstance(out, dict) else out for stage in stages.values() for out in stage.get("outs", [])
    }
    copied = (*rehearse.FOLDERS, *rehearse.FILES)
    assert [path for path in sorted(needed - outputs) if not path.startswith(copied)] == []


@pytest.fixture
def found(folder: Path) -> dict[str, Any]:
    """What it found."""
    return read_json(folder / "found.json")


@pytest.mark.slow
def test_every_stage_ran_and_took_memory_and_disk(folder: Path, found: dict[str, Any]) -> None:
    assert found["stages"].keys() == {*STAGES, "generate"}
    for record in found["stages"].values():
        assert 10**7 < record["anonymous"] < record["resident"]
        assert record["disk"] > 2 * found["weights"]
        assert record["seconds"] >= 0  # the shortest is over before a second look
    shapes = {tensor.name: (tensor.dtype, tensor.shape) for tensor in stored_tensors(folder / "models/merged")}
    assert shapes["lm_head.weight"] == ("BF16", (128_256, 256))
    assert shapes["model.layers.1.mlp.down_proj.weight"] == ("BF16", (256, 512))
    assert not (folder / "random-model").exists()


@pytest.mark.slow
def test_gptq_and_awq_rounded_the_weights_after_the_importance_matrix(folder: Path, found: dict[str, Any]) -> None:
    assert found["compressed"].keys() == {"gptq", "awq"}
    assert found["left_out"] == {}
    for method, said in found["compressed"].items():
        assert (said["pairs"], said["group_size"]) == (2, 128)
        assert said["bytes"] == pytest.approx(folder_size(rehearse.load("a40"), NARROW), rel=0.02)
        assert (folder / f"models/compressed/{method}/config.json").is_file()
    assert read_json(folder / "models/gguf/quantize.json")["importance"]["pairs"] == 2


@pytest.mark.slow
def test_the_step_moved_the_adapter_and_the_merge_the_weights(folder: Path, found: dict[str, Any]) -> None:
    assert found["largest_b"] > 1e-6
    assert 0 < found["merge"]["swallowed"] < 1
    base, merged = (
        {tensor.name: tensor for tensor in stored_tensors(folder / f"models/{name}")} for name in ("base", "merged")
    )
    changed = {name for name in base if not base[name].read().equal(merged[name].read())}
    assert changed
    assert all("proj" in name for name in changed)


@pytest.mark.slow
def test_the_gguf_ends_answers_and_splits_text_as_llama_3(folder: Path) -> None:
    found = read_json(folder / "models/gguf/quantize.json")["metadata"]
    assert (found["pre"], found["bos"], found["eos"]) == ("llama-bpe", 128_000, 128_001)
    assert not (folder / "models/base/generation_config.json").exists()
    assert GenerationConfig.from_pretrained(folder / "models/merged").eos_token_id == [128_001, 128_009]


@pytest.mark.slow
def test_the_profile_is_the_one_that_ran(folder: Path) -> None:
    theirs, ours = read_yaml(folder / "params.yaml"), read_yaml(rehearse.ROOT / "params.yaml")
    assert theirs["profile"] == "a40"
    for section in ("base", "tokenize", "merge", "reference"):
        wanted = ours["profiles"]["a40"][section] | (
            {"threads": theirs["profiles"]["a40"]["base"]["threads"]} if section == "base" else {}
        )
        assert theirs["profiles"]["a40"][section] == wanted


@pytest.mark.slow
def test_started_again_it_does_nothing_twice(folder: Path, found: dict[str, Any]) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted((folder / "models").rglob("*")) if path.is_file()}
    again = rehearse.rehearse("a40", NARROW, 2, folder)
    assert {stage: again["stages"][stage] for stage in STAGES} == {stage: found["stages"][stage] for stage in STAGES}
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_the_page_names_every_stage(found: dict[str, Any]) -> None:
    page = markdown(found | {"command": "make rehearse PROFILE=a40 PAIRS=2"})
    assert "`make rehearse PROFILE=a40 PAIRS=2` on " in page
    assert "0.07 billion random weights (2 layers" in page
    assert "one optimizer step of 2 of the profile's 32 pairs" in page
    assert "merge, GGUF Q4_K_M, AWQ, GPTQ, and 8 tokens written by the GGUF." in page
    assert "left out" not in page
    rows = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| ")]
    assert rows == ["stage", *STAGES, "generate"]


def test_a_group_that_does_not_divide_the_shape_is_left_to_the_stage() -> None:
    for shape, group in ((NARROW, 128), (replace(NARROW, intermediate=576), None)):
        changed = rehearse.overrides(rehearse.load("a40"), 2, shape, ["awq"])["compress"]
        assert (changed["group_size"], changed["methods"], changed["awq_pairs"]) == (group, ["awq"], 2)


def test_a_method_without_room_is_left_out_and_the_page_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = rehearse.load("a40")
    assert rehearse.methods_with_room(loaded, NARROW, 0) == (["gptq", "awq"], {})
    size = folder_size(loaded, NARROW)
    monkeypatch.setattr(rehearse.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 2 * size - 1))
    assert rehearse.methods_with_room(loaded, NARROW, 0) == (["gptq"], {"awq": "0.12 GiB more on the disk"})
    monkeypatch.setattr(plan.psutil, "virtual_memory", lambda: SimpleNamespace(total=20 << 30))
    kept, lacking = rehearse.methods_with_room(loaded, llama3.SHAPE, 0)
    assert not kept
    assert lacking.keys() == {"gptq", "awq"}
    assert lacking["awq"].endswith(" GiB of memory, of which there are 20.00 GiB")
    record = {"seconds": 60, "anonymous": 0, "resident": 0, "disk": 0}
    page = markdown(
        {
            "stages": dict.fromkeys((*STAGES, "generate"), record),
            "profile": "a40",
            "command": "make rehearse",
            "cores": 2,
            "bits": "portable",
            "weights": 10**9,
            "shape": vars(NARROW),
            "pairs": 2,
            "pairs_of_profile": 32,
            "largest_b": 1e-5,
            "merge": {"swallowed": 0.5},
            "compressed": {"gptq": {}},
            "left_out": {"awq": "0.12 GiB more on the disk"},
        }
    )
    assert "merge, GGUF Q4_K_M, GPTQ, and 8 tokens" in page
    assert "AWQ was left out, since it needs 0.12 GiB more on the disk." in page


@pytest.mark.parametrize(("pairs", "batch"), [(2, 2), (8, 8), (12, 4), (32, 8)])
def test_the_step_is_of_all_pairs_that_were_asked_for(pairs: int, batch: int) -> None:
    changed = rehearse.overrides(rehearse.load("a40"), pairs, NARROW, [])["train"]
    assert (changed["batch_size"], changed["batch_size"] * changed["accumulation"]) == (batch, pairs)


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        rehearse.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100 << 30, 60 << 30, 40 << 30)
    )
    with pytest.raises(UserError, match=r"^40 GB free in .*, 49 are needed; .*, or use fewer --layers$"):
        rehearse.rehearse("a40", llama3.SHAPE, 32, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_a_number_of_pairs_that_is_none_is_one_line(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["rehearse", f"--pairs={value}"])
    with pytest.raises(SystemExit):
        rehearse.main()
    assert f"{value} is not a whole number above 0" in capsys.readouterr().err.splitlines()[-1]


def test_memory_of_a_process_counts_its_children() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'x = bytearray(200_000_000); import time; time.sleep(20)'])"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        deadline = time.monotonic() + 15
        found = 0
        while found < 200_000_000 and time.monotonic() < deadline:
            found, _ = rehearse.memory_of(psutil.Process(process.pid))
            time.sleep(0.1)
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    assert found >= 200_000_000


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "print(\"Running stage 'merge'\"); raise SystemExit(3)"])
def test_a_stage_that_fails_is_named(code: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{'merge' if 'merge' in code else 'dvc'}: failed; its message is above"):
        rehearse.run_watched([sys.executable, "-c", code], tmp_path, tmp_path / "records.json")
