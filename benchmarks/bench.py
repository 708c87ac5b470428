"""Ours beside the alternative, in turn, in one run: reports/bench.json and reports/bench.md. Run by `make bench`.

    python -m benchmarks.bench            (or: make bench)          a few pairs, once, in a few minutes; written to .scratch/bench
    python -m benchmarks.bench --suites                             the rows of benchmark suites alone, into what reports/ has already
    python -m benchmarks.bench --full     (or: make bench FULL=1)   three repetitions, both mixes, the search for stock TRL's best
                                                                    settings, scaling; written to reports/

Every measurement is a process of its own (benchmarks/sides.py). Speeds of this kind drift, so ratios are taken within one
repetition, and their minimum, median and maximum over the repetitions are reported.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from hermes.artifacts import complete_file, read_json, scratch_folder, write_json
from hermes.bits import cpu_flags
from hermes.console import UserError
from hermes.model.gguf_files import convert, quantize
from hermes.params import read_yaml, selected_profile
from hermes.run import run_tool

ROOT = Path(__file__).parent.parent
REPORTS = Path("reports")
SHARES, ANSWERS, TOTALS = (0.2, 0.5, 0.8), (16, 64, 128, 256), (1000, 4000)
TARGETS = {
    "train.vs_trl": ("pairs a second over an epoch, reference pass included, against stock TRL with the published run's settings", ">= 6"),
    "train.vs_trl_best": ("the same against stock TRL at its best settings here", ">= 2.5"),
    "train.of_peak": ("training FLOPs on unique tokens, against bfloat16 matrix products at the model's shapes", ">= 0.35"),
    "train.peak_rss_vs_trl": ("peak memory against stock TRL with the published run's settings", "<= 0.7"),
    "sweep.vs_trl": ("five betas, one reference pass, against five stock runs", ">= 8"),
    "evaluate.gguf_vs_http": ("log-likelihoods of a GGUF file in process, against lm-eval's HTTP model", ">= 5"),
    "generate.vs_single": ("answers a second, parallel sequences against one at a time", ">= 2.5"),
    "evaluate.suites_vs_hf.shared": ("questions a second of a suite in MMLU's shape, against lm-eval's Transformers model", ">= 3"),
    "evaluate.suites_vs_hf.unshared": ("the same in HellaSwag's shape", ">= 1.5"),
    "evaluate.suites_vs_hf.generation": ("written answers a second in GSM8K's shape, against the same", ">= 2"),
    "scaling": ("seconds measured over seconds fitted, linear in unique tokens, answer tokens and attended positions", "0.8 to 1.2"),
    "repro.minutes": ("all stages, where one commit ran them all last", "<= 25"),
}  # fmt: skip
PUBLISHED = {"quantized": True, "checkpointing": True, "precompute": False, "batch_size": 8}
OTHERS = [
    {"quantized": quantized, "checkpointing": False, "precompute": precompute, "batch_size": batch_size}
    for quantized in (True, False)
    for precompute in (True, False)
    for batch_size in (8, 2)  # with 4 accumulated: the same steps, less padding
]
# Of a suite; written answers fill two batches, whose prompts are of similar length, as those of a whole suite are.
SUITE_QUESTIONS = {"shared": 24, "unshared": 12, "generation": 64}
TRIED = {"embedded": 16, "hermes": 8}  # pairs that a candidate is tried on
Result = dict[str, Any]


def measure(side: str, **arguments: Any) -> Result:
    """Runs one side of a comparison in a process of its own.

    Raises:
        UserError: it fails; gives its last line.
    """
    malloc = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**34)}  # as ./run-stage, for all
    command = [sys.executable, "-m", "benchmarks.sides", side, json.dumps(arguments)]
    print(f"{side} {arguments}", file=sys.stderr, flush=True)
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **malloc}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{side}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    print(f"  {result}", file=sys.stderr, flush=True)
    return result


def seconds(result: Result) -> float:
    """The whole epoch of a training side."""
    return float(result["reference"] + result["train"])


def training_flops(result: Result, peak: Result) -> float:
    """FLOPs of training on unique tokens: forward and backward by input of the frozen layers, and of the head on answers."""
    return float(2 * (result["unique_tokens"] * peak["layers"] + result["answers"] * peak["head"]))


def compare_training(
    mix: str, pairs: int, repetitions: int, candidates: list[Result]
) -> tuple[dict[str, list[float]], Result]:
    """The ratios of every repetition by key, and the raw results; stock TRL's best settings are found among `candidates` on a few pairs."""
    best = candidates[0]
    if candidates[1:]:
        best = min(candidates, key=lambda options: seconds(measure("train_trl", mix=mix, pairs=TRIED[mix], **options)))
    ratios: dict[str, list[float]] = {}
    raw = []
    for _ in range(repetitions):
        ours = measure("train_ours", mix=mix, pairs=pairs)
        stock = measure("train_trl", mix=mix, pairs=pairs, **PUBLISHED)
        tuned = measure("train_trl", mix=mix, pairs=pairs, **best)
        peak = measure("matrix_peak", rows=round(8 * ours["unique_tokens"] / pairs), seconds=4.0)
        for key, value in {
            "train.vs_trl": seconds(stock) / seconds(ours),
            "train.vs_trl_best": seconds(tuned) / seconds(ours),
            "train.of_peak": training_flops(ours, peak) / ours["train"] / peak["peak"],
            "train.peak_rss_vs_trl": ours["peak_rss"] / stock["peak_rss"],
            "sweep.vs_trl": 5 * seconds(stock) / (ours["reference"] + 5 * ours["train"]),
        }.items():
            ratios.setdefault(key, []).append(value)
        raw.append({"ours": ours, "trl": stock, "trl_best": tuned, "peak": peak})
    return ratios, {"best": best, "repetitions": raw}


