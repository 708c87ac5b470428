"""One experiment for each beta, for each seed, or for each point of a grid of parameters, and their comparison.

    python -m tools.sweep --betas 0.05,0.1,0.2         (or: make sweep BETAS=0.05,0.1,0.2)
    python -m tools.sweep --seeds 42,1,2               (or: make sweep SEEDS=42,1,2)
    python -m tools.sweep --grid 'beta=0.05,0.1 train.learning_rate=1e-4,5e-4'
                                                       (or: make sweep GRID='beta=0.05,0.1 train.learning_rate=1e-4,5e-4')

A key of a grid is one of the science, or one of the selected profile: `train.epochs` is `profiles.cpu.train.epochs`. All combinations are
checked before the first runs. Each becomes an experiment, `beta-0.05` or `beta-0.05-train.epochs-2`, derived from the workspace as it is.
DVC runs them one after the other, each in a copy of the tracked files, so the workspace stays as it is. An experiment of that name on the
same commit is replaced; what has not changed since then comes out of DVC's run cache. The last step compares those that succeeded.

With --jobs N the first experiment runs alone, so that what all have in common, the reference for one, is computed once. The others run in
DVC's queue, N at once. Of several GPUs worker k sees number k alone.
"""

import argparse
import itertools
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from hermes import params
from hermes.console import UserError, say, warn
from hermes.run import run_tool
from hermes.settings import experiment
from tools import doctor, sources
from tools.dvc_queue import WAITING, run_queued, states
from tools.dvc_runs import DVC, Relay, dvc, only_one

# What an experiment may be given. Python, YAML 1.2 and git, where it is part of a name, read these alike.
VALUES = {
    "beta": (
        re.compile(r"(?=[0.]*[1-9])[0-9]{1,9}(\.[0-9]{1,18})?(e-?[0-9]{1,2})?", re.ASCII),
        "a number above 0; write them like 0.05,0.1,0.2",
    ),
    "seed": (re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII), "a whole number; write them like 42,1,2"),
}
EXAMPLE = "write it like 'beta=0.05,0.1 train.learning_rate=1e-4,5e-4'"
AXIS = re.compile(
    r"([a-z0-9_]+(?:\.[a-z0-9_]+)*)=([A-Za-z0-9][A-Za-z0-9.+_-]{0,40}(?:,[A-Za-z0-9][A-Za-z0-9.+_-]{0,40})*)", re.ASCII
)
MOST = 64  # experiments of a grid


def parse(key: str, text: str) -> list[str]:
    """The values of a comma-separated list, in order and as written. A UserError names one that `key` cannot have, or that comes twice."""
    pattern, wanted = VALUES[key]
    values: list[str] = []
    for value in (entry.strip() for entry in text.split(",")):
        if not pattern.fullmatch(value):
            raise UserError(f"--{key}s: {value[:40]!r} is not {wanted}")
        if float(value) in map(float, values):
            raise UserError(f"--{key}s: {value} comes twice")
        values.append(value)
    return values


def assignments(key: str, values: list[str]) -> dict[str, list[str]]:
    """What each experiment sets, by its name: {"beta-0.05": ["beta=0.05"], ...}."""
    return {f"{key}-{value}": [f"{key}={value}"] for value in values}


def grid(text: str) -> dict[str, list[str]]:
    """What each experiment of a grid sets, by its name: {"beta-0.05-train.epochs-2": ["beta=0.05", "profiles.cpu.train.epochs=2"], ...}.

    Raises:
        UserError: it is no grid, a key is none of params.yaml, or a combination is one that params.yaml may not have.
    """
    tree = params.read_yaml(params.PARAMS)
    profile = params.selected_profile(tree)
    axes: dict[str, list[tuple[str, str]]] = {}
    for part in text.split():
        if not (found := AXIS.fullmatch(part)):
            raise UserError(f"--grid: {part[:60]!r} is no key with its values; {EXAMPLE}")
        key, values = found[1], found[2].split(",")
        path = key if key in tree and key not in (*params.UNTRACKED, "profile") else f"profiles.{profile}.{key}"
        if (now := value_at(tree, path)) is MISSING:
            raise UserError(f"--grid: params.yaml has no value {key}, on top or in the profile {profile}")
        if isinstance(now, list | Mapping):
            raise UserError(f"--grid: {key} is a list or a section of params.yaml; a grid takes keys with one value")
        if key in axes or len({str(as_dvc_reads(path, value)) for value in values}) < len(values):
            raise UserError(f"--grid: {key} or one of its values comes twice")
        axes[key] = [(path, value) for value in values]
    if not axes:
        raise UserError(f"--grid: has no key; {EXAMPLE}")
    points = list(itertools.product(*axes.values()))
    if len(points) > MOST:
        raise UserError(f"--grid: {len(points)} experiments; {MOST} at most")
    for point in points:
        check_point(tree, point)
    return {
        "-".join(f"{key}-{value}" for key, (_, value) in zip(axes, point, strict=True)): [
            f"{path}={value}" for path, value in point
        ]
        for point in points
    }


