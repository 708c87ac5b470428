"""The a40 profile from rows to a GGUF that writes, at Llama-3's own widths and vocabulary, with 2 of its 32 layers and 2 pairs."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from transformers import GenerationConfig

from hermes.artifacts import read_json
from hermes.console import UserError
from hermes.model.safetensors_stream import stored_tensors
from hermes.params import read_yaml
from tools import rehearse
from tools.rehearse import STAGES, markdown


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished rehearsal."""
    folder = tmp_path_factory.mktemp("rehearsal")
    rehearse.write_json(folder / "found.json", rehearse.rehearse("a40", 2, 2, folder))
    return folder


def test_every_stage_ran_at_the_widths_of_llama_3(folder: Path) -> None:
    found = read_json(folder / "found.json")
    assert found["stages"].keys() == {*STAGES, "generate"}
    assert found["weights"] == 1_486_901_248
    shapes = {tensor.name: (tensor.dtype, tensor.shape) for tensor in stored_tensors(folder / "models/merged")}
    assert shapes["lm_head.weight"] == ("BF16", (128_256, 4096))
    assert shapes["model.layers.1.mlp.down_proj.weight"] == ("BF16", (4096, 14_336))


def test_the_step_moved_the_adapter_and_the_merge_the_weights(folder: Path) -> None:
    found = read_json(folder / "found.json")
    assert found["largest_b"] > 1e-6
    assert 0 < found["merge"]["swallowed"] < 1
    base, merged = (
        {tensor.name: tensor for tensor in stored_tensors(folder / f"models/{name}")} for name in ("base", "merged")
    )
    changed = {name for name in base if not base[name].read().equal(merged[name].read())}
    assert changed
    assert all("proj" in name for name in changed)


def test_the_gguf_ends_answers_and_splits_text_as_llama_3(folder: Path) -> None:
    found = read_json(folder / "models/gguf/quantize.json")["metadata"]
    assert (found["pre"], found["bos"], found["eos"]) == ("llama-bpe", 128_000, 128_001)
    assert not (folder / "models/base/generation_config.json").exists()
    assert GenerationConfig.from_pretrained(folder / "models/merged").eos_token_id == [128_001, 128_009]


def test_the_profile_is_the_one_that_ran(folder: Path) -> None:
    theirs, ours = read_yaml(folder / "params.yaml"), read_yaml(rehearse.ROOT / "params.yaml")
    assert theirs["profile"] == "a40"
    for section in ("base", "tokenize", "merge", "reference"):
        wanted = ours["profiles"]["a40"][section] | (
            {"threads": theirs["profiles"]["a40"]["base"]["threads"]} if section == "base" else {}
        )
        assert theirs["profiles"]["a40"][section] == wanted


def test_started_again_it_does_nothing_twice(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted((folder / "models").rglob("*")) if path.is_file()}
    again = rehearse.rehearse("a40", 2, 2, folder)
    found = read_json(folder / "found.json")
    assert {stage: again["stages"][stage] for stage in STAGES} == {stage: found["stages"][stage] for stage in STAGES}
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_page_names_every_stage(folder: Path) -> None:
    page = markdown(read_json(folder / "found.json"))
    assert "`make rehearse PROFILE=a40 LAYERS=2 PAIRS=2` on " in page
    assert "1.49 billion random weights (2 layers" in page
    assert "one optimizer step of 2 of the profile's 32 pairs" in page
    rows = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| ")]
    assert rows == ["stage", *STAGES, "generate"]


@pytest.mark.parametrize(("pairs", "batch"), [(2, 2), (8, 8), (12, 4), (32, 8)])
def test_the_step_is_of_all_pairs_that_were_asked_for(pairs: int, batch: int) -> None:
    changed = rehearse.overrides(rehearse.load("a40"), pairs, "./random-model")["train"]
    assert (changed["batch_size"], changed["batch_size"] * changed["accumulation"]) == (batch, pairs)


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        rehearse.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100 << 30, 60 << 30, 40 << 30)
    )
    with pytest.raises(UserError, match=r"^40 GB free in .*, 49 are needed; .*, or use fewer --layers$"):
        rehearse.rehearse("a40", None, None, tmp_path / "new")
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
            found = rehearse.memory_of(psutil.Process(process.pid)).anonymous
            time.sleep(0.1)
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    assert found >= 200_000_000


def test_looking_at_memory_takes_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def slow(process: psutil.Process) -> rehearse.Peak:
        looks.append(process)
        time.sleep(0.1)
        return rehearse.Peak(anonymous=7)

    monkeypatch.setattr(rehearse, "memory_of", slow)
    monkeypatch.setattr(rehearse, "SAMPLE_SECONDS", 0.01)
    with rehearse.watched(psutil.Process(), tmp_path) as peak:
        time.sleep(1)
    assert (len(looks), peak.anonymous) == (1, 7)