def compare_evaluation(answers: int, prompts: int, repetitions: int) -> tuple[dict[str, list[float]], list[Result]]:
    """Scoring and generation with a Q8_0 file of the base, which is made first."""
    folder = scratch_folder("bench")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "base.Q8_0.gguf"
    if not file.exists():
        convert(Path("models/base"), folder / "base.gguf", "f16")
        with complete_file(file) as temporary:
            quantize(folder / "base.gguf", temporary, "Q8_0")
    ratios: dict[str, list[float]] = {}
    raw = []
    for _ in range(repetitions):
        found = {
            "score_ours": measure("score_ours", file=str(file), answers=answers),
            "score_http": measure("score_http", file=str(file), answers=answers),
            "together": measure("generate", file=str(file), prompts=prompts, slots=64),
            "single": measure("generate", file=str(file), prompts=prompts, slots=1),
        }
        scored = found["score_http"]["seconds"] / found["score_ours"]["seconds"]
        ratios.setdefault("evaluate.gguf_vs_http", []).append(scored)
        ratios.setdefault("generate.vs_single", []).append(found["single"]["seconds"] / found["together"]["seconds"])
        raw.append(found)
    return ratios, raw


def compare_suites(questions: Mapping[str, int], repetitions: int) -> tuple[dict[str, list[float]], list[Result]]:
    """So many questions of each shape of a suite through both models; whether both answer alike is in the raw results."""
    ratios: dict[str, list[float]] = {}
    raw = []
    for _, (shape, number) in itertools.product(range(repetitions), questions.items()):
        ours, theirs = (measure(f"suites_{side}", shape=shape, questions=number) for side in ("ours", "hf"))
        ratios.setdefault(f"evaluate.suites_vs_hf.{shape}", []).append(theirs["seconds"] / ours["seconds"])
        alike = sum(ours == theirs for ours, theirs in zip(ours["answers"], theirs["answers"], strict=True))
        sides = {
            name: {key: found[key] for key in ("seconds", "peak_rss")}
            for name, found in (("ours", ours), ("hf", theirs))
        }
        apart = [abs(own - other) for own, other in zip(ours.get("totals", []), theirs.get("totals", []), strict=True)]
        raw.append({"shape": shape, "questions": number, "alike": alike, "apart": max(apart, default=None), **sides})
    return ratios, raw


def measure_scaling(repetitions: int) -> tuple[list[float], list[Result]]:
    """Forward and backward at every answer length, share of the prompt and number of tokens: measured over fitted cost, and the cells.

    The cost is fitted (least squares of relative errors) by the pair's unique tokens, its answer tokens, which alone meet the
    output matrix, and the positions that its tokens attend to.
    """
    cells = []
    for answer, share in itertools.product(ANSWERS, SHARES):
        prompt = max(1, round(2 * answer * share / (1 - share)))
        for total in TOTALS:
            pairs = max(1, round(total / (prompt + 2 * answer)))
            cell = measure("forward_backward", prompt=prompt, answer=answer, pairs=pairs, repetitions=repetitions)
            attended = pairs * (prompt**2 / 2 + 2 * answer * prompt + answer**2)
            cells.append({"answer": answer, "share": share, "prompt": prompt, "attended": attended, **cell})
    costs = np.array([[cell["unique_tokens"], cell["answers"], cell["attended"]] for cell in cells])
    taken = np.array([cell["seconds"] for cell in cells])
    weights, *_ = np.linalg.lstsq(costs / taken[:, None], np.ones(len(cells)), rcond=None)
    return (taken / (costs @ weights)).tolist(), cells


def repro_minutes() -> float | None:
    """What the stages took when they last ran, from their records; None where not one commit ran them all."""
    paths = [Path("timings") / f"{stage}.json" for stage in read_yaml(Path("dvc.yaml"))["stages"]]
    records = [read_json(path) for path in paths if path.is_file()]
    if len(records) < len(paths) or len({record["commit"] for record in records}) > 1:
        return None
    return float(sum(record["seconds"] for record in records) / 60)


def summary(values: list[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def processor() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.machine()])[0]


