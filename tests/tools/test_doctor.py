"""The doctor names each broken state that a run can meet, and says nothing against a good checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from hermes import bits
from hermes.artifacts import write_json
from tools import disk, doctor, plan, profiles

ROOT = Path(__file__).parents[2]
LLAMA_3 = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
}
LOCKS = ("requirements.lock", "requirements-nodeps.lock", "requirements-cuda.lock")
CPU_BUILD, CUDA_BUILD = "cuda: Optional[str] = None\n", "cuda: Optional[str] = '13.0'\n"


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, cuda: bool) -> None:
    """Stands in for the builds of torch and llama.cpp, which a test cannot install."""
    for path in (folder / "torch/version.py", folder / "llama_cpp/lib/libggml-cpu.so"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(CUDA_BUILD if cuda else CPU_BUILD)
    (folder / "llama_cpp/lib/libggml-cuda.so").unlink(missing_ok=True)
    if cuda:
        (folder / "llama_cpp/lib/libggml-cuda.so").touch()
    monkeypatch.setattr(doctor, "folder_of", lambda package: folder / package)


def nvidia_smi(root: Path, text: str) -> None:
    """Stands in for the program that is there where there is a GPU; first on the PATH of `clone`."""
    path = root.parent / "bin/nvidia-smi"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone of what runs need, on `main`, with an identity and a .venv made for the CPU, and none of this machine's settings."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    for name in ("DEVICE", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    nvidia_smi(tmp_path / "clone", "exit 9")
    monkeypatch.setattr(doctor, "DEVICES", tmp_path / "dev")
    root = tmp_path / "clone"
    (root / ".venv").mkdir(parents=True)
    (root / ".venv/setup-stamp").write_text("cpu 1 2\n")
    monkeypatch.setattr(sys, "prefix", str(root / ".venv"))
    install(tmp_path / "packages", monkeypatch, cuda=False)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, root)
    for name in LOCKS:  # of one package that is here, as it is here
        (root / name).write_text(f"peft=={metadata.version('peft')}\n")
    (root / ".gitignore").write_text(".venv\n.scratch\nmodels\n")
    git(root, "init", "-q", "-b", "main")
    git(root, "config", "user.name", "Someone")
    git(root, "config", "user.email", "someone@example.org")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "start")
    monkeypatch.setattr(doctor, "ROOT", root)
    return root


def problems(root: Path, profile: str | None = None) -> dict[str, str]:
    """What the doctor finds wrong: the line of each check that found a problem."""
    return {check.name: str(check) for check in doctor.examine(root, profile) if not check.ok}


def edit(root: Path, old: str, new: str) -> None:
    path = root / "params.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_good_clone_is_fine_and_says_what_it_is(clone: Path) -> None:
    found = {check.name: check for check in doctor.examine(clone)}
    assert not problems(clone)
    assert set(found) == {
        *("python", "packages", "compiler", "cpu", "bits", "device", "driver", "torch", "llama.cpp"),
        *("repository", "git identity", "branch", "params", "disk"),
    }
    assert found["branch"].finding == "main"
    assert found["params"].finding == "as committed, profile: cpu"
    assert ("avx512" in found["cpu"].finding) is bits.can("avx512")
    assert ("portable" in found["cpu"].finding) is bits.can("portable")


def test_the_exit_status_and_the_last_line_say_whether_anything_is_wrong(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["doctor"])
    assert doctor.main() == 0
    assert capsys.readouterr().out.endswith("\nall 14 checks are fine\n")
    monkeypatch.setattr(sys, "argv", ["doctor", "--profile", "b40"])
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert "PROBLEM  params: no profile b40 in params.yaml; choose one of a40, " in out
    assert out.endswith("\n1 of 14 checks found a problem\n")


def test_packages_that_drifted_or_are_missing_are_named(clone: Path) -> None:
    (clone / "requirements-nodeps.lock").write_text("peft==9.0\nno-such-package==1.0\n")
    line = problems(clone)["packages"]
    assert "peft is 0." in line
    assert ", pinned 9.0" in line
    assert "no-such-package is missing, pinned 1.0" in line


def test_a_lock_file_is_read_with_hashes_comments_and_the_one_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "requirements.lock").write_text(
        "# why\ntorch==2.13.0\n\npeft==0.21.2 \\\n    --hash=sha256:ab==  # note\n"
    )
    lock = tmp_path / "requirements-cuda.lock"
    lock.write_text("-r requirements.lock\ntorch===2.13.0\ntriton==3.7.0; python_version > '3'\n")
    assert doctor.pins(lock) == {"torch": "2.13.0", "peft": "0.21.2", "triton": "3.7.0"}


def test_a_python_of_another_venv_and_a_half_made_venv_are_problems(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (clone / ".venv/setup-stamp").unlink()
    monkeypatch.setattr(sys, "prefix", str(clone / "elsewhere"))
    found = problems(clone)
    assert set(found) == {"python", "device"}
    assert found["device"].endswith(".venv is not complete; run: make setup")


def test_a_missing_compiler_is_a_problem(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert problems(clone)["compiler"].endswith("run: apt-get install build-essential")


def test_a_folder_without_git_or_without_a_commit_is_a_problem(clone: Path) -> None:
    shutil.rmtree(clone / ".git")
    assert "clone it instead of copying" in problems(clone)["repository"]
    git(clone, "init", "-q")
    assert "no commit yet" in problems(clone)["repository"]


def test_a_folder_beyond_ascii_is_named_since_dvc_fails_there(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = clone.rename(clone.with_name("jeté"))
    monkeypatch.setattr(sys, "prefix", str(moved / ".venv"))
    found = problems(moved)
    assert set(found) == {"repository"}
    assert "move the checkout" in found["repository"]


def test_a_missing_identity_names_the_commands_for_what_is_missing(clone: Path) -> None:
    git(clone, "config", "--unset", "user.email")
    line = problems(clone)["git identity"]
    assert "user.email" in line
    assert "user.name" not in line


def test_a_head_detached_by_a_killed_experiment_names_the_branch_to_return_to(clone: Path) -> None:
    git(clone, "switch", "-q", "--detach")
    assert problems(clone)["branch"] == "PROBLEM  branch: HEAD is detached; run: git switch main"
    git(clone, "update-ref", "refs/exps/exec/EXEC_BASELINE", "HEAD")
    assert "`dvc exp run` that works or was killed" in problems(clone)["branch"]


def test_an_override_left_in_params_is_shown_with_both_values(clone: Path) -> None:
    edit(clone, "beta: 0.1", "beta: 0.05  # as tried")
    edit(clone, "learning_rate: 5.0e-4", "learning_rate: 1e-6")
    git(clone, "add", "-A")  # staged or not
    line = problems(clone)["params"]
    assert "beta 0.1 -> 0.05; profiles.cpu.train.learning_rate 0.0005 -> 1e-06; commit it if it is meant" in line
    git(clone, "restore", "--staged", "--worktree", "params.yaml")
    edit(clone, "# The experiment's", "# An experiment's")
    assert not problems(clone)  # a comment is none


def test_a_profile_left_by_a_killed_run_is_put_back_by_the_next(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clone)
    run = profiles.selected("a40")
    run.__enter__()  # and killed
    line = problems(clone)["params"]
    assert "profile cpu -> a40; a `make repro` that works or was killed" in line
    assert line.endswith("run: make repro")
    profiles.put_back()
    assert not problems(clone)


@pytest.mark.parametrize("text", ["beta: [0.1\nseed: 7\n", "- 1\n", None])
def test_a_broken_params_file_is_a_problem_in_one_line(clone: Path, text: str | None) -> None:
    (clone / "params.yaml").unlink()
    if text is not None:
        (clone / "params.yaml").write_text(text)
    line = problems(clone)["params"]
    assert line.endswith("or run: git restore --staged --worktree params.yaml")
    assert "\n" not in line


def test_a_profile_of_8_billion_weights_needs_the_disk_that_its_files_will_take(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = plan.load("a40")
    total = plan.disk(loaded) / 2**30
    base = clone / "models/base"
    base.mkdir(parents=True)
    write_json(base / "manifest.json", {"source": loaded.model.source})
    write_json(base / "config.json", LLAMA_3)
    with (base / "model.safetensors").open("wb") as file:
        file.truncate(20 * 2**30)  # a hole, which takes no disk
    (clone / ".dvc/cache/files/md5/01").mkdir(parents=True)
    (clone / ".dvc/cache/files/md5/01/23").hardlink_to(base / "model.safetensors")  # counts once
    with (clone / ".dvc/cache/files/md5/01/45").open("wb") as file:
        file.truncate(10 * 2**30)  # what DVC will link again
    asked: list[float] = []

    def room(root: Path, needed: float) -> tuple[str, str]:
        asked.append(needed / 2**30)
        return "", ""

    monkeypatch.setattr(disk, "room", room)
    for profile in ("a40", None, "b40"):
        doctor.check_disk(clone, profile)
    assert asked == [pytest.approx(total - 30, abs=0.1), doctor.MIN_FREE_GB, doctor.MIN_FREE_GB]


def test_a_disk_without_room_for_the_profile_is_a_problem(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(99 << 30, 0, 60 << 30))
    assert "disk" not in problems(clone)
    assert "60 GB free in " in problems(clone, "a40")["disk"]
    assert ", 78 are needed; free some" in problems(clone, "a40")["disk"]
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(99 << 30, 0, 7 << 30))
    assert ", 8 are needed; free some" in problems(clone)["disk"]


@pytest.mark.parametrize(
    ("driver", "cuda", "stamp", "wanted", "expected"),
    [
        ("580.65.06", True, "cuda", "", set()),
        ("580.95.05", False, "cpu", "cpu", set()),
        ("575.57.08", True, "cuda", "", {"driver"}),
        ("580.95.05", False, "cpu", "", {"device", "torch", "llama.cpp"}),
        ("580.95.05", True, "cuda-without-nvcc", "", {"device"}),
        (None, True, "cuda", "", {"device", "llama.cpp"}),
        (None, True, "cuda", "cuda", {"device"}),
    ],
)
def test_an_environment_for_another_device_is_a_problem(
    driver: str | None,
    cuda: bool,
    stamp: str,
    wanted: str,
    expected: set[str],
    clone: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if driver:
        nvidia_smi(clone, f"echo 'NVIDIA A40, {driver}'; echo 'NVIDIA A40, {driver}'")
    install(clone.parent / "packages", monkeypatch, cuda)
    (clone / ".venv/setup-stamp").write_text(f"{stamp} 1 2\n")
    monkeypatch.setenv("DEVICE", wanted)
    found = problems(clone)
    assert set(found) == expected
    assert driver != "575.57.08" or "too old for CUDA 13.0; install driver 580.65 or newer" in found["driver"]


def test_a_gpu_whose_driver_does_not_answer_is_a_problem(clone: Path) -> None:
    assert doctor.present_gpu() is None
    (clone.parent / "dev").mkdir()
    (clone.parent / "dev/nvidia0").touch()
    line = problems(clone)["driver"]
    assert line.endswith("an NVIDIA GPU, but nvidia-smi does not work; install NVIDIA's driver, or reboot")


@pytest.mark.parametrize(
    ("driver", "cuda", "problem"),
    [
        ("580.95.05", True, "try nvidia-smi"),
        ("550.127.05", True, "too old for CUDA 13.0; install driver 580.65 or newer"),
        ("580.95.05", False, "no CUDA build; run: DEVICE=cuda make setup"),
    ],
)
def test_why_torch_cannot_use_the_gpu(
    driver: str, cuda: bool, problem: str, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(clone, f"echo 'NVIDIA A40, {driver}'")
    install(clone.parent / "packages", monkeypatch, cuda)
    assert problem in doctor.gpu_problem()


def test_the_builds_here_are_recognised_as_what_they_are() -> None:
    import torch
    from llama_cpp import llama_print_system_info  # unlike llama_supports_gpu_offload, the same where the GPU is hidden

    found = {check.name: check.finding for check in doctor.of_device(ROOT, None, "cuda")}
    assert (found["torch"] == "no CUDA build") is (torch.version.cuda is None)
    assert (found["llama.cpp"] == "a CUDA build") is (b"CUDA" in llama_print_system_info())


def test_a_broken_environment_is_examined_all_the_same(clone: Path) -> None:
    program = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; from tools import doctor; sys.argv[1:] = []; sys.exit(doctor.main())"
    command = [sys._base_executable, "-S", "-c", program]  # type: ignore[attr-defined]  # a Python without packages
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert "PROBLEM  packages: " in done.stdout
    assert "is not installed; run: make setup" in done.stdout
