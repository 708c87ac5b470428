"""Is this checkout in a state to run in? One line a check, with what to do about each that fails.

    python -m stages.doctor        (or: make doctor)

Each check is a function of a folder, a text or a version that returns a `Check`; `examine` gathers them for this
checkout. Only the standard library is imported at the top, so that a broken .venv can still be examined. It reads, and
mends nothing.
"""

from __future__ import annotations

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
    """The `package==version` lines of a lock file, as {package: version}."""
    lines = (line.partition("#")[0].strip() for line in lock.read_text(encoding="utf-8").splitlines())
    return {name: version for name, _, version in (line.partition("==") for line in lines if line)}


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


def check_profile(root: Path) -> Check:
    """The profile is the committed one: one chosen for a single run stays in params.yaml and decides the next."""
    found = parameters(root)
    if isinstance(found, Check):
        return Check("profile", found.ok, found.finding, found.mend)
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


def check_disk(root: Path, free_gb: float) -> Check:
    """Room for one more run: the models, their GGUF files and DVC's cache."""
    finding = f"{free_gb:.0f} GB free in {root}"
    if free_gb < MIN_FREE_GB:
        mend = "free some, or drop what no commit or experiment names: .venv/bin/dvc gc -A --all-experiments"
        return Check("disk", False, finding, mend)
    return Check("disk", True, finding)


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
    return any(Path(word).name == "dvc" or word.startswith("stages.") for word in words)


def running_dvc(root: Path) -> bool:
    """Whether a live dvc holds this checkout's read-write lock."""
    try:
        pids = rwlock_pids(json.loads((root / ".dvc" / "tmp" / "rwlock").read_text(encoding="utf-8") or "{}"))
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return False
    return any(is_alive(pid) and is_dvc(pid) for pid in pids)


def check_torch(version_source: str | None, has_gpu: bool) -> Check:
    """torch is a CUDA build where there is a GPU. `version_source` is the text of torch/version.py, None without it."""
    if version_source is None:
        return Check("torch", False, "torch is not installed", "run: make setup")
    cuda = re.search(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)", version_source, re.MULTILINE)
    build = f"a CUDA {cuda[1]} build" if cuda else "a CPU build"
    if has_gpu and not cuda:
        mend = "install the CUDA build of the same version into .venv from an index that has it; the pin stays"
        return Check("torch", False, f"{build}, and there is an NVIDIA GPU it cannot use", mend)
    return Check("torch", True, build + (", GPU present" if has_gpu else ", no GPU"))


def torch_version_source() -> str | None:
    """The text of torch/version.py, found without importing torch, which takes seconds and may fail."""
    spec = util.find_spec("torch")
    path = Path(spec.origin).parent / "version.py" if spec and spec.origin else None
    return path.read_text(encoding="utf-8") if path and path.exists() else None


def examine(root: Path) -> list[Check]:
    """Every check of this checkout, in the order in which to mend."""
    pinned = pins(root / "requirements.lock") | pins(root / "requirements-nodeps.lock")
    repository = check_repository(root)
    of_git = [check_identity, check_branch, check_params, check_profile] if repository.ok else []
    return [
        check_python(sys.version_info[:2], Path(sys.prefix), root),
        check_packages(pinned, installed_versions(pinned)),
        check_compiler(),
        check_torch(torch_version_source(), has_gpu=bool(list(Path("/dev").glob("nvidia[0-9]*")))),
        repository,
        *(check(root) for check in of_git),
        check_disk(root, shutil.disk_usage(root).free / 2**30),
        check_rwlock(root),
        check_lock(root),
    ]


def main() -> int:
    checks = examine(ROOT)
    print(*checks, sep="\n")
    problems = sum(not check.ok for check in checks)
    print(f"{problems} of {len(checks)} checks found a problem" if problems else f"all {len(checks)} checks are fine")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