def write_markdown(found: Result, path: Path) -> None:
    """The table of reports/bench.md."""
    lines = [
        "# Ours beside the alternatives",
        "",
        f"`make bench{' FULL=1' if found['full'] else ''}` on {found['cpu']}, {found['threads']} threads, "
        + ", ".join(f"{name} {number}" for name, number in found["versions"].items())
        + f"; {found['repetitions']} repetition(s) a number, the sides in turn.",
        "",
        "| key | what | pairs | target | median | min | max |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for mix in ("embedded", "hermes"):
        for key, (what, target) in TARGETS.items():
            value = (found if mix == "embedded" else found["hermes"]).get(key)
            if value:
                numbers = " | ".join(f"{value[name]:.3g}" for name in ("median", "min", "max"))
                lines.append(f"| {key} | {what} | {mix} | {target} | {numbers} |")
    if "suites_on" in found:
        lines += ["", f"The rows evaluate.suites_vs_hf were measured alone, on {found['suites_on']}."]
    if asked := found.get("raw", {}).get("suites"):
        shapes = dict.fromkeys(row["shape"] for row in asked)
        worst = [min((row for row in asked if row["shape"] == shape), key=lambda row: row["alike"]) for shape in shapes]
        alike = [f"{row['alike']} of {row['questions']} in {row['shape']}" for row in worst]
        lines += ["", f"Questions of suites that both sides answer alike: {', '.join(alike)}."]
    lines += [
        "",
        "Stock TRL's best settings here: " + "; ".join(f"{mix}: {best}" for mix, best in found["best"].items()) + ".",
        "",
    ]
    if found["scaling_cells"]:
        lines += [
            "| answer tokens | prompt's share | unique tokens | pairs a second | ms a unique token | peak memory, MB |",
            "|--:|--:|--:|--:|--:|--:|",
        ]
        for cell in found["scaling_cells"]:
            rate, cost = cell["pairs"] / cell["seconds"], 1000 * cell["seconds"] / cell["unique_tokens"]
            lines.append(
                f"| {cell['answer']} | {cell['share']:.0%} | {cell['unique_tokens']:,} | {rate:.2f} | {cost:.2f} "
                f"| {cell['peak_rss'] / 1e6:,.0f} |"
            )
    with complete_file(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def bench(full: bool) -> Result:
    """All measurements; the content of reports/bench.json.

    Raises:
        UserError: what is measured on is missing, or a side fails.
    """
    for path in ("models/base/config.json", "data/tokens/train.parquet", "data/subset/test.parquet"):
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; run `dvc repro tokenize`")
    repetitions = 3 if full else 1
    numbers: dict[str, Result] = {"embedded": {}, "hermes": {}}
    best: Result = {}
    raw: Result = {}
    for mix in ("embedded", "hermes") if full else ("embedded",):
        pairs = 8 if not full else 48 if mix == "embedded" else 16
        found, details = compare_training(mix, pairs, repetitions, OTHERS if full else OTHERS[:1])
        numbers[mix] = {key: summary(values) for key, values in found.items()}
        best[mix], raw[mix] = details["best"], details["repetitions"]
    main = numbers["embedded"]
    found, raw["evaluation"] = compare_evaluation(16 if full else 4, 128 if full else 32, repetitions)
    main |= {key: summary(values) for key, values in found.items()}
    found, raw["suites"] = compare_suites(SUITE_QUESTIONS if full else dict.fromkeys(SUITE_QUESTIONS, 8), repetitions)
    main |= {key: summary(values) for key, values in found.items()}
    cells: list[Result] = []
    if full:
        fit, cells = measure_scaling(repetitions)
        main["scaling"] = summary(fit)
    if (minutes := repro_minutes()) is not None:
        main["repro.minutes"] = summary([minutes])
    tree = read_yaml(Path("params.yaml"))
    return main | {
        "hermes": numbers["hermes"],
        "full": full,
        "repetitions": repetitions,
        "cpu": processor(),
        "threads": tree["profiles"][selected_profile(tree)]["base"]["threads"],
        "versions": {
            name: version(name) for name in ("torch", "trl", "transformers", "bitsandbytes", "llama-cpp-python")
        },
        "best": best,
        "scaling_cells": cells,
        "raw": raw,
    }


def suites_alone() -> Result:
    """The committed measurements with those of benchmark suites made anew; where they were made is said beside them."""
    found: Result = read_json(REPORTS / "bench.json")
    rows, found["raw"]["suites"] = compare_suites(SUITE_QUESTIONS, 3)
    on = f"{processor()}, {'with' if 'avx512f' in cpu_flags() else 'without'} AVX-512"
    return found | {key: summary(values) for key, values in rows.items()} | {"suites_on": on}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench", description="Measure ours beside the alternatives."
    )
    parser.add_argument("--full", action="store_true", help="three repetitions of everything, for reports/")
    parser.add_argument("--suites", action="store_true", help="the rows of suites alone, into reports/")
    given = parser.parse_args()
    found = suites_alone() if given.suites else bench(given.full)
    folder = REPORTS if found["full"] else scratch_folder("bench")
    write_json(folder / "bench.json", found)
    write_markdown(found, folder / "bench.md")
    print((folder / "bench.md").read_text())


if __name__ == "__main__":
    run_tool("bench", main)
