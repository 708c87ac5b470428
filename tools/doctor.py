"""Is this checkout in a state to run in? One line a check, with what to do about each that fails.

    python -m tools.doctor                     (or: make doctor)
    python -m tools.doctor --profile a40       (or: make doctor PROFILE=a40) with the disk that a40 needs

It reads, and mends nothing. Only the standard library is imported at the top, so that a broken .venv can still be examined. Locks are
left to DVC: its own messages name the process that holds one and the file to remove. Which driver a CUDA needs is from NVIDIA's "CUDA
compatibility", minor version compatibility.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

from tools import disk

ROOT = Path(__file__).resolve().parent.parent
MIN_FREE_GB = 8
FLAGS = {"portable": "avx2", "avx512": "avx512_bf16"}  # what a CPU needs for them, in short (hermes/bits.py)
# the first driver that runs programs built with a CUDA of this major version
DRIVERS = {"12": (525, 60), "13": (580, 65)}
SHOWN = 3  # of many findings in one line
NVIDIA = Path("/proc/driver/nvidia")  # where the driver of a GPU is loaded
STAMP = Path(".venv/setup-stamp")  # begins with the device that setup.sh made .venv for
DEVICES = Path("/dev")


class Check(NamedTuple):
    """One finding; `mend` says what to do about it, and is empty where there is nothing to do."""

    name: str
    finding: str
    mend: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.mend

    def __str__(self) -> str:
        line = f"{self.name}: {self.finding}" + ("" if self.ok else f"; {self.mend}")
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)  # hermes.console needs packages
        return f"{'ok      ' if self.ok else 'PROBLEM '} {shown}"


class Gpu(NamedTuple):
    """What the driver says of the first GPU; `driver` is empty where there is a GPU and the driver does not answer."""

    name: str
    driver: str


def uses_gpu(driver: Path = NVIDIA, stamp: Path = STAMP) -> bool:
    """Whether a run here is to use a GPU: one has its driver, and neither DEVICE, now or at set-up, nor CUDA_VISIBLE_DEVICES says no."""
    if not driver.exists() or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return False
    made_for = stamp.read_text().partition(" ")[0] if stamp.is_file() else ""
    return (os.environ.get("DEVICE") or made_for) != "cpu"


def present_gpu() -> Gpu | None:
    """The NVIDIA GPU of this machine, or None."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        name, driver = answer.splitlines()[0].rsplit(", ", 1)
        return Gpu(name, driver)
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):  # it is not there, fails, or says nothing
        return Gpu("an NVIDIA GPU", "") if list(DEVICES.glob("nvidia[0-9]*")) else None


