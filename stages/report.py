"""Stage report: what the other stages found -> reports/metrics.json, report.md, report.html, figures/, quantize.json and eval/.

Nothing is measured here: each number is one that a stage wrote, or a count of its rows, so that the page can be rebuilt
on any machine. A task that the profile does not evaluate is left out. The HTML is the Markdown page as one file, without
scripts and without the network. What lies in DVC's cache (the table of GGUF files, scores and answers) is copied to reports/, so that git
carries it and a review needs no cache; logs of benchmark suites stay behind, being large and the questions of others.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hermes.artifacts import complete_folder, write_json
from hermes.console import UserError
from hermes.pages import figures, published_run
from hermes.pages.figures import KindGain, QuantizedFile
from hermes.pages.render import interval, percent, points, render, render_html
from hermes.pages.results import EVALUATION, QUANTIZE, REPORTS, Inputs, Row, flips, pair, read_inputs
from hermes.run import run_stage

METRICS, MARKDOWN, HTML = REPORTS / "metrics.json", REPORTS / "report.md", REPORTS / "report.html"
FIGURES = REPORTS / "figures"
SPLITS = ("train", "validation", "test")
FEW = 200  # questions; the 95 % interval of a share of fewer is wider than 14 points
SCORES = {"strict": "Instructions followed", "preference": "Preferences"}
WHOLE = "cpu"  # the profile of the whole experiment on the embedded data


@dataclass(frozen=True)
class Share:
    """A share that was measured before and after training, as fractions, with its paired gain in points."""

    name: str
    what: str
    gain: Mapping[str, Any]
    before: float
    after: float


@dataclass(frozen=True)
class Sample:
    """One question and what each of a few models answers, in the order of the page."""

    kind: str
    seen: bool
    question: str
    answers: Mapping[str, Row]


def metrics(inputs: Inputs) -> Row:
    """The numbers of reports/metrics.json, which `dvc metrics` and `dvc exp show` list."""
    gain, compared = inputs.comparison["merged"], {name: inputs.results[name] for name in ("base", "merged")}
    found: Row = {
        "gguf_kl": {name: inputs.divergence[name]["mean_kl"] for name in inputs.results if name in inputs.divergence},
        "train": {"first_loss": inputs.summary["first_loss"]},
    }
    if gain["strict"]:
        found["strict_accuracy"] = {
            name: result["strict"]["seen"]["accuracy"] for name, result in inputs.results.items()
        }
        found["strict_gain"] = {key: gain["strict"][key] for key in ("points", "low", "high", "n")}
    if gain["unseen"]:
        found["unseen_gain"] = {"points": gain["unseen"]["points"]}
    if compared["merged"]["preference"]:
        found["preference_accuracy"] = {name: result["preference"]["accuracy"] for name, result in compared.items()}
        found["preference_gain"] = {key: gain["preference"][key] for key in ("points", "low", "high", "n")}
    if compared["merged"]["perplexity"]:
        found["perplexity"] = {name: result["perplexity"]["value"] for name, result in compared.items()}
    if inputs.suites:
        found["suites"] = {
            name: {model: row["average"]["score"] for model, row in suite["models"].items()}
            for name, suite in inputs.suites.items()
        }
    return found


def kind_gains(inputs: Inputs) -> list[KindGain]:
    """Every kind of instruction before and after training, from the largest gain to the largest loss."""
    if not inputs.comparison["merged"]["strict"]:
        return []
    base, merged = inputs.results["base"]["strict"]["by_kind"], inputs.results["merged"]["strict"]["by_kind"]
    rows, pairs = [], pair(inputs.answers["base"], inputs.answers["merged"])
    for kind, gain in inputs.comparison["merged"]["by_kind"].items():
        fixed, broken = flips([row for row in pairs if row[0]["kind"] == kind])
        before, after = base[kind]["accuracy"], merged[kind]["accuracy"]
        counts = {"fixed": len(fixed), "broken": len(broken)}
        rows.append(KindGain(kind, merged[kind]["seen"], before, after, **gain, **counts))
    return sorted(rows, key=lambda row: (-row.points, row.kind))


def samples(inputs: Inputs, kinds: Sequence[str]) -> tuple[list[Sample], list[Sample]]:
    """For every kind the first question that training fixed, and the first that it broke, in the order of ids."""
    chosen = []
    for pairs in flips(pair(inputs.answers["base"], inputs.answers["merged"])):
        firsts = {row["kind"]: row for _, row in reversed(pairs)}
        chosen.append([_sample(inputs, firsts[kind]) for kind in kinds if kind in firsts])
    return chosen[0], chosen[1]


def _sample(inputs: Inputs, row: Row) -> Sample:
    answers = {name: rows[str(row["id"])] for name, rows in inputs.answers.items() if str(row["id"]) in rows}
    return Sample(row["kind"], row["seen"], row["question"], answers)


def quantized_files(inputs: Inputs) -> list[QuantizedFile]:
    """The GGUF files from the largest to the smallest."""
    files, score = [], main_score(inputs)
    for name, file in sorted(inputs.quantize["files"].items(), key=lambda item: (-item[1]["bytes"], item[0])):
        found = (inputs.results.get(name) or {}).get(score)
        apart = inputs.divergence.get(name, {})
        files.append(
            QuantizedFile(
                name=name,
                **file,
                mean_kl=apart.get("mean_kl"),
                top1_agreement=apart.get("top1_agreement"),
                score=found.get("seen", found)["accuracy"] if found else None,
                against_merged=inputs.comparison.get(name, {}).get(score),
            )
        )
    return files


def main_score(inputs: Inputs) -> str:
    """What models are compared by: instructions followed, or where those were not asked, preferences."""
    return "strict" if inputs.results["merged"]["strict"] else "preference"


def data_flow(inputs: Inputs) -> list[Row]:
    """What became of every raw row, by split.

    Raises:
        UserError: the counts do not add up, so the reports come from different runs.
    """
    flow = []
    for split in (*SPLITS, *sorted(set(inputs.subset) - set(SPLITS))):
        if split not in inputs.subset or split not in inputs.data:
            continue
        rows, tokens = inputs.subset[split], inputs.data[split]
        if rows["read"] != sum(rows["removed"].values()) + rows["kept"]:
            raise UserError(
                f"{REPORTS / 'subset.json'}: the rows of `{split}` do not add up; run `dvc repro --force subset`"
            )
        if rows["kept"] != tokens["read"] or tokens["read"] != sum(tokens["dropped"].values()) + tokens["pairs"]:
            raise UserError(
                f"{REPORTS / 'data.json'}: the pairs of `{split}` do not add up; run `dvc repro --force tokenize`"
            )
        flow.append({**tokens, **rows, "split": split})
    return flow


def headline(gain: Mapping[str, Any], before: float, after: float, what: str) -> str:
    """One sentence: from where to where, the gain with its interval, and whether the interval holds zero."""
    change = f"{points(gain['points'])} points, 95% paired interval {interval(gain)}, n = {gain['n']:,}"
    span = f"from {percent(before)} to {percent(after)} ({change})"
    if gain["low"] > 0:
        return f"Training raised {what} {span}."
    if gain["high"] < 0:
        return f"Training lowered {what} {span}."
    return f"Training may not have changed {what} {span}: the interval includes no change."


def shares(inputs: Inputs) -> list[Share]:
    """The shares that were measured: instructions followed, the same on unseen kinds, preferences."""
    gain, models, found = inputs.comparison["merged"], (inputs.results["base"], inputs.results["merged"]), []
    for name, part, key, what in (
        ("instructions followed", "seen", "strict", "the share of instructions followed exactly"),
        ("unseen kinds followed", "unseen", "unseen", "the same share, on kinds of instruction never trained on,"),
    ):
        if gain[key]:
            found.append(Share(name, what, gain[key], *(model["strict"][part]["accuracy"] for model in models)))
    if models[1]["preference"]:
        what = "the share of held-out pairs whose chosen answer is the likelier one"
        found.append(Share("preferences", what, gain["preference"], *(row["preference"]["accuracy"] for row in models)))
    return found


def headlines(inputs: Inputs) -> list[str]:
    """What training did, in a sentence for each share that was measured."""
    return [headline(share.gain, share.before, share.after, share.what) for share in shares(inputs)]


def first_look(inputs: Inputs) -> Row | None:
    """Where the main share rests on few questions: how many, the width of its interval, and the command for the whole run."""
    found = next(iter(shares(inputs)), None)
    if found is None or found.gain["n"] >= FEW:
        return None
    part = inputs.profile != WHOLE and inputs.params.get("data.source") == "embedded"
    width = found.gain["high"] - found.gain["low"]
    return {"n": found.gain["n"], "width": width, "whole": WHOLE if part else None}


def page(inputs: Inputs) -> Row:
    """Everything the template shows."""
    results = inputs.results
    kinds, files = kind_gains(inputs), quantized_files(inputs)
    fixed, broken = samples(inputs, [row.kind for row in kinds])
    return {
        "profile": inputs.profile,
        "params": inputs.params,
        "first_look": first_look(inputs),
        "headline": headlines(inputs),
        "shares": shares(inputs),
        "smallest": next((file for file in reversed(files) if file.against_merged), None),
        "deviations": published_run.deviations(inputs.params),
        "published_base": published_run.BASE,
        "published_data": published_run.DATA,
        "score": SCORES[main_score(inputs)],
        "results": results,
        "comparison": inputs.comparison,
        "summary": inputs.summary,
        "kinds": kinds,
        "files": files,
        "compared": compared_files(files),
        "suites": [
            {**suite, "models": {name: suite["models"][name] for name in results}} for suite in inputs.suites.values()
        ],
        "hf_bf16": inputs.divergence.get("hf_bf16"),
        "rounding": inputs.merge["rounding"],
        "merges": {onto: inputs.merge[onto] for onto in ("bf16", "nf4") if onto in inputs.merge},
        "metadata": inputs.quantize["metadata"],
        "fixed": fixed,
        "broken": broken,
        "flow": data_flow(inputs),
        "published": published_run.curve_difference(inputs.history["preference_loss"])
        if is_published_base(inputs)
        else None,
    }


def is_published_base(inputs: Inputs) -> bool:
    """Whether the run tuned the base that the published run tuned, so that its loss curve says something here."""
    return bool(inputs.params.get("model.source") == published_run.BASE)


def draw_figures(inputs: Inputs, folder: Path) -> None:
    """Writes the figures of the page into a folder."""
    losses = published_run.LOSSES if is_published_base(inputs) else ()
    figures.save(figures.training_curves(inputs.history, inputs.validation, losses), folder / "training.png")
    if kinds := kind_gains(inputs):
        figures.save(figures.gains_by_kind(kinds), folder / "kinds.png")
    if files := compared_files(quantized_files(inputs)):
        figures.save(figures.quantization_tradeoff(files, SCORES[main_score(inputs)]), folder / "quantization.png")


def compared_files(files: Sequence[QuantizedFile]) -> list[QuantizedFile]:
    """The files that were compared with the merged model."""
    return [file for file in files if file.against_merged or file.mean_kl is not None]


def main() -> None:
    inputs = read_inputs()
    content = page(inputs)
    with complete_folder(FIGURES) as folder:
        draw_figures(inputs, folder)
    write_json(METRICS, metrics(inputs))
    shutil.copyfile(QUANTIZE, REPORTS / QUANTIZE.name)
    with complete_folder(REPORTS / "eval") as folder:
        shutil.copytree(EVALUATION, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("suites"))
    render("report.md.j2", MARKDOWN, content)
    render_html(MARKDOWN)


if __name__ == "__main__":
    run_stage("report", main)
