"""Is this checkout in a state to run in? One line a check, with what to do about each that fails.

    python -m tools.doctor                     (or: make doctor)
    python -m tools.doctor --profile a40       (or: make doctor PROFILE=a40) with the disk that a40 needs

Each check is a function of a folder, a text or a version that returns a `Check`; `examine` gathers them for this
checkout. Only the standard library is imported at the top, so that a broken .venv can still be examined. It reads, and
mends nothing. What the driver has to be for a CUDA is from NVIDIA's "CUDA compatibility", minor version compatibility.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ((3, 11), (3, 12), (3, 13))
MIN_FREE_GB = 8
DRIVERS = {
    "12": (525, 60),
    "13": (580, 65),
}  # the first driver that runs programs built with a CUDA of this major version


@dataclass(frozen=True)
class Check:
    """One finding: `mend` says what to do and is empty where `ok`."""

    name: str
    ok: bool
    finding: str
    mend: str = ""

    def __str__(self) -> str:
        if self.ok:
            return f"ok       {self.name}: {self.finding}"
        return f"PROBLEM  {self.name}: {self.finding}; {self.mend}"


def pins(lock: Path) -> dict[str, str]:
    """The `package==version` lines of a lock file and of those it names with -r, as {package: version}, without their hashes."""
    found: dict[str, str] = {}
    for line in lock.read_text(encoding="utf-8").splitlines():
        name, _, version = line.partition("#")[0].rstrip("\\ ").partition("==")
        if name.startswith("-r "):
            found |= pins(lock.parent / name[3:])
        elif version:
            found[name] = version.lstrip("=")
    return found


def check_python(version: tuple[int, int], prefix: Path, root: Path) -> Check:
    """The running Python is one that the locks are for, and the one of this checkout's .venv."""
    found = f"{version[0]}.{version[1]} in {prefix}"
    if version not in PYTHONS:
        return Check("python", False, found, "delete .venv, then PYTHON=/path/to/python3.11 ./setup.sh")
    if prefix.resolve() != (root / ".venv").resolve():
        return Check("python", False, f"{found}, not this checkout's .venv", "run: make doctor")
    return Check("python", True, found)


def check_packages(pinned: Mapping[str, str], installed: Mapping[str, str]) -> Check:
    """Every pin is installed at its version; a build tag such as `+cpu` does not count."""
    wrong = [
        f"{name} is {installed.get(name, 'missing')}, pinned {version}"
        for name, version in pinned.items()
        if installed.get(name, "").partition("+")[0] != version
    ]
    if not wrong:
        return Check("packages", True, f"all {len(pinned)} as locked")
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return Check("packages", False, "; ".join(wrong[:3]) + more, "delete .venv, then run: make setup")


def installed_versions(names: Mapping[str, str]) -> dict[str, str]:
    """The versions of those `names` that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def check_compiler(path: str | None = None) -> Check:
    """A C++ compiler is on `path` ($PATH unless given): llama-cpp-python is built with it."""
    compiler = shutil.which(os.environ.get("CXX", "c++").split()[0], path=path)
    if compiler is None:
        return Check("compiler", False, "no C++ compiler", "run: apt-get install build-essential")
    return Check("compiler", True, compiler)


def check_cpu(cpuinfo: str | None) -> Check:
    """Whether the CPU multiplies bfloat16 fast, by the text of /proc/cpuinfo; where it does not, runs take longer, and that is all."""
    if re.search(r"\b(avx512bw|bf16)\b", cpuinfo or ""):
        return Check("cpu", True, "multiplies bfloat16")
    return Check("cpu", True, "no bfloat16, which goes through float32 and takes several times as long")


def git(root: Path, *arguments: str) -> str | None:
    """What git prints, or None where it fails."""
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def check_repository(root: Path) -> Check:
    """The folder is the top of a git repository with a commit: DVC's experiments and provenance need one."""
    if shutil.which("git") is None:
        return Check("repository", False, "git is not installed", "run: apt-get install git")
    top = git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top.strip()).resolve() != root.resolve():
        return Check("repository", False, f"{root} is not a git repository", "clone it instead of copying its files")
    if git(root, "rev-parse", "--verify", "-q", "HEAD") is None:
        return Check("repository", False, "no commit yet", "run: git add -A && git commit")
    return Check("repository", True, f"{root}")