class Missing:
    """Where params.yaml has no such key."""


MISSING = Missing()


def value_at(tree: object, path: str) -> object:
    """The value of a tree at a path of keys, `MISSING` where it has none."""
    for name in path.split("."):
        if not isinstance(tree, Mapping) or name not in tree:
            return MISSING
        tree = tree[name]
    return tree


def as_dvc_reads(path: str, value: str) -> object:
    """The value that `dvc exp run --set-param` makes of a text, by Hydra."""
    return OverridesParser.create().parse_override(f"{path}={value}").value()


def check_point(tree: Mapping[str, object], point: tuple[tuple[str, str], ...]) -> None:
    """Refuses, by a UserError, values that params.yaml may not have together."""
    changed: dict[str, object] = yaml.safe_load(yaml.safe_dump(dict(tree)))
    for path, value in point:
        *above, last = path.split(".")
        inner = value_at(changed, ".".join(above)) if above else changed
        assert isinstance(inner, dict)
        inner[last] = as_dvc_reads(path, value)
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder) / "params.yaml").write_text(yaml.safe_dump(changed))
        try:
            experiment.check(file)
        except UserError as error:
            said = ", ".join(f"{path}={value}" for path, value in point)
            raise UserError(f"--grid: {said}: {str(error).replace(str(file), 'params.yaml')}") from None


def check_repository(root: Path) -> None:
    """Refuses, by a UserError, what DVC would fail on at every experiment: no author, or a path that it cannot write into a copy."""
    for check in doctor.of_git(root):
        if check.mend and check.name in ("repository", "git identity"):
            raise UserError(f"{check.finding}; {check.mend}")


def run_here(name: str, values: list[str], relay: Relay, lock: IO[str]) -> int:
    """Runs one experiment to its end, its lines on this terminal; its exit code."""
    return relay.run(
        [*DVC, "exp", "run", "--temp", *(f"--set-param={value}" for value in values), "--name", name], lock
    )


def sweep(wanted: Mapping[str, list[str]], jobs: int = 1) -> int:
    """Runs and compares the experiments (name: assignments); 1 where one failed or could not be compared, else a signal's 128 + number."""
    check_repository(Path.cwd())
    sources.refuse_changed()
    with only_one("sweep") as lock, Relay() as relay:
        if jobs > 1 and (other := [name for name, state in states().items() if state in WAITING]):
            verb = "remove" if states().get(other[0]) == "Queued" else "kill"
            raise UserError(
                f"--jobs: DVC's queue holds {other[0]}, which would run too; remove it: .venv/bin/dvc queue {verb} {other[0]}"
            )
        existing, succeeded = dvc("exp", "list", "--name-only").split(), []
        for number, (name, values) in enumerate(wanted.items(), start=1):
            if name in existing:
                say(f"{name}: an experiment of this commit already, it is replaced")
                dvc("exp", "remove", name)
            if jobs > 1 and number > 1:
                continue
            say(f"{name}: experiment {number} of {len(wanted)}")
            code = run_here(name, values, relay, lock)
            if relay.received:
                break
            if code:
                warn(f"{name}: failed; the lines above say why")
            else:
                succeeded.append(name)
        rest = dict(list(wanted.items())[1:]) if jobs > 1 and not relay.received else {}
        if rest:
            succeeded += run_queued(rest, jobs, relay)
        if relay.received:
            warn("sweep: interrupted; experiments that had ended are kept")
            return 128 + relay.received
        if not succeeded:
            return 1
        code = relay.run([sys.executable, "-m", "tools.review", "--compare", *succeeded], lock)
        return 1 if code or len(succeeded) < len(wanted) else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.sweep", description="Run one experiment for each value.")
    parser.add_argument("--betas", metavar="LIST", help="for example 0.05,0.1,0.2")
    parser.add_argument("--seeds", metavar="LIST", help="for example 42,1,2")
    parser.add_argument("--grid", metavar="AXES", help="for example 'beta=0.05,0.1 train.learning_rate=1e-4,5e-4'")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many at once; 1 unless given")
    given = parser.parse_args()
    if not 1 <= given.jobs <= MOST:
        raise UserError(f"--jobs: {given.jobs} is not a number from 1 to {MOST}")
    if sum(value is not None for value in (given.betas, given.seeds, given.grid)) != 1:
        raise UserError("give either --betas, --seeds or --grid")
    if given.grid is not None:
        return sweep(grid(given.grid), given.jobs)
    key, text = ("beta", given.betas) if given.seeds is None else ("seed", given.seeds)
    return sweep(assignments(key, parse(key, text)), given.jobs)


if __name__ == "__main__":
    run_tool("sweep", main)
