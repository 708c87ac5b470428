"""Stage report: what the other stages found -> reports/metrics.json, report.md, report.html, figures/, quantize.json and eval/.

Nothing is measured here: each number is one that a stage wrote, or a count of its rows, so that the page can be rebuilt
on any machine. What is shown is computed once, in `page`, and rendered twice; a task that the profile does not evaluate is
left out. The HTML is one file without scripts that needs no network. Answers of models are data: they are escaped wherever
they are shown. What lies in DVC's cache (the table of GGUF files, scores and answers) is copied to reports/, so that git
carries it and a review needs no cache; logs of benchmark suites stay behind, being large and the questions of others.
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hermes.artifacts import complete_folder, write_json
from hermes.console import UserError
from hermes.pages import figures, published_run
from hermes.pages.figures import KindGain, QuantizedFile
from hermes.pages.render import interval, percent, points, render
from hermes.pages.results import EVALUATION, QUANTIZE, REPORTS, Inputs, Row, read_inputs
from hermes.run import run_stage

METRICS, MARKDOWN, HTML = REPORTS / "metrics.json", REPORTS / "report.md", REPORTS / "report.html"
FIGURES = REPORTS / "figures"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Sample:
    """One question and what each of a few models answers, in the order of the page."""

    kind: str
    seen: bool
    question: str
    answers: Mapping[str, Row]


@dataclass(frozen=True)
class SplitFlow:
    """The rows of one split from the raw file to the tokens, with every loss by reason."""

    split: str
    read: int
    removed: Mapping[str, int]
    kept: int
    cut: Mapping[str, Any] | None
    dropped: Mapping[str, int]
    pairs: int
    truncated: Mapping[str, int]
    tokens: Mapping[str, Mapping[str, float]]


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
    rows = []
    for kind, gain in inputs.comparison["merged"]["by_kind"].items():
        fixed, broken = flips([row for row in paired_answers(inputs, "base", "merged") if row[0]["kind"] == kind])
        rows.append(
            KindGain(
                kind=kind,
                seen=merged[kind]["seen"],
                before=base[kind]["accuracy"],
                after=merged[kind]["accuracy"],
                points=gain["points"],
                low=gain["low"],
                high=gain["high"],
                n=gain["n"],
                fixed=len(fixed),
                broken=len(broken),
            )
        )
    return sorted(rows, key=lambda row: (-row.points, row.kind))


def paired_answers(inputs: Inputs, before: str, after: str) -> list[tuple[Row, Row]]:
    """The rows of the questions that both models were asked, in the order of ids."""
    return [
        (row, inputs.answers[after][id]) for id, row in inputs.answers[before].items() if id in inputs.answers[after]
    ]


def flips(pairs: Iterable[tuple[Row, Row]]) -> tuple[list[Row], list[Row]]:
    """(fixed, broken): the rows of the second model where only it, or only the first, follows the instruction."""
    pairs = list(pairs)
    fixed = [after for before, after in pairs if after["strict"] and not before["strict"]]
    broken = [after for before, after in pairs if before["strict"] and not after["strict"]]
    return fixed, broken


def samples(inputs: Inputs, kinds: Sequence[str]) -> tuple[list[Sample], list[Sample]]:
    """For every kind the first question that training fixed, and the first that it broke, in the order of ids."""
    fixed, broken = flips(paired_answers(inputs, "base", "merged"))
    chosen = []
    for rows in (fixed, broken):
        firsts = {row["kind"]: row for row in reversed(rows)}
        chosen.append([_sample(inputs, firsts[kind]) for kind in kinds if kind in firsts])
    return chosen[0], chosen[1]


def _sample(inputs: Inputs, row: Row) -> Sample:
    answers = {name: rows[str(row["id"])] for name, rows in inputs.answers.items() if str(row["id"]) in rows}
    return Sample(row["kind"], row["seen"], row["question"], answers)


def quantized_files(inputs: Inputs) -> list[QuantizedFile]:
    """The GGUF files from the largest to the smallest."""
    files = []
    for name, file in sorted(inputs.quantize["files"].items(), key=lambda item: (-item[1]["bytes"], item[0])):
        strict = inputs.results.get(name, {}).get("strict")
        files.append(
            QuantizedFile(
                name=name,
                bytes=file["bytes"],
                bits_per_weight=file["bits_per_weight"],
                tensors=file["tensors"],
                fallback=file["fallback"],
                weight_error=file["weight_error"],
                weight_stretch=file["weight_stretch"],
                matrices=file["matrices_by_type"],
                mean_kl=inputs.divergence.get(name, {}).get("mean_kl"),
                top1_agreement=inputs.divergence.get(name, {}).get("top1_agreement"),
                strict=strict["seen"]["accuracy"] if strict else None,
                against_merged=inputs.comparison.get(name, {}).get("strict"),
                sha256=file["sha256"],
            )
        )
    return files


def data_flow(inputs: Inputs) -> list[SplitFlow]:
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
        flow.append(
            SplitFlow(
                split=split,
                read=rows["read"],
                removed=rows["removed"],
                kept=rows["kept"],
                cut=rows["cut"],
                dropped=tokens["dropped"],
                pairs=tokens["pairs"],
                truncated=tokens["truncated"],
                tokens=tokens["tokens"],
            )
        )
    return flow


def headline(gain: Mapping[str, Any], before: float, after: float, what: str) -> str:
    """One sentence: from where to where, the gain with its interval, and whether the interval holds zero."""
    change = f"{points(gain['points'])} points, 95% paired interval {interval(gain)}, n = {gain['n']:,}"
    span = f"from {percent(before)} to {percent(after)} ({change})"
    if gain["low"] > 0:
        return f"Training raised {what} {span}."
    if gain["high"] < 0:
        return f"Training lowered {what} {span}."
    return f"Training moved {what} {span}; the interval includes no change."


def headlines(inputs: Inputs) -> list[str]:
    """What training did, in a sentence for each task that was evaluated."""
    gain, base, merged = inputs.comparison["merged"], inputs.results["base"], inputs.results["merged"]
    sentences = []
    for part, what in (
        ("seen", "the share of instructions followed exactly"),
        ("unseen", "the same share, on kinds of instruction never trained on,"),
    ):
        found = gain["strict" if part == "seen" else "unseen"]
        if found:
            before, after = (result["strict"][part]["accuracy"] for result in (base, merged))
            sentences.append(headline(found, before, after, what))
    if merged["preference"]:
        before, after = (result["preference"]["accuracy"] for result in (base, merged))
        what = "the share of held-out pairs whose chosen answer is the likelier one"
        sentences.append(headline(gain["preference"], before, after, what))
    return sentences


def page(inputs: Inputs) -> Row:
    """Everything the templates show, computed once for both."""
    gain, results = inputs.comparison["merged"], inputs.results
    kinds = kind_gains(inputs)
    fixed, broken = samples(inputs, [row.kind for row in kinds])
    return {
        "profile": inputs.profile,
        "params": inputs.params,
        "headline": headlines(inputs),
        "gain": gain,
        "results": results,
        "comparison": inputs.comparison,
        "summary": inputs.summary,
        "kinds": kinds,
        "files": quantized_files(inputs),
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
    figures.save(figures.gains_by_kind(kind_gains(inputs)), folder / "kinds.png")
    figures.save(figures.quantization_tradeoff(quantized_files(inputs)), folder / "quantization.png")


def main() -> None:
    inputs = read_inputs()
    content = page(inputs)
    with complete_folder(FIGURES) as folder:
        draw_figures(inputs, folder)
    write_json(METRICS, metrics(inputs))
    shutil.copyfile(QUANTIZE, REPORTS / QUANTIZE.name)
    with complete_folder(REPORTS / "eval") as folder:
        shutil.copytree(EVALUATION, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("suites"))
    pictures = {path.stem: path for path in sorted(FIGURES.glob("*.png"))}
    render("report.md.j2", MARKDOWN, content)
    render("report.html.j2", HTML, {**content, "pictures": pictures})


if __name__ == "__main__":
    run_stage("report", main)