def check_identity(root: Path) -> Check:
    """`dvc exp run --temp` and `--queue` commit, so git has to know an author."""
    missing = [
        f"git config --global user.{key} {example}"
        for key, example in (("name", "'Your Name'"), ("email", "you@example.org"))
        if not (git(root, "config", f"user.{key}") or os.environ.get(f"GIT_COMMITTER_{key.upper()}"))
    ]
    if missing:
        finding = "git does not know who commits, and sweeps commit"
        return Check("git identity", False, finding, "run: " + " && ".join(missing))
    return Check("git identity", True, "set")


def check_branch(root: Path) -> Check:
    """HEAD is on a branch. `dvc exp run` detaches it while it works, and leaves it so when it is killed."""
    branch = git(root, "symbolic-ref", "-q", "--short", "HEAD")
    if branch is not None:
        return Check("branch", True, branch.strip())
    if running_dvc(root):
        return Check("branch", True, "detached by the dvc that is running here")
    killed = git(root, "rev-parse", "-q", "--verify", "refs/exps/exec/EXEC_BASELINE") is not None
    finding = "HEAD is detached" + (", left by a killed `dvc exp run`" if killed else "")
    here = (git(root, "for-each-ref", "--points-at", "HEAD", "--format=%(refname:short)", "refs/heads") or "").split()
    return Check("branch", False, finding, f"run: git switch {here[0] if here else '-'}")


def check_params(root: Path) -> Check:
    """params.yaml says what the commit says: `dvc exp run -S` leaves its values in it."""
    found = parameters(root)
    if isinstance(found, Check):
        return found
    committed, current = (flatten(side) for side in found)
    committed.pop("profile", None)
    current.pop("profile", None)
    changed = [
        f"{key} {committed.get(key, 'absent')} -> {current.get(key, 'absent')}"
        for key in {**committed, **current}
        if committed.get(key, ...) != current.get(key, ...)
    ]
    if not changed:
        return Check("params", True, "as committed")
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return Check(
        "params",
        False,
        f"params.yaml differs from the commit ({', '.join(changed[:3])}{more})",
        "commit it if it is meant, or drop it: git restore --staged --worktree params.yaml",
    )


def check_profile(root: Path, asked: str | None = None) -> Check:
    """The profile is the committed one, since one chosen for a single run stays in params.yaml and decides the next; and `asked` is one."""
    found = parameters(root)
    if isinstance(found, Check):
        return Check("profile", found.ok, found.finding, found.mend)
    names = sorted(found[1].get("profiles") or {})
    if asked is not None and asked not in names:
        return Check("profile", False, f"no profile {asked} in params.yaml", f"choose one of {', '.join(names)}")
    committed, current = (side.get("profile") for side in found)
    scratch = root / ".scratch"
    if (scratch / "params.yaml.before").exists() and not is_locked(scratch / "repro.lock"):
        return Check(
            "profile", False, f"a killed run left params.yaml at profile: {current}", "put it back: make repro"
        )
    if committed == current:
        return Check("profile", True, str(current))
    return Check(
        "profile",
        False,
        f"params.yaml says profile: {current}, the commit {committed}; every run from here uses {current}",
        f"commit it if it is meant, or set profile: {committed} again in params.yaml",
    )


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock of this file."""
    try:
        with path.open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def parameters(root: Path) -> tuple[dict[str, Any], dict[str, Any]] | Check:
    """params.yaml as committed and as it is now, or the check that says why there is no such pair."""
    try:
        from ruamel.yaml import YAML
        from ruamel.yaml.error import YAMLError
    except ImportError:  # a half-made .venv is what this module has to survive
        return Check("params", False, "ruamel.yaml is not installed", "run: make setup")
    path = root / "params.yaml"
    committed = git(root, "show", "HEAD:./params.yaml")
    if committed is None:
        return Check("params", True, "none committed yet")
    if not path.exists():
        return Check("params", False, "params.yaml is gone", "run: git restore --staged --worktree params.yaml")
    try:
        sides = [YAML(typ="safe").load(text) for text in (committed, path.read_text(encoding="utf-8"))]
    except YAMLError as error:
        finding = "params.yaml is not YAML: " + " ".join(str(error).split())
        return Check("params", False, finding, "mend that line, or run: git restore params.yaml")
    if not all(isinstance(side, dict) for side in sides):
        return Check("params", False, "params.yaml is not a mapping of names to values", "run: git restore params.yaml")
    return sides[0], sides[1]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}, the way `dvc exp run -S` spells keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def check_disk(root: Path, free_gb: float, needed_gb: float = MIN_FREE_GB) -> Check:
    """Room for what is still to be made: the models, their GGUF files and DVC's cache."""
    finding = f"{free_gb:.0f} GB free in {root}"
    if free_gb < needed_gb:
        mend = "free some, or drop what no commit or experiment names: .venv/bin/dvc gc -A --all-experiments"
        return Check("disk", False, f"{finding}, the profile needs {needed_gb:.0f}", mend)
    return Check("disk", True, finding)


