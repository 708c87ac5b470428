"""The instructions that a stage computes with are those of params.yaml, whatever the environment said before."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hermes import bits
from hermes.console import UserError
from tests.test_graph import STAGES

ROOT = Path(__file__).parents[2]
STAGE = """
import json, os
import torch
from hermes.model.base import check_instructions
check_instructions()
print(json.dumps([torch.backends.cpu.get_cpu_capability(), {name: os.environ.get(name) for name in NAMES}]))
"""
NAMES = sorted(bits.VARIABLES["portable"])
here = pytest.mark.skipif(not bits.can("portable"), reason="a CPU without AVX2")


def run_stage(folder: Path, stage: str, **environment: str) -> list:
    """What a module of the name of a stage finds, run as one in a project with other variables set before."""
    (folder / "stages").mkdir(exist_ok=True)
    (folder / "stages/__init__.py").write_text((ROOT / "stages/__init__.py").read_text())
    (folder / f"stages/{stage}.py").write_text(f"NAMES = {NAMES}\n{STAGE}")
    ran = subprocess.run(
        [sys.executable, "-m", f"stages.{stage}"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found: list = json.loads(ran.stdout)
    return found


@here
@pytest.mark.parametrize(
    ("stage", "asked"), [("train", "portable"), ("train", "avx512"), ("quantize", "avx512"), ("evaluate", "portable")]
)
def test_a_stage_computes_with_what_params_yaml_names(tmp_path: Path, stage: str, asked: str) -> None:
    taken = asked if stage in bits.CHOOSE else "portable"
    if not bits.can(taken):
        pytest.skip("a CPU without AVX-512")
    (tmp_path / "params.yaml").write_text(f"bits: {asked}\n")
    capability, variables = run_stage(tmp_path, stage, ATEN_CPU_CAPABILITY="default", MKL_CBWR="COMPATIBLE")
    assert capability == {"portable": "AVX2", "avx512": "AVX512"}[taken]
    assert variables == bits.VARIABLES[taken]


@here
def test_libraries_that_were_loaded_first_are_found_out(tmp_path: Path) -> None:
    if not bits.can("avx512"):
        pytest.skip("a CPU without AVX-512, where torch takes AVX2 anyway")
    script = "import torch; from hermes import bits; torch.ones(9).exp(); bits.set_variables('portable')\n"
    script += "from hermes.model.base import set_determinism; set_determinism(1)"
    cleared = {name: value for name, value in os.environ.items() if name not in NAMES}
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=cleared, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "RuntimeError: `bits: portable` was chosen, and torch took AVX512" in ran.stderr


def test_the_stages_that_choose_are_those_that_track_it() -> None:
    tracking = {name for name, stage in STAGES.items() if "bits" in stage.get("params", ())}
    assert tracking == {*bits.CHOOSE, "report"}  # which shows it


def test_a_mistake_in_params_yaml_is_left_to_the_check_of_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    for text in ("bits: fast\n", "bits: [", "bits: [portable]\n", "bits: {}\n", "seed: 1\n", None):
        Path("params.yaml").unlink(missing_ok=True)
        if text is not None:
            Path("params.yaml").write_text(text)
        bits.choose("train")
    assert dict(os.environ) == before


def test_a_cpu_without_the_instructions_refuses_avx512_and_takes_portable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bits, "cpu_flags", lambda: frozenset({"avx2", "fma", "f16c", "bmi2", "avx512f"}))
    bits.check("portable")
    with pytest.raises(
        UserError, match="needs a CPU with avx512_bf16, avx512bw, avx512vl, which this one lacks; set `bits: portable`"
    ):
        bits.check("avx512")
