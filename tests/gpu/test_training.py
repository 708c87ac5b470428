"""The stages reference and train on the device: the loss begins at ln 2, falls, and repeats after a kill and in two processes."""

import csv
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hermes.artifacts import read_json
from stages import train
from tests.gpu.projects import ROOT, SMOLLM2_135M, Found, make_project, random_pairs, shape_for
from tools.dvc_runs import environment

pytestmark = pytest.mark.gpu

STEPS, CHECKPOINT_STEPS = 20, 4
TRAIN = "from stages import train; train.main()"
# set_determinism warns only, since what raises is not known before a GPU is asked
STRICTLY = f"""
import torch
real = torch.use_deterministic_algorithms
torch.use_deterministic_algorithms = lambda mode, warn_only=False: real(mode)
{TRAIN}
"""
REFERENCE_AND_TRAIN = f"from stages import reference; reference.main(); {TRAIN}"


def start(project: Path, program: str) -> subprocess.Popen[bytes]:
    """Starts a Python program in a project, with this checkout's code; pytest shows what it writes where the check fails."""
    return subprocess.Popen([sys.executable, "-c", program], cwd=project, env=environment() | {"PYTHONPATH": str(ROOT)})


def run(project: Path, program: str) -> None:
    with start(project, program) as process:
        assert process.wait() == 0, f"{program}: exit status {process.returncode}"


def losses(project: Path) -> list[float]:
    """The preference loss of each step."""
    with (project / train.REPORTS / "history.csv").open() as file:
        return [float(row["preference_loss"]) for row in csv.DictReader(file)]


def check_learning(project: Path, found: Found) -> None:
    """Trains there, from ln 2 downwards."""
    began = time.monotonic()
    run(project, REFERENCE_AND_TRAIN)
    steps, seconds = losses(project), time.monotonic() - began
    last = sum(steps[-3:]) / 3
    noise = read_json(project / train.REPORTS / "summary.json")["reference_difference"]
    found(
        f"{len(steps)} steps in {seconds:.0f} s, loss {steps[0]:.4f} at the first and {last:.4f} at the last three",
        first=steps[0],
        last=last,
        seconds=seconds,
        reference_difference=noise,
    )
    assert len(steps) == STEPS
    assert abs(steps[0] - math.log(2)) < 5e-3
    assert last < 0.9 * math.log(2)


@pytest.fixture(scope="module")
def project(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    shape = shape_for(device, SMOLLM2_135M)
    rows = random_pairs(shape, 40, 20, 30, ragged=True)
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "checkpoint_steps": CHECKPOINT_STEPS,
        "batch_size": 4,
        "learning_rate": 2e-3,
    }
    make_project(folder, device, shape, rows, **settings)
    return folder


def test_training(project: Path, found: Found) -> None:
    check_learning(project, found)


def kill_at_a_checkpoint(project: Path) -> int:
    """Starts training and kills it as soon as it has a checkpoint; the step of that."""
    deadline = time.monotonic() + 300
    with start(project, TRAIN) as process:
        try:
            while not (states := list(project.glob(".scratch/train/*/checkpoint-*/trainer_state.json"))):
                assert process.poll() is None, "training ended before it could be killed"
                assert time.monotonic() < deadline, "training has no checkpoint after 300 s"
                time.sleep(0.005)
        finally:
            process.kill()
    return int(states[0].parent.name.partition("-")[2])


def test_resume(device: torch.device, project: Path, found: Found) -> None:
    """Training as in the check before, killed and resumed: the same losses."""
    step = kill_at_a_checkpoint(project)
    whole = losses(project)
    shutil.rmtree(project / train.REPORTS)
    run(project, TRAIN)
    worst = max(abs(a - b) for a, b in zip(whole, losses(project), strict=True))
    same = f"losses off by {worst:.1e} at most" if worst else "the same losses"
    found(f"killed after step {step}, resumed to {same}", step=step, error=worst)
    assert worst <= (1e-3 if device.type == "cuda" else 0.0)


def trained_again(project: Path, program: str) -> tuple[float, str]:
    """Trains anew; the largest distance of the adapter's numbers from those of before, and what went to the standard error."""
    before = load_file(project / train.ADAPTER / "adapter_model.safetensors")
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=project,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        return math.inf, ran.stderr
    after = load_file(project / train.ADAPTER / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    return max(float((before[name] - after[name]).abs().max()) for name in before), ran.stderr


def test_repeat(device: torch.device, project: Path, found: Found) -> None:
    """The same training once more: bits where the device keeps them, and the distance where not."""
    apart, error = trained_again(project, TRAIN)
    assert math.isfinite(apart), error
    found(f"adapters off by {apart:.1e} at most" if apart else "the same bits of the adapter", error=apart)
    assert apart <= (1e-2 if device.type == "cuda" else 0.0)


def test_strict_determinism(device: torch.device, project: Path, found: Found) -> None:
    """With torch told to raise where a kernel is not deterministic: what raises is named, and no other error is one."""
    apart, error = trained_again(project, STRICTLY)
    if math.isfinite(apart):
        found(f"nothing raises; adapters off by {apart:.1e} at most", error=apart)
        return
    named = re.findall(r"(\S+) does not have a deterministic implementation", error)
    assert named, error
    assert device.type == "cuda", error
    found(f"not deterministic: {named[-1]}", raises=named[-1])


@pytest.mark.parametrize("distribution", ["ddp", "fsdp"])
def test_two_processes(distribution: str, device: torch.device, found: Found, tmp_path: Path) -> None:
    """On two GPUs: each with the whole base (DDP), and each with half of it (FSDP)."""
    if (count := torch.cuda.device_count()) < 2:
        pytest.skip(f"needs two GPUs, there are {count}")
    rows = random_pairs(SMOLLM2_135M, 40, 20, 30, ragged=True)
    settings: dict[str, Any] = {"processes": 2, "distribution": distribution, "accumulation": 2, "batch_size": 2}
    make_project(tmp_path, device, SMOLLM2_135M, rows, max_steps=STEPS, learning_rate=2e-3, **settings)
    check_learning(tmp_path, found)