def held(root: Path) -> int:
    """Bytes of the files in models/, data/ and DVC's cache, each once, whatever number of names DVC's links give it."""
    paths = (path for folder in ("models", "data", ".dvc/cache") for path in (root / folder).rglob("*"))
    found = (path.stat() for path in paths if path.is_file())
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in found}.values())


def disk_to_fill(root: Path, profile: str | None = None) -> float | None:
    """GB that a run of a profile, the selected one unless named, writes beyond what is `held`; None where it is not known.

    What is held may be another run's, so this is the least that it can be.
    """
    # elsewhere: it imports torch, which a broken .venv cannot
    program = "import sys; from tools import plan; print(plan.disk(plan.load(sys.argv[1] or None)))"
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, profile or ""]
    done = subprocess.run(command, cwd=root, env=offline, capture_output=True, text=True, check=False)
    return (int(done.stdout) - held(root)) / 2**30 if done.returncode == 0 else None


def disk_needed(root: Path, profile: str | None = None) -> float:
    """GB that a run of a profile is still going to write; `MIN_FREE_GB` at least, and where it is not known."""
    needed = disk_to_fill(root, profile)
    return MIN_FREE_GB if needed is None else max(MIN_FREE_GB, needed)


def check_rwlock(root: Path) -> Check:
    """No entry of DVC's read-write lock names a stranger: DVC drops dead processes, but believes a reused id."""
    path = root / ".dvc" / "tmp" / "rwlock"
    try:
        entries = rwlock_pids(json.loads(path.read_text(encoding="utf-8") or "{}"))
    except FileNotFoundError:
        return Check("dvc rwlock", True, "none")
    except (ValueError, AttributeError, KeyError, TypeError):
        return Check("dvc rwlock", False, f"{path} is damaged", f"with no dvc running: rm {path}")
    strangers = [pid for pid in sorted(entries) if is_alive(pid) and not is_dvc(pid)]
    if strangers:
        found = f"held in the name of process {strangers[0]}, which is not dvc (a reused process id)"
        return Check("dvc rwlock", False, found, f"with no dvc running: rm {path}")
    live = [pid for pid in sorted(entries) if is_alive(pid)]
    if live:
        return Check("dvc rwlock", True, f"held by the dvc that is running, process {live[0]}")
    return Check("dvc rwlock", True, "left by a dead dvc, the next one clears it" if entries else "free")


def check_lock(root: Path) -> Check:
    """DVC's repository lock is free, or held by a dvc that lives."""
    path = root / ".dvc" / "tmp" / "lock"
    if is_locked(path):
        holder = re.search(r"\d+", path.read_text(encoding="utf-8"))
        if holder and is_alive(int(holder[0])) and is_dvc(int(holder[0])):
            return Check("dvc lock", True, f"held by the dvc that is running, process {holder[0]}")
        return Check("dvc lock", False, f"{path} is held, but not by dvc", f"find who holds it: fuser -v {path}")
    return Check("dvc lock", True, "free")


def check_scratch(root: Path) -> Check:
    """No stage goes on after its dvc was killed: it holds the locks of its outputs. A lock file that nobody holds is harmless."""
    paths = [*root.glob(".scratch/*/*.lock"), *root.glob("models/*.lock")]
    holders = {path: process for path in sorted(paths) if is_locked(path) and (process := lock_holder(path))}
    for path, process in holders.items():
        if not has_dvc_above(process):
            finding = f"{path} is held by process {process}, which no dvc waits for"
            return Check("stage locks", False, finding, f"wait until it ends, or run: kill {process}")
    return Check("stage locks", True, f"held by {len(set(holders.values()))} running stage" if holders else "free")


def lock_holder(path: Path) -> int | None:
    """The process that holds the flock of a file, as /proc/locks says; None where it does not."""
    try:
        lines = Path("/proc/locks").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    inode = f":{path.stat().st_ino}"
    held = [line.split() for line in lines if "->" not in line]  # those with an arrow wait
    return next((int(fields[4]) for fields in held if fields[1] == "FLOCK" and fields[5].endswith(inode)), None)


