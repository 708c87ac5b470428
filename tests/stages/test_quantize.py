"""The stage quantize on a tiny model whose rows 256 does not divide."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from gguf import GGUFReader
from ruamel.yaml import YAML

from hermes import params
from hermes.artifacts import check_together, read_json, write_manifest
from hermes.console import UserError
from hermes.data.calibration import calibration_ids
from hermes.model import gguf_files, importance
from hermes.settings.calibration import CalibrationSettings
from hermes.settings.experiment import check
from hermes.settings.quantize import QuantizeSettings
from stages import quantize
from tests.conftest import ROOT, cpu_params

FOLDER = Path("models/gguf")


@pytest.fixture
def workplace(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The merged model, and 12 training pairs of 30 tokens."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model_folder, "models/merged")
    ids = torch.randint(5, 500, (12, 30), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"prompt_ids": row[:10], "chosen_ids": row[10:], "rejected_ids": [1]} for row in ids]
    Path("data/tokens").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), "data/tokens/train.parquet")
    for folder in ("models/merged", "data/tokens"):
        write_manifest(Path(folder))
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, types: Any, imatrix: bool) -> dict[str, Any]:
    settings = QuantizeSettings(types=types, imatrix=imatrix)
    loaded = quantize.Params(calibration=CalibrationSettings(pairs=4), quantize=settings)
    monkeypatch.setattr(params, "load", lambda _: loaded)
    quantize.main()
    found: dict[str, Any] = read_json(FOLDER / "quantize.json")
    return found


def test_a_ladder_is_rounded_by_the_training_pairs(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(monkeypatch, "ladder", imatrix=True)
    assert found["divides_256"] == 0
    assert {kind: file["imatrix"] for kind, file in found["files"].items()} == {
        "f16": False,
        "Q8_0": False,
        "Q5_0": True,
        "IQ4_NL": True,
    }
    assert found["importance"] == {"pairs": 4, "tokens": 120, "matrices": 14}
    assert "fall back" not in capsys.readouterr().out
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {"imatrix.gguf", "quantize.json", "manifest.json", *(f"{kind}.gguf" for kind in found["files"])}
    check_together(Path("models/merged"), Path("data/tokens"), FOLDER)
    columns = importance.read(FOLDER / "imatrix.gguf")
    gguf_files.quantize(FOLDER / "f16.gguf", Path("again.gguf"), "Q5_0", importance=columns)
    assert Path("again.gguf").read_bytes() == (FOLDER / "Q5_0.gguf").read_bytes()
    source = GGUFReader(FOLDER / "f16.gguf")
    usages = importance.importance(FOLDER / "f16.gguf", source, calibration_ids(4))
    importance.write(Path("again.gguf"), usages, calibration_ids(4))
    assert Path("again.gguf").read_bytes() == (FOLDER / "imatrix.gguf").read_bytes()


def test_a_type_that_falls_back_is_said_in_one_line(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(monkeypatch, ["Q4_0", "Q4_K_M"], imatrix=False)
    assert found["importance"] is None
    assert not (FOLDER / "imatrix.gguf").exists()
    assert not any(file["imatrix"] for file in found["files"].values())
    file = found["files"]["Q4_K_M"]
    assert file["fallback"] == sum(file["matrices_by_type"].values()) == 15
    types = ", ".join(f"{count} to {name}" for name, count in file["matrices_by_type"].items())
    said = [line for line in capsys.readouterr().out.splitlines() if "fall back" in line]
    assert said == [f"Q4_K_M: 15 of 15 matrices fall back, {types}, since 256 does not divide their rows"]


def test_a_type_that_needs_the_importance_matrix_is_refused_before_any_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for imatrix in (True, False):
        tree = cpu_params(quantize={"types": ["Q4_0", "IQ2_M"], "imatrix": imatrix})
        YAML().dump(tree, tmp_path / "params.yaml")
        if imatrix:
            assert check(tmp_path / "params.yaml").profile.quantize.types == ["Q4_0", "IQ2_M"]
            continue
        with pytest.raises(UserError, match=r"quantize`: IQ2_M is rounded .*; set `quantize\.imatrix: true`$"):
            check(tmp_path / "params.yaml")
