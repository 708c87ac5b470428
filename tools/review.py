"""What a change does to the results: two revisions side by side, or many experiments in one table.

    python -m tools.review --base main [--head my-branch]      -> reports/review/review.html and review.md
    python -m tools.review --compare swift-fox calm-owl ...    -> reports/review/sweep.html, sweep.md and sweep.json

A revision is a commit, branch, tag or the name of a DVC experiment (`dvc exp show` lists them); without --head it is
the working tree. Reports are read where they lie, in git or in DVC's cache; nothing is checked out. The two trained
models were asked the same questions, so their difference is paired question by question: sharper than two intervals.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException, NotDvcRepoError
from dvc.repo import Repo
from dvc.scm import RevError
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from hermes import params
from hermes.artifacts import complete_file, write_json
from hermes.console import UserError, say
from hermes.evaluation.intervals import paired_gain, paired_ratio
from hermes.pages import figures
from hermes.pages.figures import Curves
from hermes.pages.render import clean, interval, percent, points, render, render_html, setting
from hermes.pages.results import (
    Row,
    flips,
    pair,
    parse_answers,
    parse_curves,
    parse_mapping,
    shown_params,
    smaller_files,
)
from hermes.run import run_tool

OUTPUT = Path("reports/review")
ABSENT = "(not there)"
SHOWN_ANSWERS = 60  # of each sort; the rest is counted


@dataclass(frozen=True)
class Revision:
    """One state of the repository; `files` has them by their path from the root."""

    name: str
    commit: str | None
    files: AbstractFileSystem

    def read(self, path: str, parse: Callable[[str], Any] = str) -> Any:
        """What `parse` makes of the text of a file; a UserError where it is missing or not what it should be."""
        try:
            return parse(self.files.read_text(path))
        except (OSError, DvcException):
            advice = "run `dvc repro` there and commit, or `dvc pull`" if self.commit else "run `dvc repro`"
            raise UserError(f"`{self.name}` has no {path}; {advice}") from None
        except (YAMLError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"`{self.name}`: {path} cannot be read ({' '.join(str(error).split())})") from None


@dataclass(frozen=True)
class Run:
    """The results of one revision that every comparison needs; params and metrics have dotted keys."""

    name: str
    commit: str | None
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    history: Curves
    validation: Curves

    def gain(self, name: str) -> dict[str, Any] | None:
        """The gain of merged over base in points, with its interval, by its name in metrics.json; None where it was not evaluated."""
        keys = ("points", "low", "high", "n")
        return {key: self.metrics[f"{name}.{key}"] for key in keys} if f"{name}.n" in self.metrics else None


@dataclass(frozen=True)
class Change:
    """One value in two revisions."""

    key: str
    before: Any
    after: Any

    @property
    def difference(self) -> float | None:
        """After minus before, where both are numbers."""
        both = isinstance(self.before, int | float) and isinstance(self.after, int | float)
        return self.after - self.before if both else None


@dataclass(frozen=True)
class AnswerChanges:
    """Questions that both models were asked, by what became of the answer: (before, after) rows in the order of ids."""

    broken: list[tuple[Row, Row]]
    fixed: list[tuple[Row, Row]]
    reworded: int
    same: int
    unpaired: int


def open_revision(name: str | None) -> Revision:
    """Finds a revision by the name of a commit, branch, tag or experiment; None is the working tree."""
    if name is None:
        return Revision("working tree", None, LocalFileSystem())
    try:
        if not name.strip() or name.startswith("-"):  # git takes an empty name for HEAD, and a dash for an option
            raise RevError("it is empty or begins with a dash")
        repo = Repo(rev=name)
        return Revision(name, str(repo.get_rev()), DVCFileSystem(repo=repo))
    except NotDvcRepoError:
        raise UserError(f"`{clean(name)}` holds no DVC project; run this from the root of the repository") from None
    except (DvcException, AttributeError) as error:  # the latter for what git has and is no commit, such as HEAD^{tree}
        why = clean(str(error)) if isinstance(error, DvcException) else "it names a file or folder"
        raise UserError(
            f"`{clean(name)}` is no commit, branch, tag or experiment here ({why}); `dvc exp show` lists the experiments"
        ) from None


def load_run(revision: Revision) -> Run:
    """Reads what every comparison needs of a revision."""
    tree = revision.read("params.yaml", lambda text: dict(YAML(typ="safe", pure=True).load(text)))
    return Run(
        name=revision.name,
        commit=revision.commit,
        params=params.flatten(shown_params(tree, params.selected_profile(tree))),
        metrics=params.flatten(revision.read("reports/metrics.json", parse_mapping)),
        history=revision.read("reports/train/history.csv", parse_curves),
        validation=revision.read("reports/train/evaluation.csv", parse_curves),
    )


def side_by_side(before: Mapping[str, Any], after: Mapping[str, Any], absent: Any = None) -> list[Change]:
    """All values by key, in the order of the first mapping, then those that only the second has."""
    return [Change(key, before.get(key, absent), after.get(key, absent)) for key in dict.fromkeys([*before, *after])]


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """The params that differ."""
    return [change for change in side_by_side(before, after, ABSENT) if change.before != change.after]


def compare_answers(before: Mapping[str, Row], after: Mapping[str, Row]) -> AnswerChanges:
    """Sorts the answers of two models by what changed; a question counts as the same if its id and text are."""
    pairs = pair(before, after)
    fixed, broken = flips(pairs)
    kept = [(old, new) for old, new in pairs if old["strict"] == new["strict"]]
    reworded = sum(old["answer"] != new["answer"] for old, new in kept)
    unpaired = len(before) + len(after) - 2 * len(pairs)
    return AnswerChanges(broken, fixed, reworded, len(kept) - reworded, unpaired)


def strict_gain(before: Mapping[str, Row], after: Mapping[str, Row], seen: bool) -> dict[str, Any] | None:
    """The paired gain in strict accuracy, in points, on kinds that training contained or on the others; None: no question is shared."""
    rows = [
        (old["kind"], old["topic"], float(old["strict"]), float(new["strict"]))
        for old, new in pair(before, after)
        if old["seen"] is seen
    ]
    return dict(paired_gain(rows)) if rows else None


def quantization(revision: Revision) -> dict[str, Row]:
    """Size and divergence of each smaller file of a revision, from the largest to the smallest; None: not measured."""
    quantize = revision.read("reports/quantize.json", parse_mapping)
    return smaller_files(quantize, revision.read("reports/eval/divergence.json", parse_mapping))


def kl_change(old: Row | None, new: Row | None) -> dict[str, Any] | None:
    """By which share a file's mean KL changes from one revision to the other, with its paired interval; None where that is not known."""
    before, after = (
        {topic: (kl, tokens) for topic, kl, tokens in file["by_topic"]} if file and file.get("by_topic") else {}
        for file in (old, new)
    )
    if before.keys() != after.keys() or not before or not sum(kl for kl, _ in before.values()):
        return None
    return dict(paired_ratio([(topic, kl, after[topic][0], tokens) for topic, (kl, tokens) in before.items()]))