def has_dvc_above(pid: int) -> bool:
    """Whether a process descends from dvc or from one of our front ends to it."""
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            return False
        if is_dvc(pid):
            return True
    return False


def rwlock_pids(entries: dict[str, dict[str, Any]]) -> set[int]:
    """Process ids in DVC's rwlock: {"read": {path: [{"pid", "cmd"}, ...]}, "write": {path: {"pid", "cmd"}}}."""
    readers = [holder for holders in entries.get("read", {}).values() for holder in holders]
    return {int(holder["pid"]) for holder in [*readers, *entries.get("write", {}).values()]}


def is_alive(pid: int) -> bool:
    """Whether a process has this id; one of another user counts."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def is_dvc(pid: int) -> bool:
    """Whether the process is dvc or one of our front ends to it; without a /proc to ask, it is believed to be."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return not Path("/proc/self/cmdline").exists()
    return any(Path(word).name == "dvc" or word.startswith(("stages.", "tools.")) for word in words)


def running_dvc(root: Path) -> bool:
    """Whether a live dvc holds this checkout's read-write lock."""
    try:
        pids = rwlock_pids(json.loads((root / ".dvc" / "tmp" / "rwlock").read_text(encoding="utf-8") or "{}"))
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return False
    return any(is_alive(pid) and is_dvc(pid) for pid in pids)


@dataclass(frozen=True)
class Gpu:
    """What the driver says of the first GPU; `driver` is empty where there is a GPU and the driver does not answer."""

    name: str
    driver: str


