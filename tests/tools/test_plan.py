"""`make plan`: every stage's needs, refused where one does not fit, with the change that helps."""

import subprocess
import sys
from pathlib import Path

import pytest

from hermes.console import UserError
from hermes.model.llama3 import SHAPE
from tools import repro
from tools.memory_plan import Training
from tools.plan import GPUS, HELD_OUT, LAUNCHING, Params, evaluation_seconds, load, needs, plan, refusal, training_of

ROOT = Path(__file__).resolve().parents[2]
A40, SMALL = GPUS["A40"], GPUS["RTX 4090"]


def planned(profile: str) -> tuple[Params, Training]:
    loaded = load(profile)
    return loaded, training_of(loaded)[0]


@pytest.mark.parametrize("profile", ["cpu", "a40", "a40_published"])
def test_every_profile_fits_an_a40(profile: str) -> None:
    text, why = plan(profile, "A40")
    assert why is None
    for line in ("weights", "constants", "adapter", "optimizer", "activations", "logits", "evaluate", "predicted"):
        assert line in text


def test_the_published_base_has_its_shape_without_the_hub() -> None:
    assert planned("a40")[1].shape == SHAPE


def test_a_float32_model_is_too_much_for_24_gb_and_the_change_named_helps() -> None:
    loaded, run = planned("a40")
    why = refusal(loaded, run, SMALL)
    assert why is not None
    assert why.startswith("evaluate needs about 3")
    assert why.endswith("smallest change: evaluate.divergence_pairs: 0, evaluate.batch_size: 4, evaluate.slots: 4")

    def refused(**changes: int) -> bool:
        changed = loaded.model_copy(update={"evaluate": loaded.evaluate.model_copy(update=changes)})
        return refusal(changed, run, SMALL) is not None

    assert refused(batch_size=4, slots=4)  # the model in float32
    assert refused(divergence_pairs=0, batch_size=4)  # llama.cpp's cache
    assert refused(divergence_pairs=0, slots=4)  # that of Transformers
    assert not refused(divergence_pairs=0, batch_size=4, slots=4)


def test_a_fast_gpu_waits_for_python_and_a_slow_one_does_not() -> None:
    loaded, run = planned("a40")
    passes = 3 * len(run.lengths.prompt) + loaded.train.evaluations * HELD_OUT  # with checkpointing
    waiting = passes / loaded.train.batch_size * SHAPE.layers * LAUNCHING
    seconds = {
        name: next(need.seconds for need in needs(loaded, run, GPUS[name]) if need.stage == "train") for name in GPUS
    }
    assert seconds["H100"] == pytest.approx(waiting)
    assert seconds["A40"] > 2 * waiting


def test_needs_follow_the_model() -> None:
    loaded, run = planned("a40")
    found = {need.stage: need for need in needs(loaded, run, A40)}
    weights = 8_030_261_248
    assert found["fetch_model"].disk == found["merge"].disk == 2 * weights
    assert found["evaluate"].gpu > 4 * weights
    assert found["train"].gpu > found["reference"].gpu
    assert found["evaluate"].gpu > 2 * weights + (17 + 2) * 8192 * 131_072  # llama.cpp's f16 with its caches
    held_out = HELD_OUT / len(run.lengths.prompt)
    forward = found["reference"].seconds / (1 + held_out)
    assert found["train"].seconds == pytest.approx((3 + 2 * held_out) * forward)


def test_time_is_the_work_at_the_assumed_rates() -> None:
    loaded, run = planned("a40")
    found = evaluation_seconds(loaded, run, A40)
    tokens = HELD_OUT * (run.lengths.prompt.mean() + (run.lengths.chosen + run.lengths.rejected).mean())
    models = 2 + len(loaded.evaluate.types)
    assert found["pairs"] == pytest.approx(models * tokens * 2 * SHAPE.linear_weights / (0.3 * A40.flops), rel=0.01)
    assert set(found) == {"pairs", *loaded.evaluate.suites}
    faster = evaluation_seconds(loaded, run, A40._replace(bandwidth=2 * A40.bandwidth))
    assert faster["nous"] == found["nous"]  # no answer is written
    assert faster["open_llm_v2"] < found["open_llm_v2"]


def test_the_command_prints_or_refuses() -> None:
    command = [sys.executable, "-m", "tools.plan", "--profile", "a40", "--gpu"]
    done = subprocess.run([*command, "RTX 4090"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "does not fit" in done.stdout
    assert done.stderr.startswith("plan: does not fit: evaluate needs")
    done = subprocess.run([*command, "A40", "--quiet"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_nothing_starts_where_the_plan_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        asked.append(command[2:])
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(repro.subprocess, "run", run)
    repro.check_plan("a40", tmp_path / "no-driver")
    assert asked == []
    with pytest.raises(UserError, match="nothing was started"):
        repro.check_plan("a40", tmp_path)
    assert asked == [["tools.plan", "--quiet", "--profile", "a40"]]


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(UserError, match="--profile b40: no such profile"):
        plan("b40", None)
