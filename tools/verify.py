"""Rebuilds the committed results in a temporary clone, and says whether they have the committed bits.

    python -m tools.verify                         (or: make verify)            every stage
    python -m tools.verify --stage train           (or: make verify STAGE=train)   up to this one
    python -m tools.verify --quick                 (or: make verify QUICK=1)    the profile quick
    python -m tools.verify --bits avx512           (or: make verify BITS=avx512)   with these instructions
    python -m tools.verify --record                keeps the hashes of the results that are here, as those to compare with

The clone has the last commit and an empty cache, so that every stage runs. Its outs are compared file by file with
reports/hashes.json, which has the hashes of each profile and value of `bits`, and the machine that made them. A file that differs is
described by its numbers, if the committed one is here: reports are in git, artifacts in DVC's cache. The clone stays where something
differs.

No bits are promised on a GPU, on an ARM CPU or without AVX2. There the stages that compute nothing (EXACT) still need the committed bits.
Of the others the numbers of tolerances.yaml are compared, and the files that have none are left to these.
"""

import argparse
import csv
import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from safetensors import safe_open

from hermes.artifacts import prune_scratch, read_object, write_json
from hermes.bits import Bits, can
from hermes.bits import check as check_bits
from hermes.console import UserError, say, warn
from hermes.params import PARAMS, read_yaml, selected_profile
from hermes.run import TIMINGS, run_tool
from tools import doctor, machine
from tools.dvc_runs import DVC, SCRATCH, Relay, environment, only_one
from tools.profiles import with_key, with_profile

LOCK, HASHES = Path("dvc.lock"), Path("reports/hashes.json")
Files = dict[str, str]  # md5 by path
SHOWN = 3  # files of a stage whose difference is told
EXACT = ("fetch_data", "fetch_model", "subset", "tokenize")
TOLERANCES: dict[str, dict[str, float]] = read_yaml(Path(__file__).with_name("tolerances.yaml"))  # by file and number
BACK = f"`git checkout {HASHES}` brings it back"


def outs(lock: str) -> dict[str, Files]:
    """The outs of every stage of a dvc.lock, by stage and path.

    Raises:
        UserError: it is damaged.
    """
    try:
        stages = YAML(typ="safe", pure=True).load(lock)["stages"]
        return {stage: {out["path"]: out["md5"] for out in entry.get("outs", ())} for stage, entry in stages.items()}
    except (YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{LOCK}: not what DVC writes ({error!r}); `git checkout {LOCK}` brings the committed one back"
        ) from None


def object_of(root: Path, md5: str) -> Path:
    """Where a checkout's own cache has the content of this hash."""
    return root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]


