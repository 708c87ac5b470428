"""The doctor names each broken state that a run can meet, and says nothing against a good one."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hermes.artifacts import write_json
from hermes.model import bf16_on_cpu
from tools import doctor, plan
from tools.profiles import with_profile

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
PARAMS = "beta: 0.1  # comment\nseed: 7\nprofile: cpu\nprofiles:\n  cpu:\n    lr: 2e-4\n"


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True)


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit on `main`, an identity of its own, and no settings from this machine."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    git(tmp_path, "init", "-q", "-b", "main")
    git(tmp_path, "config", "user.name", "Someone")
    git(tmp_path, "config", "user.email", "someone@example.org")
    (tmp_path / "params.yaml").write_text(PARAMS)
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "start")
    return tmp_path


@pytest.fixture
def stranger() -> Iterator[int]:
    """The id of a live process that is not dvc."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate()


@pytest.fixture
def live_dvc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The id of a live process that runs a script called dvc."""
    script = tmp_path_factory.mktemp("bin") / "dvc"
    script.write_text("print('up', flush=True)\ninput()\n")
    process = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()  # only now does /proc show the script instead of this process's own copy
    yield process.pid
    process.communicate()


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def holder() -> Iterator[Callable[..., int]]:
    """Starts processes that hold the flock of a file, below a script called dvc or below this test; gives the holder's id."""
    started = []

    def hold(path: Path, *, below_dvc: bool) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = f"import fcntl, os; f = open({str(path)!r}, 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(os.getpid(), flush=True); input()"
        command = [sys.executable, "-c", lock]
        if below_dvc:
            script = path.parent / "dvc"
            script.write_text(f"import subprocess\nsubprocess.run({command!r})\n")
            command = [sys.executable, str(script)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout
        return int(process.stdout.readline())

    yield hold
    for process in started:
        process.communicate()


def write_rwlock(root: Path, pid: int) -> Path:
    path = root / ".dvc" / "tmp" / "rwlock"
    path.parent.mkdir(parents=True)
    holder = {"pid": pid, "cmd": "dvc repro"}
    path.write_text(json.dumps({"read": {"params.yaml": [holder]}, "write": {"models": holder}}))
    return path


def test_a_good_repository_passes_every_check_about_it(repo: Path) -> None:
    for check in (
        doctor.check_repository,
        doctor.check_identity,
        doctor.check_branch,
        doctor.check_params,
        doctor.check_profile,
        doctor.check_rwlock,
        doctor.check_lock,
        doctor.check_scratch,
    ):
        found = check(repo)
        assert found.ok, found
        assert not found.mend


def test_a_line_names_the_check_the_finding_and_the_mend() -> None:
    assert str(doctor.Check("disk", False, "1 GB free", "free some")) == "PROBLEM  disk: 1 GB free; free some"
    assert str(doctor.Check("disk", True, "90 GB free")) == "ok       disk: 90 GB free"


def test_a_lock_file_is_read_without_its_comments_and_hashes(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("# why\ntorch==2.13.0 \\\n    --hash=sha256:0a \\\n    --hash=sha256:0b\n\npeft==0.21.2  # note\n")
    assert doctor.pins(lock) == {"torch": "2.13.0", "peft": "0.21.2"}


def test_a_lock_file_includes_the_one_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "requirements.lock").write_text("torch==2.13.0\npeft==0.21.2\n")
    lock = tmp_path / "requirements-cuda.lock"
    lock.write_text("-r requirements.lock\ntorch===2.13.0\ntriton==3.7.0\n")
    assert doctor.pins(lock) == {"torch": "2.13.0", "peft": "0.21.2", "triton": "3.7.0"}


@pytest.mark.parametrize("version", [(3, 10), (3, 14)])
def test_a_python_outside_the_locks_is_a_problem(version: tuple[int, int], tmp_path: Path) -> None:
    found = doctor.check_python(version, tmp_path / ".venv", tmp_path)
    assert not found.ok
    assert "PYTHON=" in found.mend


def test_a_python_of_another_venv_is_a_problem(tmp_path: Path) -> None:
    assert doctor.check_python((3, 12), tmp_path / ".venv", tmp_path).ok
    assert not doctor.check_python((3, 12), tmp_path / "elsewhere", tmp_path).ok


def test_packages_that_drifted_or_are_missing_are_named() -> None:
    found = doctor.check_packages({"torch": "2.13.0", "trl": "1.16.0"}, {"torch": "2.12.0+cpu"})
    assert not found.ok
    assert "torch is 2.12.0+cpu, pinned 2.13.0" in found.finding
    assert "trl is missing" in found.finding


def test_a_build_tag_is_not_a_drift() -> None:
    assert doctor.check_packages({"torch": "2.13.0"}, {"torch": "2.13.0+cpu"}).ok


def test_a_missing_compiler_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    assert "build-essential" in doctor.check_compiler(path=str(tmp_path)).mend
    (tmp_path / "c++").touch(mode=0o755)
    assert doctor.check_compiler(path=str(tmp_path)).ok


@pytest.mark.parametrize(
    ("flags", "fast"),
    [
        ("flags : sse2 avx2 avx512f avx512bw", True),
        ("Features : asimd bf16 i8mm", True),
        ("flags : avx2 avx512fp16", False),
    ],
)
def test_a_cpu_without_bfloat16_is_told_and_no_problem(flags: str, fast: bool) -> None:
    check = doctor.check_cpu(flags)
    assert check.ok
    assert ("takes several times as long" in check.finding) is not fast


def test_the_cpu_here_is_told_as_torch_finds_it() -> None:
    finding = doctor.check_cpu(doctor.read_text(Path("/proc/cpuinfo"))).finding
    assert (finding == "multiplies bfloat16") is bf16_on_cpu.has_bfloat16()


def test_a_folder_without_git_is_a_problem(tmp_path: Path) -> None:
    assert not doctor.check_repository(tmp_path).ok


def test_a_repository_without_a_commit_is_a_problem(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    assert "no commit" in doctor.check_repository(tmp_path).finding


def test_a_missing_identity_names_the_commands_for_what_is_missing(repo: Path) -> None:
    git(repo, "config", "--unset", "user.email")
    found = doctor.check_identity(repo)
    assert not found.ok
    assert "user.email" in found.mend
    assert "user.name" not in found.mend


def test_a_head_left_detached_by_a_killed_run_names_the_branch_to_return_to(repo: Path) -> None:
    git(repo, "switch", "-q", "--detach")
    git(repo, "update-ref", "refs/exps/exec/EXEC_BASELINE", "HEAD")
    found = doctor.check_branch(repo)
    assert not found.ok
    assert "killed" in found.finding
    assert found.mend == "run: git switch main"


def test_a_head_detached_by_hand_is_not_blamed_on_dvc(repo: Path) -> None:
    git(repo, "switch", "-q", "--detach")
    found = doctor.check_branch(repo)
    assert not found.ok
    assert "killed" not in found.finding


def test_a_head_that_a_running_dvc_detached_is_fine(repo: Path, live_dvc: int) -> None:
    git(repo, "switch", "-q", "--detach")
    write_rwlock(repo, live_dvc)
    assert doctor.check_branch(repo).ok


def test_an_override_left_in_params_is_shown_with_both_values(repo: Path) -> None:
    (repo / "params.yaml").write_text(PARAMS.replace("0.1", "0.05").replace("2e-4", "1e-6"))
    found = doctor.check_params(repo)
    assert not found.ok
    assert "beta 0.1 -> 0.05" in found.finding
    assert "profiles.cpu.lr 0.0002 -> 1e-06" in found.finding
    assert "git restore" in found.mend


def test_a_staged_override_is_found_too(repo: Path) -> None:
    (repo / "params.yaml").write_text(PARAMS.replace("seed: 7", "seed: 8"))
    git(repo, "add", "-A")
    assert not doctor.check_params(repo).ok


def test_a_changed_comment_is_not_an_override(repo: Path) -> None:
    (repo / "params.yaml").write_text(PARAMS.replace("comment", "another"))
    assert doctor.check_params(repo).ok


def test_a_profile_that_stuck_is_told_apart_from_other_overrides(repo: Path) -> None:
    (repo / "params.yaml").write_text(PARAMS.replace("profile: cpu", "profile: a40"))
    found = doctor.check_profile(repo)
    assert not found.ok
    assert "a40" in found.finding
    assert "cpu" in found.mend
    assert doctor.check_params(repo).ok


def test_a_profile_left_by_a_killed_run_is_put_back_by_the_next(repo: Path) -> None:
    scratch = repo / ".scratch"
    scratch.mkdir()
    (scratch / "params.yaml.before").write_text("profile: cpu\n")
    lock = scratch / "repro.lock"
    lock.touch()
    assert doctor.check_profile(repo).mend == "put it back: make repro"
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert doctor.check_profile(repo).ok


def test_a_broken_params_file_is_a_problem_in_one_line(repo: Path) -> None:
    (repo / "params.yaml").write_text("beta: [0.1\nseed: 7\n")
    found = doctor.check_params(repo)
    assert not found.ok
    assert "\n" not in str(found)


def test_a_deleted_params_file_is_a_problem(repo: Path) -> None:
    (repo / "params.yaml").unlink()
    assert not doctor.check_params(repo).ok


def test_little_free_disk_is_a_problem(tmp_path: Path) -> None:
    assert not doctor.check_disk(tmp_path, doctor.MIN_FREE_GB - 1).ok
    assert doctor.check_disk(tmp_path, doctor.MIN_FREE_GB + 1).ok
    found = doctor.check_disk(tmp_path, 60.0, needed_gb=67.0)
    assert not found.ok
    assert "the profile needs 67" in found.finding


def test_a_profile_of_8_billion_weights_needs_the_disk_that_its_files_will_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    (tmp_path / "params.yaml").write_text(with_profile((ROOT / "params.yaml").read_text(), "a40"))
    monkeypatch.chdir(tmp_path)
    loaded = plan.load(None)
    total = plan.disk(loaded)
    assert total > 50 * 2**30
    base = tmp_path / "models/base"
    base.mkdir(parents=True)
    write_json(base / "manifest.json", {"source": loaded.model.source})
    write_json(base / "config.json", LLAMA_3)
    with (base / "model.safetensors").open("wb") as file:
        file.truncate(20 * 2**30)  # a hole, which takes no disk
    (tmp_path / ".dvc/cache/files/md5/01").mkdir(parents=True)
    (tmp_path / ".dvc/cache/files/md5/01/23").hardlink_to(base / "model.safetensors")  # counts once
    with (tmp_path / ".dvc/cache/files/md5/01/45").open("wb") as file:
        file.truncate(10 * 2**30)  # what DVC will link again
    assert doctor.disk_needed(tmp_path) == pytest.approx(total / 2**30 - 30, abs=0.1)
    assert doctor.disk_needed(tmp_path, "cpu") == doctor.MIN_FREE_GB


def test_where_the_need_is_not_known_a_minimum_is_asked_for(repo: Path) -> None:
    assert doctor.disk_needed(repo) == doctor.MIN_FREE_GB


def test_the_disk_is_that_of_the_profile_that_is_going_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "disk_needed", lambda root, profile: {None: 8.0, "a40": 1e9}[profile])
    found = {profile: {check.name: check for check in doctor.examine(ROOT, profile)} for profile in (None, "a40")}
    assert "the profile needs 1000000000" in found["a40"]["disk"].finding
    assert "the profile needs" not in found[None]["disk"].finding


def test_a_profile_that_there_is_not_is_a_problem(repo: Path) -> None:
    found = doctor.check_profile(repo, "a40")
    assert not found.ok
    assert found.mend == "choose one of cpu"
    assert doctor.check_profile(repo, "cpu").ok


def test_an_rwlock_of_a_dead_process_is_fine_because_dvc_clears_it(repo: Path) -> None:
    write_rwlock(repo, dead_pid())
    found = doctor.check_rwlock(repo)
    assert found.ok
    assert "dead" in found.finding


def test_an_rwlock_whose_process_id_was_reused_is_a_problem(repo: Path, stranger: int) -> None:
    path = write_rwlock(repo, stranger)
    found = doctor.check_rwlock(repo)
    assert not found.ok
    assert f"rm {path}" in found.mend


def test_an_rwlock_of_a_running_dvc_is_fine(repo: Path, live_dvc: int) -> None:
    write_rwlock(repo, live_dvc)
    assert doctor.check_rwlock(repo).ok


@pytest.mark.parametrize("text", ["{", "[]", '{"read": {"a": [1]}}'])
def test_a_damaged_rwlock_is_a_problem(repo: Path, text: str) -> None:
    write_rwlock(repo, 1).write_text(text)
    assert not doctor.check_rwlock(repo).ok


def test_a_lock_held_by_something_other_than_dvc_is_a_problem(repo: Path, stranger: int) -> None:
    path = repo / ".dvc" / "tmp" / "lock"
    path.parent.mkdir(parents=True)
    path.write_text(f" {stranger}\n")
    assert doctor.check_lock(repo).ok
    with path.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not doctor.check_lock(repo).ok


def test_a_lock_held_by_a_running_dvc_is_fine(repo: Path, live_dvc: int) -> None:
    path = repo / ".dvc" / "tmp" / "lock"
    path.parent.mkdir(parents=True)
    path.write_text(f" {live_dvc}\n")
    with path.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert doctor.check_lock(repo).ok


def test_a_stage_that_outlived_its_dvc_is_a_problem(repo: Path, holder: Callable[..., int]) -> None:
    lock = repo / ".scratch/train/0123456789abcdef.lock"
    process = holder(lock, below_dvc=False)
    found = doctor.check_scratch(repo)
    assert not found.ok
    assert str(lock) in found.finding
    assert f"kill {process}" in found.mend


def test_a_stage_below_a_running_dvc_is_fine(repo: Path, holder: Callable[..., int]) -> None:
    holder(repo / "models/adapter.lock", below_dvc=True)
    found = doctor.check_scratch(repo)
    assert found.ok
    assert "running stage" in found.finding


def test_a_lock_file_that_nobody_holds_is_no_problem(repo: Path) -> None:
    (repo / "models").mkdir()
    (repo / "models/adapter.lock").touch()
    assert doctor.check_scratch(repo) == doctor.Check("stage locks", True, "free")


A40 = doctor.Gpu("NVIDIA A40", "580.95.05")


def nvidia_smi(folder: Path, text: str) -> str:
    """A stand-in for a program that exists where there is a GPU."""
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_the_gpu_is_what_nvidia_smi_says(tmp_path: Path) -> None:
    smi = nvidia_smi(tmp_path, "echo 'NVIDIA A40, 580.95.05'; echo 'NVIDIA A40, 580.95.05'")
    assert doctor.present_gpu(smi, tmp_path) == A40
    assert doctor.present_gpu("no-such-program", tmp_path) is None


def test_a_gpu_whose_driver_does_not_answer_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    gpu = doctor.present_gpu(nvidia_smi(tmp_path, "echo 'failed to communicate with the driver'; exit 9"), tmp_path)
    assert gpu is not None
    found = doctor.check_driver(gpu, "13.0")
    assert not found.ok
    assert "nvidia-smi" in found.finding


@pytest.mark.parametrize(
    ("driver", "cuda", "ok"),
    [
        ("580.95.05", "13.0", True),
        ("580.65.06", "13.0", True),
        ("575.57.08", "13.0", False),
        ("550.127.05", "12.8", True),
        ("550.127.05", None, True),
    ],
)
def test_a_driver_too_old_for_torch_s_cuda_is_a_problem(driver: str, cuda: str | None, ok: bool) -> None:
    found = doctor.check_driver(doctor.Gpu("NVIDIA A40", driver), cuda)
    assert found.ok is ok
    assert ("580.65" in found.mend) is not ok


def test_without_a_gpu_no_driver_is_asked_for() -> None:
    assert doctor.check_driver(None, "13.0").ok


@pytest.mark.parametrize(
    ("gpu", "build", "problem"),
    [
        (A40, "13.0", "try nvidia-smi"),
        (doctor.Gpu("NVIDIA A40", "550.127.05"), "13.0", "too old for CUDA 13.0; install driver 580.65 or newer"),
        (doctor.Gpu("an NVIDIA GPU", ""), "13.0", "nvidia-smi does not work"),
        (None, "13.0", "this container"),
        (A40, None, "a CPU build"),
    ],
)
def test_why_torch_cannot_use_the_gpu(
    gpu: doctor.Gpu | None, build: str | None, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "present_gpu", lambda: gpu)
    monkeypatch.setattr(doctor, "torch_version_source", lambda: f"cuda: Optional[str] = {build!r}\n")
    assert problem in doctor.gpu_problem()


@pytest.mark.parametrize(
    ("stamp", "gpu", "wanted", "ok"),
    [
        ("cpu 1 2", None, "", True),
        ("cuda 1 2", A40, "", True),
        ("cpu 1 2", A40, "", False),
        ("cuda 1 2", None, "", False),
        ("cpu 1 2", A40, "cpu", True),
        ("cuda 1 2", None, "cuda", False),
        ("cuda-without-nvcc 1 2", A40, "", False),
        ("cuda 1 2", doctor.Gpu("an NVIDIA GPU", ""), "", False),
        (None, None, "", False),
    ],
)
def test_an_environment_for_another_device_is_a_problem(
    stamp: str | None, gpu: doctor.Gpu | None, wanted: str, ok: bool
) -> None:
    found = doctor.check_device(stamp, gpu, wanted)
    assert found.ok is ok
    assert bool(found.mend) is not ok


@pytest.mark.parametrize(
    ("cuda", "has_gpu", "ok"), [(False, False, True), (True, True, True), (False, True, False), (True, False, False)]
)
def test_a_llama_cpp_for_another_device_is_a_problem(cuda: bool, has_gpu: bool, ok: bool, tmp_path: Path) -> None:
    (tmp_path / "libggml-cpu.so").touch()
    if cuda:
        (tmp_path / "libggml-cuda.so").touch()
    assert doctor.check_llama(tmp_path, has_gpu).ok is ok


def test_the_installed_llama_cpp_is_recognised_as_the_build_that_it_is() -> None:
    from llama_cpp import llama_print_system_info  # unlike llama_supports_gpu_offload, the same where the GPU is hidden

    assert doctor.check_llama(doctor.llama_libraries(), has_gpu=True).ok is (b"CUDA" in llama_print_system_info())


def test_a_missing_llama_cpp_is_a_problem(tmp_path: Path) -> None:
    assert not doctor.check_llama(None, has_gpu=False).ok
    assert not doctor.check_llama(tmp_path / "lib", has_gpu=False).ok


CPU_BUILD = "__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n"
CUDA_BUILD = "__version__ = '2.13.0'\ncuda: Optional[str] = '13.0'\n"


@pytest.mark.parametrize(
    ("source", "has_gpu", "ok"),
    [(CPU_BUILD, False, True), (CPU_BUILD, True, False), (CUDA_BUILD, True, True), (CUDA_BUILD, False, True)],
)
def test_a_cpu_build_beside_a_gpu_is_a_problem(source: str, has_gpu: bool, ok: bool) -> None:
    assert doctor.check_torch(source, has_gpu).ok is ok


def test_a_missing_torch_is_a_problem() -> None:
    assert not doctor.check_torch(None, has_gpu=False).ok


def test_the_installed_torch_is_recognised_as_the_build_that_it_is() -> None:
    import torch

    source = doctor.torch_version_source()
    assert doctor.check_torch(source, has_gpu=True).ok is (torch.version.cuda is not None)


def test_the_exit_status_says_whether_anything_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, found = [], [doctor.Check("disk", True, "90 GB free")]

    def examine(root: Path, profile: str | None) -> list[doctor.Check]:
        asked.append(profile)
        return found

    monkeypatch.setattr(doctor, "examine", examine)
    monkeypatch.setattr(sys, "argv", ["doctor"])
    assert doctor.main() == 0
    found[:] = [doctor.Check("disk", False, "1 GB free", "free some")]
    monkeypatch.setattr(sys, "argv", ["doctor", "--profile", "a40"])
    assert doctor.main() == 1
    assert asked == [None, "a40"]
    assert "PROBLEM  disk: 1 GB free; free some" in capsys.readouterr().out
