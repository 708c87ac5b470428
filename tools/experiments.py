"""This repository's experiments in a table that fits a terminal: what each one changed, and what came of it.

    python -m tools.experiments                        (or: make experiments)

It is `dvc exp show` with a dozen of its hundreds of columns, for the working tree, the current commit, and every commit with experiments.
The column `other changes` holds the parameters that differ from the commit above. Results of an experiment that stopped
before its evaluation are left out: the files that it carries are those of its commit.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hermes import params
from hermes.console import say
from hermes.pages.render import clean
from hermes.run import run_tool
from tools.doctor import git
from tools.dvc_runs import dvc

BASELINE = re.compile(r"^refs/exps/([0-9a-f]{2})/([0-9a-f]{38})/", re.MULTILINE)
SCIENCE = {"beta": "beta", "loss_type": "loss", "seed": "seed"}
# A metric of reports/metrics.json, its heading, and how it is written.
RESULTS = {
    "strict_accuracy.merged": ("strict", "{:.1%}"),
    "strict_gain.points": ("gain", "{:+.1f}"),
    "preference_accuracy.merged": ("preference", "{:.1%}"),
    "perplexity.merged": ("perplexity", "{:.2f}"),
    "train.first_loss": ("first\nloss", "{:.4f}"),
}
LEGEND = """
strict: share of answers that follow their instruction to the letter; gain: what training added to it, in points;
preference: share of pairs whose better answer is the likelier one; first loss: ln 2 = 0.6931 where training began right"""
SAID = 4  # of the changed parameters, before they are only counted
WIDTH = 120  # in a narrower terminal its lines are broken, and nothing is left out
Data = Mapping[str, Any]


def baselines() -> list[str]:
    """The current commit, then the commits that experiments derive from; git's references to experiments name them."""
    listed = git(Path(), "for-each-ref", "--format=%(refname)", "refs/exps") or ""
    return ["HEAD", *dict.fromkeys("".join(found) for found in BASELINE.findall(listed))]


def settings(state: Data) -> dict[str, Any]:
    """The parameters that a run rests on, by short names: those of the selected profile are `train.epochs` and so on."""
    tree = state["params"].get("params.yaml", {}).get("data", {})
    name = tree.get("profile")
    top = {key: value for key, value in tree.items() if key not in params.UNTRACKED}
    return params.flatten({"profile": name, **top, **tree.get("profiles", {}).get(name, {})})


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What else than the science differs, one a line; another profile is another in everything."""
    keys = [key for key in after if key not in SCIENCE and after[key] != before.get(key)]
    keys = ["profile"] if "profile" in keys else keys
    said = [f"{key}={' '.join(str(after[key]).split()):.20}" for key in keys[:SAID]]
    return "\n".join(said + [f"{len(keys) - SAID} more"] * (len(keys) > SAID))


def results(state: Data) -> dict[str, Any]:
    """The metrics; none where an output is not the one that later stages have read."""
    outs, deps = state["outs"], state["deps"]
    if any(outs[path]["hash"] != deps[path]["hash"] for path in outs.keys() & deps.keys()):
        return {}
    return params.flatten(state["metrics"].get("reports/metrics.json", {}).get("data", {}))


def row(name: str, entry: Data, above: Data | None, status: str = "") -> list[str]:
    """The cells of one run; `above` is the commit that it derives from."""
    state = entry["data"]
    if not state:
        return [name, status or "unreadable"]
    mine, metrics = settings(state), results(state)
    theirs = settings(above["data"]) if above and above["data"] else mine
    created = f"{datetime.fromisoformat(state['timestamp']):%d %b %H:%M}" if state["timestamp"] else ""
    numbers = [how.format(metrics[key]) if key in metrics else "" for key, (_, how) in RESULTS.items()]
    return [name, status or created, *(str(mine.get(key, "")) for key in SCIENCE), changes(theirs, mine), *numbers]


def rows() -> Iterator[list[str]]:
    """The working tree, then each commit followed by its experiments."""
    tree, *commits = json.loads(dvc("exp", "show", "--json", *(f"--rev={revision}" for revision in baselines())))
    yield row("working tree", tree, commits[0])
    for commit in commits:
        yield row(commit["name"] or commit["rev"][:7], commit, None)
        for experiment in commit["experiments"] or []:
            last, executor = experiment["revs"][0], experiment["executor"] or {}
            yield row(f"  {last['name'] or last['rev'][:7]}", last, commit, executor.get("state", ""))


def main() -> None:
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for heading in ("experiment", "created", *SCIENCE.values(), "other changes"):
        text = heading in ("experiment", "other changes")
        table.add_column(heading, overflow="fold", no_wrap=not text, min_width=10 if text else None)
    for heading, _ in RESULTS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for cells in rows():
        table.add_row(*(Text(clean(cell)) for cell in cells))
    Console(width=max(WIDTH, shutil.get_terminal_size().columns)).print(table)
    say(*LEGEND.split("\n"))


if __name__ == "__main__":
    run_tool("experiments", main)
