"""One experiment for each beta, or for each seed, and their comparison.

    python -m tools.sweep --betas 0.05,0.1,0.2         (or: make sweep BETAS=0.05,0.1,0.2)
    python -m tools.sweep --seeds 42,1,2               (or: make sweep SEEDS=42,1,2)

Each value becomes an experiment, `beta-0.05` or `seed-1` and so on, derived from the workspace as it is. DVC runs them one after
the other, each in a copy of the tracked files, so the workspace stays as it is. An experiment of that name on the same commit is
replaced; what has not changed since then comes out of DVC's run cache. The last step compares those that succeeded.
"""

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from hermes.console import UserError, say, warn
from hermes.run import run_tool
from tools import doctor, sources
from tools.dvc_runs import DVC, Relay, dvc, only_one

# What an experiment may be given. Python, YAML 1.2 and git, where it is part of a name, read these alike.
VALUES = {
    "beta": (
        re.compile(r"(?=[0.]*[1-9])[0-9]{1,9}(\.[0-9]{1,18})?(e-?[0-9]{1,2})?", re.ASCII),
        "a number above 0; write them like 0.05,0.1,0.2",
    ),
    "seed": (re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII), "a whole number; write them like 42,1,2"),
}


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


def assignments(key: str, values: list[str]) -> dict[str, str]:
    """What each experiment sets, by its name: {"beta-0.05": "beta=0.05", ...}."""
    return {f"{key}-{value}": f"{key}={value}" for value in values}


def check_repository(root: Path) -> None:
    """Refuses, by a UserError, what DVC would fail on at every experiment: no author, or a path that it cannot write into a copy."""
    for check in doctor.of_git(root):
        if check.mend and check.name in ("repository", "git identity"):
            raise UserError(f"{check.finding}; {check.mend}")


def sweep(wanted: Mapping[str, str]) -> int:
    """Runs and compares the experiments (name: assignment); 1 where one failed or could not be compared, else a signal's 128 + number."""
    check_repository(Path.cwd())
    sources.refuse_changed()
    with only_one("sweep") as lock, Relay() as relay:
        existing, succeeded = dvc("exp", "list", "--name-only").split(), []
        for number, (name, assignment) in enumerate(wanted.items(), start=1):
            say(f"{name}: experiment {number} of {len(wanted)}")
            if name in existing:
                say(f"{name}: an experiment of this commit already, it is replaced")
                dvc("exp", "remove", name)
            code = relay.run([*DVC, "exp", "run", "--temp", "--set-param", assignment, "--name", name], lock)
            if relay.received:
                warn("sweep: interrupted; experiments that had ended are kept")
                return code or 128 + relay.received
            if code:
                warn(f"{name}: failed; the lines above say why")
            else:
                succeeded.append(name)
        if not succeeded:
            return 1
        code = relay.run([sys.executable, "-m", "tools.review", "--compare", *succeeded], lock)
        return 1 if code or len(succeeded) < len(wanted) else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.sweep", description="Run one experiment for each value.")
    parser.add_argument("--betas", metavar="LIST", help="for example 0.05,0.1,0.2")
    parser.add_argument("--seeds", metavar="LIST", help="for example 42,1,2")
    given = parser.parse_args()
    if (given.betas is None) == (given.seeds is None):
        raise UserError("give either --betas or --seeds")
    key, text = ("beta", given.betas) if given.seeds is None else ("seed", given.seeds)
    return sweep(assignments(key, parse(key, text)))


if __name__ == "__main__":
    run_tool("sweep", main)
