"""A report at W&B of the committed run: the verdict, its curves, scores, figures and answers, and what everything was made from.

    python -m tools.wandb_report --entity NAME             (or: make wandb-report ENTITY=name)           writes its spec
    python -m tools.wandb_report --entity NAME --save      (or: make wandb-report ENTITY=name SAVE=1)    saves it, with WANDB_API_KEY

The report is composed here, without the network, from reports/ and dvc.lock. Its panels show the W&B run of that training
(hermes/training/tracking.py), so they are empty until that run has been sent. The spec is what W&B would be given, as JSON.
"""

import argparse
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb_workspaces.reports.v2 as wr

from hermes import params
from hermes.artifacts import scratch_folder, write_json
from hermes.console import UserError, say
from hermes.pages.results import Inputs, read_inputs
from hermes.run import run_tool
from hermes.training.tracking import Params
from stages.report import artifacts, headline, metrics, page

# What training logs at each step (hermes/training/callbacks.py), by panel; `eval_` is asked of held-out pairs.
CURVES = {
    "Preference loss": ("preference_loss", "eval_preference_loss"),
    "Loss, with its other terms": ("loss", "eval_loss"),
    "Reward margins": ("rewards/margins", "eval_rewards/margins"),
    "Reward accuracy": ("rewards/accuracies", "eval_rewards/accuracies"),
    "Rewards of chosen and rejected answers": (
        "rewards/chosen",
        "rewards/rejected",
        "eval_rewards/chosen",
        "eval_rewards/rejected",
    ),
    "Log-probabilities of held-out answers": ("eval_logps/chosen", "eval_logps/rejected"),
    "Learning rate": ("learning_rate",),
    "Gradient norm": ("grad_norm",),
}
# Names of metrics.json (stages/report.py), by panel and by what they begin with.
SCORES = {
    "Instructions followed": "strict_accuracy.",
    "Preferences": "preference_accuracy.",
    "Divergence from merged, nats": "quantized_kl.",
    "Perplexity": "perplexity.",
    "Benchmark suites": "suites.",
}
ENTITY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}", re.ASCII)


def lineage() -> str:
    """A table of the data and models, each with its hash and those of what it was made from."""
    rows = [
        f"| `{made.name}` | {made.kind} | `{made.md5}` | {', '.join(f'`{path}` {md5}' for path, md5 in made.made_from.items()) or '–'} |"
        for made in artifacts()
    ]
    return "\n".join(["| artifact | kind | md5 in dvc.lock | made from |", "|---|---|---|---|", *rows])


def verdict(content: Mapping[str, Any]) -> str:
    """What was found, on what and how sure, as Markdown."""
    told = [headline(row["gain"], row["before"], row["after"], row["what"]) for row in content["shares"]]
    found = [f"**The verdict: {content['verdict']}.**", "", *(f"- {line}" for line in told)]
    if not content["verdict"]:
        found = ["This profile evaluates neither instructions nor preferences nor suites, so no gain is known."]
    return "\n".join(found + (["", f"**What it cost.** {content['cost']}"] if content["cost"] else []))


def numbers(inputs: Inputs) -> list[str]:
    """The names of the numbers that the run's summary has."""
    return [name for name, value in params.flatten(metrics(inputs)).items() if isinstance(value, int | float)]


def compose(entity: str, project: str, inputs: Inputs) -> wr.Report:
    """The report of the run that reports/ is about.

    Raises:
        UserError: reports/ is from before a training had an id.
    """
    run = inputs.summary.get("run")
    if not run:
        raise UserError("reports/train/summary.json: names no run, it is of an older training; run `make repro`")
    content, found = page(inputs), numbers(inputs)
    shown: dict[str, list[Any]] = {
        title: [name for name in found if name.startswith(prefix)] for title, prefix in SCORES.items()
    }
    curves = [wr.LinePlot(title=title, x="Step", y=list(names)) for title, names in CURVES.items()]
    scores = [wr.BarPlot(title=title, metrics=names) for title, names in shown.items() if names]
    drawn = sorted(Path("reports/figures").glob("*.png"))
    figures = [wr.MediaBrowser(title=path.stem, media_keys=[f"figures/{path.stem}"]) for path in drawn]
    answers = [wr.WeavePanelSummaryTable(table_name="answers")] if content["kinds"] else []

    def grid(panels: list[Any]) -> wr.PanelGrid:
        # A run set that names its project is looked up there; without one it is the report's own.
        return wr.PanelGrid(
            runsets=[wr.Runset(name=content["profile"], filters=f"Metric('ID') in ['{run}']")], panels=panels
        )

    return wr.Report(
        entity=entity,
        project=project,
        title=f"What preference training changed: {content['profile']}, run {run}",
        description=f"beta {inputs.params['beta']}, {inputs.summary['pairs']} pairs, {inputs.summary['steps']} steps",
        blocks=[
            wr.MarkdownBlock(verdict(content)),
            wr.H2("Training"),
            grid(curves),
            wr.H2("Scores"),
            grid(scores + figures),
            wr.H2("Answers before and after"),
            grid(answers),
            wr.H2("Parameters"),
            grid([wr.RunComparer(diff_only=None)]),
            wr.H2("Data and models"),
            wr.MarkdownBlock(lineage()),
        ],
    )


def spec(report: wr.Report) -> dict[str, Any]:
    """What W&B is given of a report; its ids of blocks are drawn anew each time."""
    found: dict[str, Any] = json.loads(report._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.wandb_report", description="Compose a report at W&B.")
    parser.add_argument("--entity", required=True, metavar="NAME", help="your user or team at W&B")
    parser.add_argument("--save", action="store_true", help="save it there; needs WANDB_API_KEY")
    options = parser.parse_args()
    if not ENTITY.fullmatch(options.entity):
        raise UserError(f"ENTITY={options.entity}: not a user or team of W&B")
    if options.save and not os.environ.get("WANDB_API_KEY"):
        raise UserError(
            "SAVE=1 needs WANDB_API_KEY (https://wandb.ai/authorize); without SAVE=1 the spec alone is written"
        )
    report = compose(options.entity, params.load(Params).wandb.project, read_inputs())
    if options.save:
        try:
            report.save()
        except Exception as error:  # whatever the network and W&B say
            raise UserError(f"W&B did not take the report: {' '.join(str(error).split())[:200]}") from None
        say(f"saved: {report.url}")
        return
    write_json(target := scratch_folder("wandb") / "report.json", spec(report))
    say(f"{len(report.blocks)} blocks, whose spec is {target}; nothing is saved without SAVE=1")


if __name__ == "__main__":
    run_tool("wandb-report", main)
