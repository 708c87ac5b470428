"""Stage report: what the other stages found -> reports/metrics.json, report.md, report.html, figures/, quantize.json and eval/.

Nothing is measured here: each number is one that a stage wrote, or a count of its rows, so that the page can be rebuilt
on any machine. A task that the profile does not evaluate is left out. The HTML is the Markdown page as one file, which needs no
network; its one script filters the answers. What lies in DVC's cache (the table of files, scores and answers) is copied to reports/, so
that git carries it and a review needs no cache; logs of benchmark suites stay behind, being large and the questions of others.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hermes import params
from hermes.artifacts import complete_folder, write_json
from hermes.console import UserError
from hermes.pages import figures, published_run
from hermes.pages.render import change, interval, number, percent, points, render, render_html
from hermes.pages.results import EVALUATION, QUANTIZE, REPORTS, Inputs, Row, flips, pair, read_inputs, smaller_files
from hermes.run import run_stage
from hermes.training.tracking import Artifact, Tracking

LOCK = Path("dvc.lock")
METRICS, MARKDOWN, HTML = REPORTS / "metrics.json", REPORTS / "report.md", REPORTS / "report.html"
FIGURES = REPORTS / "figures"
SPLITS = ("train", "validation", "test")
SIGMOID = ("sigmoid", "robust")  # losses whose model of a preference is the sigmoid of the margin
FEW = 200  # questions; the 95 % interval of a share of fewer is wider than 14 points
SCORES = {"strict": "Instructions followed", "preference": "Preferences"}
WHOLE = "cpu"  # the profile of the whole experiment on the embedded data


def metrics(inputs: Inputs) -> Row:
    """The numbers of reports/metrics.json, which `dvc metrics` and `dvc exp show` list."""
    results, gain = inputs.results, inputs.comparison["merged"]
    compared = {name: results[name] for name in ("base", "merged")}
    found: Row = {
        "quantized_kl": {name: inputs.divergence[name]["mean_kl"] for name in results if name in inputs.divergence},
        "train": {"first_loss": inputs.summary["first_loss"]},
    }
    if gain["strict"]:
        found["strict_accuracy"] = {name: result["strict"]["seen"]["accuracy"] for name, result in results.items()}
        found["strict_gain"] = gain["strict"]
    if gain["unseen"]:
        found["unseen_gain"] = {"points": gain["unseen"]["points"]}
    if compared["merged"]["preference"]:
        found["preference_accuracy"] = {name: result["preference"]["accuracy"] for name, result in compared.items()}
        found["preference_gain"] = gain["preference"]
    if compared["merged"]["perplexity"]:
        found["perplexity"] = {name: result["perplexity"]["value"] for name, result in compared.items()}
    if inputs.suites:
        found["suites"] = {
            name: {model: row["average"]["score"] for model, row in suite["models"].items()}
            for name, suite in inputs.suites.items()
        }
        found["suites_gain"] = {name: suite["models"]["merged"]["gain"] for name, suite in inputs.suites.items()}
    return found


def kind_gains(inputs: Inputs) -> list[Row]:
    """Every kind of instruction before and after training, with its paired gain in points, from the largest gain to the largest loss."""
    if not inputs.comparison["merged"]["strict"]:
        return []
    base, merged = (inputs.results[name]["strict"]["by_kind"] for name in ("base", "merged"))
    rows, pairs = [], pair(inputs.answers["base"], inputs.answers["merged"])
    for kind, gain in inputs.comparison["merged"]["by_kind"].items():
        fixed, broken = flips([row for row in pairs if row[0]["kind"] == kind])
        row = {"kind": kind, "seen": merged[kind]["seen"], "fixed": len(fixed), "broken": len(broken), **gain}
        rows.append({**row, "before": base[kind]["accuracy"], "after": merged[kind]["accuracy"]})
    return sorted(rows, key=lambda row: (-row["points"], row["kind"]))


def samples(inputs: Inputs, kinds: Sequence[str]) -> tuple[list[Row], list[Row]]:
    """For every kind the first question that training fixed, and the first that it broke, by id; `answers` are those of each model."""
    chosen = []
    for pairs in flips(pair(inputs.answers["base"], inputs.answers["merged"])):
        firsts = {row["kind"]: str(row["id"]) for _, row in reversed(pairs)}
        ids = [firsts[kind] for kind in kinds if kind in firsts]
        answers = [{name: rows[id] for name, rows in inputs.answers.items() if id in rows} for id in ids]
        chosen.append([{**found["merged"], "answers": found} for found in answers])
    return chosen[0], chosen[1]


def quantized_files(inputs: Inputs) -> list[Row]:
    """The smaller files from the largest to the smallest, with what was measured of each; None: not measured."""
    files, score = [], main_score(inputs)
    for name, file in smaller_files(inputs.quantize, inputs.divergence).items():
        found = (inputs.results.get(name) or {}).get(score)
        accuracy = found.get("seen", found)["accuracy"] if found else None
        compared = inputs.comparison.get(name, {})
        beside = {"against_merged": compared.get(score), "unseen": compared.get("unseen")}
        files.append({"name": name, **file, "score": accuracy, **beside})
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
    for split in (name for name in SPLITS if name in inputs.subset and name in inputs.data):
        rows, tokens = inputs.subset[split], inputs.data[split]
        if rows["read"] != sum(rows["removed"].values()) + rows["kept"]:
            raise UserError(
                f"{REPORTS}/subset.json: the rows of `{split}` do not add up; run `dvc repro --force subset`"
            )
        if rows["kept"] != tokens["read"] or tokens["read"] != sum(tokens["dropped"].values()) + tokens["pairs"]:
            raise UserError(
                f"{REPORTS}/data.json: the pairs of `{split}` do not add up; run `dvc repro --force tokenize`"
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


def shares(inputs: Inputs) -> list[Row]:
    """The shares before and after training, with their gains: instructions followed, the same on unseen kinds, preferences, suites."""
    gain, models = inputs.comparison["merged"], (inputs.results["base"], inputs.results["merged"])
    found = []
    if gain["strict"]:
        what = "the share of instructions followed exactly"
        scores = [model["strict"]["seen"]["accuracy"] for model in models]
        found.append(("instructions followed", what, gain["strict"], scores))
    if gain["unseen"]:
        what = "the same share, on kinds of instruction never trained on,"
        scores = [model["strict"]["unseen"]["accuracy"] for model in models]
        found.append(("unseen kinds followed", what, gain["unseen"], scores))
    if models[1]["preference"]:
        what = "the share of held-out pairs whose chosen answer is the likelier one"
        found.append(("preferences", what, gain["preference"], [model["preference"]["accuracy"] for model in models]))
    for suite in inputs.suites.values():
        scores = [suite["models"][name]["average"]["score"] for name in ("base", "merged")]
        what = f"the average of {suite['title']} (scores stop at chance, and the change does not)"
        found.append((suite["title"], what, suite["models"]["merged"]["gain"], scores))
    return [
        {"name": name, "what": what, "gain": gain, "before": before, "after": after}
        for name, what, gain, (before, after) in found
    ]


def side(found: Mapping[str, Any] | None) -> str:
    """Whether a paired interval is above zero, below it, or holds it."""
    if not found:
        return "not asked"
    return "better" if found["low"] > 0 else "worse" if found["high"] < 0 else "the same"


def has_lost(general: Row | None) -> bool:
    """Whether something that training should have left alone is worse beyond its interval: prose more surprising, or fewer capitals."""
    return general is not None and (general["prose"]["low"] > 0 or general["capitals"]["high"] < 0)


def verdict(measured: Sequence[Row], lost: bool = False) -> str | None:
    """A few words on what was measured before and after, intervals that hold zero being no difference; None where nothing was.

    `lost`: something else got worse, which is said too unless the verdict is worse anyway.
    """
    sides = {side(share["gain"]) for share in measured}
    if not sides:
        return None
    if {"better", "worse"} <= sides:
        found = "better in one respect and worse in another"
    else:
        found = next((name for name in ("better", "worse") if name in sides), "no difference seen")
    return f"{found}, at a cost" if lost and found != "worse" else found


def cost(general: Row) -> str:
    """What training changed beside what it is for, in sentences."""
    prose, capitals = general["prose"], general["capitals"]
    return (
        f"On prose of scientific abstracts the perplexity went from {number(prose['before'])} to {number(prose['after'])} "
        f"({change(prose['change'])}, 95% interval {change(prose['low'])} to {change(prose['high'])}, {prose['tokens']:,} tokens). "
        f"Capitals known: {percent(capitals['before'])} before, {percent(capitals['after'])} after "
        f"({points(capitals['points'])} points, {interval(capitals)}, n = {capitals['n']:,})."
    )


def falling(inputs: Inputs) -> Row | None:
    """How training moved the log-probabilities of held-out answers from the reference to its last validation; None where it had none."""
    beta, found = float(inputs.params["beta"]), {}
    for name in ("chosen", "rejected"):
        log_probs, rewards = (inputs.validation.get(f"{what}/{name}") for what in ("logps", "rewards"))
        if not log_probs or not rewards:
            return None
        found[name] = {"last": log_probs[-1], "gained": rewards[-1] / beta}
    return found


def first_look(inputs: Inputs) -> Row | None:
    """Where the main share rests on few questions: how many, the width of its interval, and the command for the whole run."""
    gain = next((share["gain"] for share in shares(inputs)), None)
    if gain is None or gain["n"] >= FEW:
        return None
    part = inputs.profile != WHOLE and inputs.params.get("data.source") == "embedded"
    return {"n": gain["n"], "width": gain["high"] - gain["low"], "whole": WHOLE if part else None}


def page(inputs: Inputs) -> Row:
    """Everything that the template and the figures show: the inputs, and what is made of them here."""
    kinds, files, measured = kind_gains(inputs), quantized_files(inputs), shares(inputs)
    fixed, broken = samples(inputs, [row["kind"] for row in kinds])
    general = inputs.evidence["general"]
    on_published_base = inputs.params.get("model.source") == published_run.BASE  # its loss curve says something here
    return vars(inputs) | {
        "first_look": first_look(inputs),
        "verdict": verdict(measured, has_lost(general)),
        "cost": general and cost(general),
        "by_side": {
            name: [row for row in measured if side(row["gain"]) == name] for name in ("better", "worse", "the same")
        },
        "falling": falling(inputs),
        "calibrated": inputs.params["loss_type"] in SIGMOID,
        "moved": [file["name"] for file in files if side(file["unseen"]) in ("better", "worse")],
        "shares": measured,
        "smallest": next((file for file in reversed(files) if file["against_merged"]), None),
        "deviations": published_run.deviations(inputs.params),
        "published_run": published_run,
        "published": published_run.curve_difference(inputs.history["preference_loss"]) if on_published_base else None,
        "score": SCORES[main_score(inputs)],
        "kinds": kinds,
        "fixed": fixed,
        "broken": broken,
        "files": files,
        "compared": [file for file in files if file["against_merged"] or file["mean_kl"] is not None],
        "suites": [
            {
                **suite,
                "models": {model: suite["models"][model] for model in inputs.results if model in suite["models"]},
                "decontaminated": name in inputs.params.get("data.decontaminate", ()),
            }
            for name, suite in inputs.suites.items()
        ],
        "merges": {onto: inputs.merge[onto] for onto in ("bf16", "nf4") if onto in inputs.merge},
        "flow": data_flow(inputs),
    }


def draw_figures(content: Row, folder: Path) -> None:
    """Writes the figures of a page's content into a folder."""
    losses = published_run.LOSSES if content["published"] else ()
    figures.save(figures.training_curves(content["history"], content["validation"], losses), folder / "training.png")
    if margins := content["evidence"]["margins"]:
        figures.save(figures.reward_margins(margins, content["calibrated"]), folder / "margins.png")
    if content["kinds"]:
        figures.save(figures.gains_by_kind(content["kinds"]), folder / "kinds.png")
    if content["compared"]:
        figures.save(figures.quantization_tradeoff(content["compared"], content["score"]), folder / "quantization.png")


