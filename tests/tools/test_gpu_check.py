"""Every check of `make gpu-check` that a CPU can run does, on tiny models, and each fails when what it checks is broken."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes
import pytest
import torch

from hermes.console import UserError
from hermes.training import shared_prefix
from tools import gpu_check
from tools.gpu_check import CHECKS, Check, Line

CPU = torch.device("cpu")
SKIPPED = {"paging", "two_processes"}


def lines(check: Check, folder: Path) -> list[Line]:
    return list(gpu_check.run(check, CPU, folder / check.__name__))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_check_passes_on_a_cpu_or_says_what_it_needs(check: Check, tmp_path: Path) -> None:
    found = lines(check, tmp_path)
    expected = "skip" if check.__name__ in SKIPPED else "pass"
    assert found
    assert [line.verdict for line in found] == [expected] * len(found), "\n".join(map(str, found))
    assert all("needs" in line.finding for line in found if line.verdict == "skip")
    assert not (tmp_path / check.__name__).exists()


def test_weights_that_are_not_those_of_the_formula_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu_check.dequantize_4bit
    monkeypatch.setattr(gpu_check, "dequantize_4bit", lambda *a: real(*a) * 1.01)
    assert {line.verdict for line in lines(gpu_check.nf4, tmp_path)} == {"fail"}


def test_a_forward_that_lets_the_rejected_answer_see_the_chosen_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leak(common: int, start: int, prompt: int, chosen: int, rejected: int, device: torch.device) -> list:
        before = (slice(0, common),)
        return shared_prefix.causal_blocks(before, slice(start, start + prompt + chosen + rejected), device)

    monkeypatch.setattr(shared_prefix, "pair_blocks", leak)
    assert [line.verdict for line in lines(gpu_check.forward, tmp_path)] == ["fail"]


def test_attention_that_holds_its_scores_fails(tmp_path: Path) -> None:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (line,) = lines(gpu_check.attention, tmp_path)
    assert line.verdict == "fail"
    assert "attention_math" in line.finding


def test_stages_leave_cudnn_out_of_the_choice_of_attention() -> None:
    program = "import torch; from hermes.model.base import set_determinism as fix; fix(2); print(torch.backends.cuda.cudnn_sdp_enabled())"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
    )


def test_an_optimizer_that_steps_otherwise_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = bitsandbytes.optim.PagedAdamW32bit
    monkeypatch.setattr(bitsandbytes.optim, "PagedAdamW32bit", lambda p, lr, weight_decay: real(p, lr=lr * 1.01))
    assert [line.verdict for line in lines(gpu_check.optimizer, tmp_path)] == ["fail"]


def test_a_prediction_of_half_the_activations_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu_check.training_memory
    monkeypatch.setattr(
        gpu_check,
        "training_memory",
        lambda *a: gpu_check.replace(real(*a), activations=real(*a).activations // 2),
    )
    assert [line.verdict for line in lines(gpu_check.memory, tmp_path)] == ["fail"]


def test_an_error_is_a_line_that_fails(tmp_path: Path) -> None:
    def broken(device: torch.device, folder: Path):  # type: ignore[no-untyped-def]
        yield Line("first", "pass", "fine")
        raise RuntimeError("no kernel\nimage")

    found = list(gpu_check.run(broken, CPU, tmp_path / "broken"))
    assert [str(line) for line in found] == ["pass  first: fine", "fail  broken: RuntimeError: no kernel image"]


def test_the_attention_check_has_a_common_beginning_and_a_lone_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def pack_pairs(**batch: torch.Tensor) -> None:
        seen.append(batch)
        raise RuntimeError("seen enough")

    monkeypatch.setattr(gpu_check, "pack_pairs", pack_pairs)
    lines(gpu_check.attention, tmp_path)
    ids, labels = seen[0]["input_ids"], seen[0]["labels"]
    assert (ids[:, :24] == ids[0, :24]).all()
    assert 1 in (labels != shared_prefix.IGNORED).sum(dim=1)


# Stands in for training: more errors than a pipe holds, and then a checkpoint, or none.
CHECKPOINT = "folder = Path('.scratch/train/x/checkpoint-8'); folder.mkdir(parents=True); (folder / 'trainer_state.json').touch()"
TRAIN = "import sys, time; from pathlib import Path; sys.stderr.write('x' * 10**6); {}; time.sleep(60)"


def test_training_is_killed_at_its_checkpoint_whatever_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "TRAIN", TRAIN.format(CHECKPOINT))
    began = time.monotonic()
    assert gpu_check.kill_at_a_checkpoint(tmp_path) == 8
    assert time.monotonic() - began < 50


def test_training_that_never_has_a_checkpoint_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = gpu_check.start(tmp_path, TRAIN.format("pass"))
    monkeypatch.setattr(gpu_check, "start", lambda project, program: process)
    with pytest.raises(UserError, match="no checkpoint after 1 s"):
        gpu_check.kill_at_a_checkpoint(tmp_path, seconds=1)
    assert process.returncode == -signal.SIGKILL


def test_training_that_fails_says_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "TRAIN", "print('no memory'); raise SystemExit('train: no memory')")
    with pytest.raises(UserError, match="train: no memory"):
        gpu_check.kill_at_a_checkpoint(tmp_path)


def test_without_a_gpu_it_says_so_in_one_line_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main()
    assert "no CUDA device here" in str(stopped.value)
    assert "--device cpu" in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_the_record_has_the_machine_and_every_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(gpu_check, "set_determinism", lambda threads: None)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu"])

    def interrupted(device: torch.device, folder: Path) -> Iterator[Line]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(gpu_check, "CHECKS", (gpu_check.paging, interrupted))
    with pytest.raises(SystemExit, match=r"gpu-check: interrupted; .*cpu\.json has the checks that were done"):
        gpu_check.main()
    record = json.loads((tmp_path / ".scratch/gpu-check/cpu.json").read_text())
    assert (len(record["lines"]), record["left"]) == (1, ["interrupted"])

    monkeypatch.setattr(gpu_check, "CHECKS", (gpu_check.nf4, gpu_check.paging))
    assert gpu_check.main() == 0
    assert "2 pass, 0 fail, 1 skip" in capsys.readouterr().out
    record = json.loads((tmp_path / ".scratch/gpu-check/cpu.json").read_text())
    assert [line["verdict"] for line in record["lines"]] == ["pass", "pass", "skip"]
    assert record["left"] == []
    assert record["machine"]["bitsandbytes"] == bitsandbytes.__version__
    assert not (tmp_path / "reports").exists()