def md5_of(path: Path) -> str:
    """The md5 of a file's bytes, as DVC names it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def files_of(root: Path, stages: Iterable[str] | None = None) -> dict[str, Files]:
    """The files of the outs of every stage, or of these, as they lie in a checkout.

    Raises:
        UserError: one is missing.
    """
    found: dict[str, Files] = {}
    for stage, paths in outs((root / LOCK).read_text()).items():
        if stages is not None and stage not in stages:
            continue
        found[stage] = {}
        for name in sorted(paths):
            path = root / name
            if not path.exists():
                raise UserError(f"{path}: no such file; run `make repro` first")
            files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
            found[stage] |= {file.relative_to(root).as_posix(): md5_of(file) for file in files}
    return found


def selected(tree: dict[str, Any]) -> tuple[str, str]:
    """The profile and the `bits` of a params.yaml."""
    return selected_profile(tree), str(tree.get("bits"))


def record(root: Path) -> None:
    """Writes the hashes of a checkout's results into reports/hashes.json, beside those of other profiles.

    Raises:
        UserError: a stage is not up to date.
    """
    status = subprocess.run([*DVC, "status", "--quiet"], cwd=root, env=environment(), capture_output=True, check=False)
    if status.returncode:
        raise UserError("not all stages are up to date; run `make repro` first")
    known = read_object(HASHES, BACK) if HASHES.is_file() else {}
    profile, bits = selected(read_yaml(root / PARAMS))
    stages = files_of(root)
    known.setdefault(profile, {})[bits] = {
        "made_on": machine.facts(),
        "outs": outs((root / LOCK).read_text()),
        "stages": stages,
    }
    write_json(root / HASHES, known)
    say(f"{HASHES}: {sum(map(len, stages.values()))} files of the profile {profile}, `bits: {bits}`")


def numbers(path: Path) -> dict[str, float]:
    """The numbers of a JSON, JSON lines or CSV file, by their places."""
    text = path.read_text()
    if path.suffix == ".csv":
        rows: Any = list(csv.DictReader(text.splitlines()))
    else:
        rows = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)

    def walk(value: Any, place: str) -> Iterator[tuple[str, float]]:
        if isinstance(value, Mapping | list):
            for name, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
                yield from walk(inner, f"{place}.{name}" if place else str(name))
        elif not isinstance(value, bool):
            try:
                yield place, float(value)
            except (TypeError, ValueError):
                return

    return dict(walk(rows, ""))


def columns(path: Path) -> dict[str, np.ndarray]:
    """The numbers of a Parquet file, (rows,) or flattened, by column."""
    table = pq.read_table(path)
    found = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        column = column.flatten() if hasattr(column, "flatten") and "list" in str(column.type) else column
        if str(column.type).startswith(("int", "uint", "float", "double")):
            found[name] = column.to_numpy(zero_copy_only=False).astype(np.float64)
    return found


def tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file in float32."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).float().numpy() for name in sorted(file.keys())}


READERS: dict[str, Callable[[Path], Mapping[str, Any]]] = {
    **dict.fromkeys((".json", ".jsonl", ".csv"), numbers),
    ".parquet": columns,
    ".safetensors": tensors,
}


def distance(committed: Path, found: Path, suffix: str) -> str:
    """How far apart the numbers of two files are, in words."""
    if suffix not in READERS:
        return f"{committed.stat().st_size:,} and {found.stat().st_size:,} bytes"
    left, right = READERS[suffix](committed), READERS[suffix](found)
    if left.keys() != right.keys():
        return f"{len(left.keys() ^ right.keys())} values are in one of them alone, such as {min(left.keys() ^ right.keys())}"
    apart = []
    for name in left:
        a, b = np.atleast_1d(np.asarray(left[name])), np.atleast_1d(np.asarray(right[name]))
        if a.shape != b.shape:
            return f"{name} has {a.size} and {b.size} values"
        different = ~((a == b) | (np.isnan(a) & np.isnan(b)))
        if different.any():
            apart.append((float(np.abs(a - b)[different].max()), int(different.sum()), name))
    if not apart:
        return "the same numbers, in other words"
    far, count, name = max(apart)
    return f"{sum(one[1] for one in apart):,} numbers differ, by up to {far:.3g} ({name}: {count:,})"


def committed_file(root: Path, path: str, md5: str) -> Path | None:
    """The committed file of this hash, where git or the cache of this checkout has it."""
    cached = object_of(root, md5)
    if cached.is_file():
        return cached
    shown = subprocess.run(["git", "show", f"HEAD:{path}"], cwd=root, capture_output=True, check=False)
    if shown.returncode or hashlib.md5(shown.stdout).hexdigest() != md5:  # HEAD has the reports of one profile
        return None
    kept = Path(tempfile.mkdtemp(dir=root / SCRATCH)) / Path(path).name
    kept.write_bytes(shown.stdout)
    return kept


def compare_stage(root: Path, clone: Path, known: Files, found: Files) -> list[str]:
    """What is not the same of a stage's files, a line each."""
    lines = []
    for path in sorted(known.keys() | found.keys()):
        if path not in known or path not in found:
            lines.append(f"{path}: is {'new' if path in found else 'missing'}")
        elif known[path] != found[path]:
            original = committed_file(root, path, known[path]) if len(lines) < SHOWN else None
            suffix = Path(path).suffix
            lines.append(f"{path}: " + (distance(original, clone / path, suffix) if original else "other bytes"))
    return lines


def out_of_tolerance(committed: Path, found: Path, tolerances: Mapping[str, float]) -> tuple[int, list[str]]:
    """How many numbers of a file were compared, and those that are further from the committed ones than is tolerated, a line each."""
    left, right, lines, count = numbers(committed), numbers(found), [], 0
    for name in sorted(left.keys() | right.keys()):
        allowed = next((value for pattern, value in tolerances.items() if fnmatch(name, pattern)), None)
        if allowed is None:
            continue
        count += 1
        if name not in left or name not in right:
            lines.append(f"{name} is {'new' if name in right else 'missing'}")
        elif not abs(left[name] - right[name]) <= allowed:
            lines.append(f"{name} is {right[name]:.4g}, committed {left[name]:.4g}; {allowed:g} are tolerated")
    return count, lines