def review(base: str, head: str | None = None) -> list[str]:
    """Compares two revisions and writes reports/review/review.html and review.md; returns a summary in lines."""
    revisions = [open_revision(base), open_revision(head)]
    before, after = (load_run(revision) for revision in revisions)
    old_answers, new_answers = (revision.read("reports/eval/merged.jsonl", parse_answers) for revision in revisions)
    old_files, new_files = (quantization(revision) for revision in revisions)
    content = {
        "base": before,
        "head": after,
        "params": changes(before.params, after.params),
        "metrics": side_by_side(before.metrics, after.metrics),
        "gain": strict_gain(old_answers, new_answers, seen=True),
        "unseen_gain": strict_gain(old_answers, new_answers, seen=False),
        "answers": compare_answers(old_answers, new_answers),
        "shown": SHOWN_ANSWERS,
        "files": [
            (name, old, new, kl_change(old, new))
            for name in dict.fromkeys([*old_files, *new_files])
            for old, new in [(old_files.get(name), new_files.get(name))]
        ],
    }
    write_pages("review", [before, after], content)
    return summarize(content)


def summarize(content: Mapping[str, Any]) -> list[str]:
    """The review in a few lines for the terminal."""
    gain, answers = content["gain"], content["answers"]
    differing = [f"{change.key}: {setting(change.before)} -> {setting(change.after)}" for change in content["params"]]
    strict = "no question in common" if gain is None else _gain(gain)
    return [
        f"{content['base'].name} -> {content['head'].name}",
        f"params changed   {'; '.join(differing) or 'none'}",
        f"strict accuracy  {strict}",
        f"answers          {len(answers.fixed)} fixed, {len(answers.broken)} broken, {answers.reworded} reworded, "
        f"{answers.same} the same",
        f"read             {OUTPUT / 'review.html'}",
    ]