def present_gpu(smi: str = "nvidia-smi", devices: Path = Path("/dev")) -> Gpu | None:
    """The NVIDIA GPU of this machine, or None."""
    try:
        command = [smi, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        answer = done.stdout.strip() if done.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        answer = ""
    if answer:
        name, _, driver = answer.splitlines()[0].rpartition(", ")
        return Gpu(name, driver)
    return Gpu("an NVIDIA GPU", "") if list(devices.glob("nvidia[0-9]*")) else None


def check_driver(gpu: Gpu | None, cuda: str | None) -> Check:
    """The driver works and is new enough for the CUDA that torch is built with, `cuda` ("13.0"; None for a CPU build)."""
    if gpu is None:
        return Check("driver", True, "no NVIDIA GPU")
    if not gpu.driver:
        return Check("driver", False, f"{gpu.name}, but nvidia-smi does not work", "install NVIDIA's driver, or reboot")
    finding = f"{gpu.name}, driver {gpu.driver}"
    needed = DRIVERS.get((cuda or "").partition(".")[0])
    if needed and tuple(map(int, re.findall(r"\d+", gpu.driver)[:2])) < needed:
        needs = ".".join(map(str, needed))
        return Check("driver", False, f"{finding}, too old for CUDA {cuda}", f"install driver {needs} or newer")
    return Check("driver", True, finding)


def check_device(stamp: str | None, gpu: Gpu | None, wanted: str) -> Check:
    """.venv is made for the device that is here. `stamp` is the text of setup.sh's stamp; `wanted`, $DEVICE, has the last word."""
    device, works = (stamp or "").partition(" ")[0], gpu is not None and bool(gpu.driver)
    here = wanted or ("cuda" if works else "cpu")
    if device not in {"cpu", "cuda", "cuda-without-nvcc"}:
        return Check("device", False, ".venv is not complete", "run: make setup")
    if (device == "cpu") != (here == "cpu"):
        return Check("device", False, f".venv is made for {device}, and this machine is {here}", "run: make setup")
    if here == "cuda" and not works:
        mend = "mend its driver, or run: DEVICE=cpu make setup"
        return Check("device", False, "DEVICE=cuda, and there is no working GPU", mend)
    if device == "cuda-without-nvcc":
        mend = "install the CUDA toolkit, then run: make setup"
        return Check("device", False, "no nvcc at set-up, so llama.cpp cannot use the GPU", mend)
    return Check("device", True, here + (", as DEVICE says" if wanted else ""))


def torch_cuda(version_source: str) -> str | None:
    """The CUDA that a torch/version.py names, None for a CPU build."""
    found = re.search(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)", version_source, re.MULTILINE)
    return found[1] if found else None


def check_torch(version_source: str | None, has_gpu: bool) -> Check:
    """torch is a CUDA build where there is a GPU. `version_source` is the text of torch/version.py, None without it."""
    if version_source is None:
        return Check("torch", False, "torch is not installed", "run: make setup")
    cuda = torch_cuda(version_source)
    build = f"a CUDA {cuda} build" if cuda else "a CPU build"
    if has_gpu and not cuda:
        mend = "run: DEVICE=cuda make setup, with an index that has the CUDA build of the same version, as the public one has"
        return Check("torch", False, f"{build}, and there is an NVIDIA GPU it cannot use", mend)
    return Check("torch", True, build + (", GPU present" if has_gpu else ", no GPU"))


def check_llama(libraries: Path | None, has_gpu: bool) -> Check:
    """llama.cpp is a CUDA build where there is a GPU, and not where there is none: that one does not even load."""
    if libraries is None or not libraries.is_dir():
        return Check("llama.cpp", False, "llama-cpp-python is not installed", "run: make setup")
    cuda = bool(list(libraries.glob("libggml-cuda*")))
    build = "a CUDA build" if cuda else "a CPU build"
    if has_gpu and not cuda:
        mend = "install the CUDA toolkit (nvcc), delete .venv, then run: make setup"
        return Check("llama.cpp", False, f"{build}, and there is an NVIDIA GPU it cannot use", mend)
    if cuda and not has_gpu:
        mend = "delete .venv, then run: DEVICE=cpu PIP_NO_CACHE_DIR=1 make setup"
        return Check("llama.cpp", False, f"{build}, and there is no GPU to run it on", mend)
    return Check("llama.cpp", True, build)


def llama_libraries() -> Path | None:
    """Where llama-cpp-python keeps its compiled libraries, found without loading them."""
    spec = util.find_spec("llama_cpp")
    return Path(spec.origin).parent / "lib" if spec and spec.origin else None


def torch_version_source() -> str | None:
    """The text of torch/version.py, found without importing torch, which takes seconds and may fail."""
    spec = util.find_spec("torch")
    path = Path(spec.origin).parent / "version.py" if spec and spec.origin else None
    return path.read_text(encoding="utf-8") if path and path.exists() else None


def read_text(path: Path) -> str | None:
    """The text of a file, None where there is none."""
    return path.read_text(encoding="utf-8") if path.is_file() else None


def gpu_problem() -> str:
    """Why torch cannot use the GPU that is here, and what to do: the first problem of its driver and of torch's build."""
    source = torch_version_source()
    for check in (check_driver(present_gpu(), torch_cuda(source or "")), check_torch(source, has_gpu=True)):
        if not check.ok:
            return f"{check.finding}; {check.mend}"
    return "driver and build look right; try nvidia-smi, and look whether this container may use the GPU"


def examine(root: Path, profile: str | None = None) -> list[Check]:
    """Every check of this checkout, in the order in which to mend; the disk is that of a run of `profile`."""
    gpu, wanted, source = present_gpu(), os.environ.get("DEVICE", ""), torch_version_source()
    has_gpu = wanted == "cuda" or (gpu is not None and bool(gpu.driver) and wanted != "cpu")
    lock = "requirements-cuda.lock" if has_gpu else "requirements.lock"
    pinned = pins(root / lock) | pins(root / "requirements-nodeps.lock")
    repository = check_repository(root)
    of_git = [check_identity(root), check_branch(root), check_params(root), check_profile(root, profile)]
    return [
        check_python(sys.version_info[:2], Path(sys.prefix), root),
        check_device(read_text(root / ".venv/setup-stamp"), gpu, wanted),
        check_driver(None if wanted == "cpu" else gpu, torch_cuda(source or "")),
        check_packages(pinned, installed_versions(pinned)),
        check_compiler(),
        check_cpu(read_text(Path("/proc/cpuinfo"))),
        check_torch(source, has_gpu),
        check_llama(llama_libraries(), has_gpu),
        repository,
        *(of_git if repository.ok else []),
        check_disk(root, shutil.disk_usage(root).free / 2**30, disk_needed(root, profile)),
        check_rwlock(root),
        check_lock(root),
        check_scratch(root),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.doctor", description="Look for what breaks runs.")
    parser.add_argument("--profile", metavar="NAME", help="what is going to run; the profile that params.yaml selects")
    checks = examine(ROOT, parser.parse_args().profile)
    print(*checks, sep="\n")
    problems = sum(not check.ok for check in checks)
    print(f"{problems} of {len(checks)} checks found a problem" if problems else f"all {len(checks)} checks are fine")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