def tolerate_stage(root: Path, clone: Path, known: Files, found: Files) -> tuple[list[str], str]:
    """What is out of tolerance of a stage's files, a line each; and in words how its numbers were judged."""
    count, lines = 0, []
    for path in sorted(known.keys() & found.keys() & TOLERANCES.keys()):
        original = committed_file(root, path, known[path])
        if original is None:
            lines.append(f"{path}: the committed one is not here to compare with")
            continue
        compared, far = out_of_tolerance(original, clone / path, TOLERANCES[path])
        count += compared
        if not compared:
            lines.append(f"{path}: none of its numbers has a tolerance")
        lines += [f"{path}: {line}" for line in far]
    if not known.keys() <= found.keys():
        lines.append(f"{min(known.keys() - found.keys())}: is missing")
    if lines:
        return lines, f"{len(lines)} differences are not tolerated"
    return [], f"other bits, {count} numbers within tolerance" if count else "other bits, to be judged by later numbers"


def compare(root: Path, clone: Path, known: dict[str, Any], exact: bool) -> bool:
    """Says of every stage that was rebuilt whether it has the committed bits, or is within tolerances; whether all are."""
    ran = {path.stem for path in (clone / TIMINGS).glob("*.json")}
    good = True
    for stage, files in files_of(clone, ran).items():
        committed = known["stages"].get(stage, {})
        lines = compare_stage(root, clone, committed, files)
        verdict = f"{len(lines)} of {len(files)} files differ" if lines else "the same bits"
        if lines and not exact and stage not in EXACT:
            lines, verdict = tolerate_stage(root, clone, committed, files)
        say(f"{stage}: {verdict} ({len(files)} files)", *(f"  {line}" for line in lines[:SHOWN]))
        good &= not lines
    there = known["made_on"]
    apart = machine.differences({name: value for name, value in machine.facts().items() if name in there}, there)
    say("machine: " + ("; ".join(apart) if apart else "as the one that made the committed results"))
    return good


def clone_of(root: Path, profile: str, bits: str) -> Path:
    """A temporary clone of the last commit with this profile and these bits selected, and without outs."""
    clone = Path(tempfile.mkdtemp(prefix="verify-", dir=root / SCRATCH))
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(root), str(clone)], check=True)
    params = clone / PARAMS
    params.write_text(with_key(with_profile(params.read_text(), profile)[0], "bits", bits)[0])
    return clone


def verify(root: Path, profile: str, bits: str, stage: str | None) -> int:
    """Rebuilds and compares; 0 where all is the same, 1 where something differs, DVC's exit code where it fails."""
    recorded = read_object(HASHES, BACK) if HASHES.is_file() else {}
    known = recorded.get(profile, {}).get(bits)
    if known is None:
        others = ", ".join(f"{name} with BITS={value}" for name in sorted(recorded) for value in sorted(recorded[name]))
        raise UserError(
            f"{HASHES}: has no hashes of the profile {profile} with `bits: {bits}` to compare with; it has {others or 'none'}; "
            "after `make repro`, `.venv/bin/python -m tools.verify --record` keeps those of your run"
        )
    if stage is not None and stage not in known["stages"]:  # DVC would take one that begins with a dash for an option
        raise UserError(f"no stage {stage}; choose one of {', '.join(known['stages'])}")
    changed = doctor.git(root, "status", "--porcelain")
    if changed is None:
        raise UserError("this folder is no clone, or git is not installed; results are rebuilt from its last commit")
    exact = can(bits) and not doctor.uses_gpu()
    if not exact:
        say(
            "verify: no bits are promised on this machine; numbers are compared within the tolerances of tools/tolerances.yaml"
        )
    if changed:
        warn("verify: changes that are not committed are left out")
    with only_one("verify") as lock, Relay() as relay:
        prune_scratch("verify")
        clone = clone_of(root, profile, bits)
        command = [*DVC, "repro", "--force", "--no-run-cache", *([stage] if stage else [])]
        code = relay.run(["env", "-C", str(clone), *command], lock)
        if code:
            shutil.rmtree(clone)
            return code
        rebuilt = compare(root, clone, known, exact)
    if rebuilt:
        shutil.rmtree(clone)
    else:
        say(f"the rebuilt results stay in {clone.relative_to(root)}")
    return int(not rebuilt)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.verify", description="Rebuild the committed results and compare bits."
    )
    parser.add_argument("--stage", metavar="NAME", help="the last stage that is rebuilt; all without it")
    parser.add_argument("--quick", action="store_true", help="the profile quick")
    parser.add_argument("--bits", choices=get_args(Bits), help="the instructions; those of params.yaml without it")
    parser.add_argument("--record", action="store_true", help="keep the hashes of the results here")
    arguments = parser.parse_args()
    root = Path.cwd()
    (root / SCRATCH).mkdir(exist_ok=True)
    if arguments.record:
        record(root)
        return 0
    profile, bits = selected(read_yaml(PARAMS))
    check_bits(arguments.bits or bits)
    return verify(root, "quick" if arguments.quick else profile, arguments.bits or bits, arguments.stage)


if __name__ == "__main__":
    run_tool("verify", main)