def read(path: Path) -> str:
    """The text of a file, empty where there is none."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def few(findings: list[str]) -> str:
    """The first findings, and how many more there are."""
    return "; ".join(findings[:SHOWN]) + (f" and {len(findings) - SHOWN} more" if len(findings) > SHOWN else "")


def pins(lock: Path) -> dict[str, str]:
    """The `package==version` lines of a lock file and of those it names with -r, as {package: version}."""
    text = lock.read_text(encoding="utf-8")
    found: dict[str, str] = {}
    for other in re.findall(r"^-r (\S+)", text, re.MULTILINE):
        found |= pins(lock.parent / other)
    return found | dict(re.findall(r"^([\w.-]+)={2,3}([^\s;\\]+)", text, re.MULTILINE))


def version_of(package: str) -> str:
    """The installed version of a package, without what follows a plus, which says how it was built."""
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return "missing"


def of_python(root: Path, lock: str) -> Iterator[Check]:
    """Python and packages are those of the locks, and a C++ compiler is there for llama-cpp-python; and the kind of CPU."""
    running = "{}.{} in {}".format(*sys.version_info[:2], sys.prefix)
    if Path(sys.prefix).resolve() == (root / ".venv").resolve():
        yield Check("python", running)
    else:
        yield Check("python", f"{running}, not this checkout's .venv", "run: make doctor")
    pinned = pins(root / lock) | pins(root / "requirements-nodeps.lock")
    wrong = [f"{name} is {found}, pinned {pin}" for name, pin in pinned.items() if (found := version_of(name)) != pin]
    mend = "delete .venv, then run: make setup" if wrong else ""
    yield Check("packages", few(wrong) or f"all {len(pinned)} as locked", mend)
    compiler = shutil.which(os.environ.get("CXX", "c++").split()[0])
    yield Check("compiler", compiler or "no C++ compiler", "" if compiler else "run: apt-get install build-essential")
    flags = set(read(Path("/proc/cpuinfo")).split())
    yield Check("cpu", " and ".join(f"`bits: {name}`" for name, flag in FLAGS.items() if flag in flags) or "no AVX2")
    probe = subprocess.run(
        [sys.executable, "-m", "tools.bits_probe"], cwd=root, capture_output=True, text=True, check=False
    )
    yield Check("bits", probe.stdout.strip() or few(probe.stderr.splitlines()[-1:]))


def folder_of(package: str) -> Path:
    """Where a package lies, found without importing it, which takes seconds and may fail."""
    spec = util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else Path(os.devnull)


def of_device(root: Path, gpu: Gpu | None, wanted: str) -> Iterator[Check]:
    """.venv, driver, torch and llama.cpp are for the device that is here; `wanted`, $DEVICE, has the last word on which that is.

    torch's CUDA build runs without a GPU; llama.cpp's does not even load.
    """
    works, torch, llama = gpu is not None and bool(gpu.driver), folder_of("torch"), folder_of("llama_cpp")
    here, made_for = wanted or ("cuda" if works else "cpu"), read(root / ".venv/setup-stamp").partition(" ")[0]
    if made_for not in {"cpu", "cuda", "cuda-without-nvcc"}:
        yield Check("device", ".venv is not complete", "run: make setup")
    elif (made_for == "cpu") != (here == "cpu"):
        yield Check("device", f".venv is made for {made_for}, and this machine is {here}", "run: make setup")
    elif here == "cuda" and not works:
        yield Check("device", "DEVICE=cuda, and no GPU works", "mend its driver, or run: DEVICE=cpu make setup")
    elif made_for == "cuda-without-nvcc":
        mend = "install the CUDA toolkit, then run: make setup"
        yield Check("device", "no nvcc at set-up, so llama.cpp cannot use the GPU", mend)
    else:
        yield Check("device", here + (", as DEVICE says" if wanted else ""))
    built = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)", read(torch / "version.py"), re.MULTILINE)
    cuda = built[1] if built else ""
    needed = DRIVERS.get(cuda.partition(".")[0], (0, 0))
    if gpu is None or wanted == "cpu":
        yield Check("driver", "none needed")
    elif not works:
        yield Check("driver", f"{gpu.name}, but nvidia-smi does not work", "install NVIDIA's driver, or reboot")
    elif tuple(map(int, re.findall(r"\d+", gpu.driver)[:2])) < needed:
        finding = f"{gpu.name}, driver {gpu.driver}, too old for CUDA {cuda}"
        yield Check("driver", finding, "install driver {}.{} or newer".format(*needed))
    else:
        yield Check("driver", f"{gpu.name}, driver {gpu.driver}")
    mend = "run: DEVICE=cuda make setup, with an index that has its CUDA build, as the public one has"
    build = f"a CUDA {cuda} build" if cuda else "no CUDA build"
    yield Check("torch", build, mend if here == "cuda" and not cuda else "")
    has_cuda = bool(list((llama / "lib").glob("libggml-cuda*")))
    mend = "install the CUDA toolkit (nvcc), delete .venv, then run: make setup"
    if here == "cpu":
        mend = "delete .venv, then run: DEVICE=cpu PIP_NO_CACHE_DIR=1 make setup"
    build = "a CUDA build" if has_cuda else "no CUDA build"
    yield Check("llama.cpp", build, mend if (here == "cuda") != has_cuda else "")


def gpu_problem() -> str:
    """Why torch cannot use the GPU that is here, and what to do: the first problem of its driver and of torch's build."""
    for check in of_device(ROOT, present_gpu(), "cuda"):
        if check.name in ("driver", "torch") and not check.ok:
            return f"{check.finding}; {check.mend}"
    return "driver and build look right; try nvidia-smi, and look whether this container may use the GPU"