def _headline(run: Run) -> str:
    found = scored([run])
    if not found:
        return "no score"
    name, share, gain_name = found[0]
    gain = run.gain(gain_name)
    return f"{name} {percent(run.metrics[share])}{f', {_gain(gain)}' if gain else ''}"


def _gain(gain: Mapping[str, Any]) -> str:
    return f"{points(gain['points'])} points, 95% interval {interval(gain)}, n = {gain['n']}"


def scored(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """The shares that any run has: (heading, the name of merged's share in metrics.json, that of its gain)."""
    suites = dict.fromkeys(key.split(".")[1] for run in runs for key in run.metrics if key.startswith("suites."))
    found = [(name, f"{name}_accuracy.merged", f"{name}_gain") for name in ("strict", "preference")]
    found += [(name, f"suites.{name}.merged", f"suites_gain.{name}") for name in suites]
    return [row for row in found if any(row[1] in run.metrics for run in runs)]


def compare(names: Sequence[str]) -> list[str]:
    """Sets experiments side by side in reports/review/sweep.html, sweep.md and sweep.json; returns them in lines, sorted by name."""
    runs = [load_run(open_revision(name)) for name in sorted(set(names))]
    differing = differing_params(runs)
    spreads = spread(runs)
    shown = {"runs": runs, "differing": differing, "absent": ABSENT, "spread": spreads, "scored": scored(runs)}
    write_pages("sweep", runs, shown)
    write_json(OUTPUT / "sweep.json", spreads)
    values = [" ".join(f"{key}={setting(run.params.get(key, ABSENT))}" for key in differing) for run in runs]
    lines = [f"{run.name}  {found}  {_headline(run)}" for run, found in zip(runs, values, strict=True)]
    return [*lines, f"read {OUTPUT / 'sweep.html'}"]


def spread(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """The least, median and largest value of every metric that all runs have, and each run's own."""
    found = {}
    for key in runs[0].metrics:
        values = {run.name: run.metrics[key] for run in runs if key in run.metrics}
        if len(values) == len(runs):
            least, middle, largest = min(values.values()), median(values.values()), max(values.values())
            found[key] = {"min": least, "median": middle, "max": largest, "runs": values}
    return found


def differing_params(runs: Sequence[Run]) -> list[str]:
    """The keys whose values are not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run.params)
    return [key for key in keys if len({setting(run.params.get(key, ABSENT)) for run in runs}) > 1]


def write_pages(name: str, runs: Sequence[Run], content: Mapping[str, Any]) -> None:
    """Writes the curves of the runs over one another, and the page `name` as HTML and as Markdown."""
    curves = OUTPUT / f"{name}.png"
    with complete_file(curves) as temporary:
        figures.save(figures.overlaid_curves([(run.name, run.history, run.validation) for run in runs]), temporary)
    render(f"{name}.md.j2", OUTPUT / f"{name}.md", {**content, "curves": curves})
    render_html(OUTPUT / f"{name}.md")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.review", description="What a change does to the results.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--base", metavar="REV", help="the revision to compare with: a commit, branch, tag or experiment")
    what.add_argument("--compare", nargs="+", metavar="NAME", help="experiments to set side by side")
    parser.add_argument("--head", metavar="REV", help="the revision under review; the working tree if not given")
    given = parser.parse_args()
    if given.compare and given.head:
        parser.error("--head goes with --base; give all experiments to --compare")
    for line in compare(given.compare) if given.compare else review(given.base, given.head):
        say(line)


if __name__ == "__main__":
    run_tool("review", main)