def artifacts() -> list[Artifact]:
    """The data and models of dvc.lock, each with the hashes of the data and models that its stage read; none where DVC ran nothing."""
    found, data = [], ("data/", "models/")
    for stage in params.read_yaml(LOCK).get("stages", {}).values() if LOCK.is_file() else ():
        hashed = [[one for one in stage.get(ends, ()) if "md5" in one] for ends in ("deps", "outs")]
        made_from = {dep["path"]: dep["md5"] for dep in hashed[0] if dep["path"].startswith(data)}
        for out in hashed[1]:
            if (path := out["path"]).startswith(data):
                kind = "model" if path.startswith("models/") else "dataset"
                found.append(Artifact(path.replace("/", "-"), kind, out["md5"], made_from))
    return found


def track(inputs: Inputs) -> None:
    """Adds the results to the W&B run of the training, where params.yaml wants one."""
    with Tracking.start(dict(inputs.params), inputs.summary.get("run")) as tracking:
        if tracking.run is None:
            return
        rows = [
            (old["id"], old["kind"], old["question"], old["answer"], old["strict"], new["answer"], new["strict"])
            for old, new in pair(inputs.answers["base"], inputs.answers["merged"])
        ]
        columns = ("id", "kind", "question", "base", "base follows", "merged", "merged follows")
        numbers = {
            name: value for name, value in params.flatten(metrics(inputs)).items() if isinstance(value, int | float)
        }
        tracking.results(
            inputs.summary["steps"] + 1, numbers, (columns, rows), sorted(FIGURES.glob("*.png")), artifacts()
        )


def main() -> None:
    inputs = read_inputs()
    content = page(inputs)
    with complete_folder(FIGURES) as folder:
        draw_figures(content, folder)
    write_json(METRICS, metrics(inputs))
    write_json(REPORTS / QUANTIZE.name, inputs.quantize)
    with complete_folder(REPORTS / "eval") as folder:
        shutil.copytree(EVALUATION, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("suites"))
    render("report.md.j2", MARKDOWN, content)
    render_html(MARKDOWN)
    track(inputs)


if __name__ == "__main__":
    run_stage("report", main)