def git(root: Path, *arguments: str) -> str | None:
    """What git prints, or None where it fails or is not installed."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def of_git(root: Path) -> Iterator[Check]:
    """The folder is a clone on a branch, and git knows who commits; without a commit there is nothing more to say."""
    if shutil.which("git") is None:
        yield Check("repository", "git is not installed", "run: apt-get install git")
        return
    if Path((git(root, "rev-parse", "--show-toplevel") or os.devnull).strip()).resolve() != root.resolve():
        yield Check("repository", f"{root} is not a git repository", "clone it instead of copying its files")
        return
    if git(root, "rev-parse", "--verify", "-q", "HEAD") is None:
        yield Check("repository", "no commit yet", "run: git add -A && git commit")
        return
    if str(root).isascii():
        yield Check("repository", f"{root}")
    else:
        finding = f"{root} has a letter beyond ASCII, with which `dvc exp run --temp` and `--queue` fail"
        yield Check("repository", finding, "move the checkout to a folder without one")
    missing = [
        f"git config --global user.{key} {example}"
        for key, example in (("name", "'Your Name'"), ("email", "you@example.org"))
        if not (git(root, "config", f"user.{key}") or os.environ.get(f"GIT_COMMITTER_{key.upper()}"))
    ]
    finding = "git does not know who commits, and sweeps commit" if missing else "set"
    yield Check("git identity", finding, "run: " + " && ".join(missing) if missing else "")
    branch = git(root, "symbolic-ref", "-q", "--short", "HEAD")
    if branch is None:  # as `dvc exp run` leaves it when it is killed
        by_dvc = git(root, "rev-parse", "-q", "--verify", "refs/exps/exec/EXEC_BASELINE") is not None
        here = git(root, "for-each-ref", "--points-at", "HEAD", "--format=%(refname:short)", "refs/heads") or "-"
        finding = "HEAD is detached" + (", as a `dvc exp run` that works or was killed has it" if by_dvc else "")
        yield Check("branch", finding, f"{'when it is over, ' if by_dvc else ''}run: git switch {here.split()[0]}")
    else:
        yield Check("branch", branch.strip())


def check_params(root: Path, asked: str | None) -> Check:
    """params.yaml says what the commit says, since killed runs and `dvc exp run -S` leave theirs in it; `asked` is a profile of it."""
    try:
        from ruamel.yaml import YAML

        from hermes import params
        from hermes.console import UserError
    except ImportError as error:  # a half-made .venv is what this module has to survive
        return Check("params", f"{error.name} is not installed", "run: make setup")
    restore = "git restore --staged --worktree params.yaml"
    try:
        current = params.read_yaml(root / params.PARAMS)
    except UserError as error:
        return Check("params", " ".join(str(error).split()), f"mend it, or run: {restore}")
    if asked is not None and asked not in (names := current.get("profiles") or {}):
        return Check("params", f"no profile {asked} in params.yaml", f"choose one of {', '.join(sorted(names))}")
    text = git(root, "show", f"HEAD:./{params.PARAMS}")
    committed = YAML(typ="safe", pure=True).load(text) if text else current
    before, now = params.flatten(committed), params.flatten(current)
    changed = [
        f"{key} {before.get(key, 'absent')} -> {now.get(key, 'absent')}"
        for key in {**before, **now}
        if before.get(key, ...) != now.get(key, ...)
    ]
    if not changed:
        return Check("params", f"as committed, profile: {now.get('profile')}")
    mend = f"commit it if it is meant, or drop it: {restore}"
    if (root / ".scratch/profile.before").exists():  # tools/profiles.py
        mend = "a `make repro` that works or was killed chose its profile; when it is over, run: make repro"
    return Check("params", f"params.yaml differs from the commit: {few(changed)}", mend)


def check_disk(root: Path, profile: str | None = None) -> Check:
    """Room for what a run of a profile, the selected one unless named, is still going to write; what is there may be another run's."""
    needed = MIN_FREE_GB * 2**30
    try:
        from tools import plan  # it imports torch, which a broken .venv cannot

        with chdir(root):
            needed = max(needed, plan.disk(plan.load(profile)) - disk.held(root))
    except Exception:  # whatever is wrong there, another check says it
        pass
    return Check("disk", *disk.room(root, needed))


def examine(root: Path, profile: str | None = None) -> Iterator[Check]:
    """Every check of a checkout, in the order in which to mend; the disk is that of a run of `profile`."""
    gpu, wanted = present_gpu(), os.environ.get("DEVICE", "")
    has_gpu = wanted == "cuda" or (gpu is not None and bool(gpu.driver) and wanted != "cpu")
    yield from of_python(root, "requirements-cuda.lock" if has_gpu else "requirements.lock")
    yield from of_device(root, gpu, wanted)
    yield from of_git(root)
    yield check_params(root, profile)
    yield check_disk(root, profile)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.doctor", description="Look for what breaks runs.")
    parser.add_argument("--profile", metavar="NAME", help="what is going to run; the profile that params.yaml selects")
    profile = parser.parse_args().profile
    os.environ["HF_HUB_OFFLINE"] = "1"
    checks = list(examine(ROOT, profile))
    print(*checks, sep="\n")
    problems = sum(not check.ok for check in checks)
    print(f"{problems} of {len(checks)} checks found a problem" if problems else f"all {len(checks)} checks are fine")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
