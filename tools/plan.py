"""What a run of a profile needs, before anything is loaded: memory, disk and time of every stage, against a GPU.

    python -m tools.plan                               (or: make plan)
    python -m tools.plan --profile a40 --gpu "RTX 4090"

The shape of the model comes from models/base if that is the profile's, from what is known of the published base, or from the Hub; lengths
from data/tokens if those are the profile's, else a mix with the means of Hermes. Memory is computed as tools/memory_plan.py says, for the
largest row of an epoch. All numbers for a GPU are predictions until `make gpu-check` has confirmed them on one.

A run that does not fit is refused here, by `make repro` before it starts, and by the stage train, with the smallest change that would fit.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import AutoConfig, LlamaConfig

from hermes import hub, params
from hermes.artifacts import open_parquet, read_json, scratch_folder
from hermes.console import UserError
from hermes.evaluation.benchmarks import SuiteName
from hermes.hub import is_folder
from hermes.model import llama3
from hermes.model.gguf import UBATCH
from hermes.model.llama3 import Shape
from hermes.pages import published_run
from hermes.settings.base import BaseSettings
from hermes.settings.data import DataSettings
from hermes.settings.evaluate import EvaluateSettings
from hermes.settings.model import ModelSettings
from hermes.settings.quantize import QuantizeSettings
from hermes.settings.reference import ReferenceSettings
from hermes.settings.subset import SubsetSettings
from hermes.settings.tokenize import TokenizeSettings
from hermes.settings.train import TrainSettings
from tools.memory_plan import CONTEXT, SIZES, Lengths, Training, gibibytes, present_gpu, smallest_change
from tools.profiles import check_profile, with_profile

RAW, TOKENS, BASE = Path("data/raw"), Path("data/tokens"), Path("models/base")


class Gpu(NamedTuple):
    """A GPU: bytes of memory as the driver reports it; dense bfloat16 FLOP/s and bytes/s of memory from the maker's data sheet."""

    memory: int
    flops: float
    bandwidth: float


class Work(NamedTuple):
    """A part of a suite: its questions, the choices of each (0 where the answer is written), and the tokens of a prompt and an answer."""

    questions: int
    choices: int
    prompt: int
    answer: int


GPUS = {
    "A40": Gpu(46_068 << 20, 150e12, 696e9),
    "RTX 4090": Gpu(24_564 << 20, 165e12, 1008e9),
    "A100": Gpu(81_920 << 20, 312e12, 1935e9),
    "H100": Gpu(81_559 << 20, 989e12, 3352e9),
}
# Of the dense rate in training and scoring, as seen in training on one H100; of the memory's in generation, an assumption.
EFFICIENCY = 0.3
LAUNCHING = 0.013  # seconds that Python takes to launch a pass through a layer, forward, backward or computed again; seen there too
# From the questions that lm-eval lists; lengths are about, since no data set was here to be counted.
SUITES: dict[SuiteName, tuple[Work, ...]] = {
    "nous": (Work(2_546, 5, 250, 15), Work(20_465, 4, 70, 15), Work(817, 8, 150, 15), Work(13_000, 6, 150, 5)),
    "open_llm_v1": (
        Work(1_172, 4, 1_000, 10),
        Work(10_042, 4, 1_000, 20),
        Work(14_042, 4, 700, 1),
        Work(817, 8, 150, 15),
        Work(1_267, 2, 150, 10),
        Work(1_319, 0, 900, 200),
    ),
    "open_llm_v2": (
        Work(541, 0, 60, 400),
        Work(5_761, 5, 700, 3),
        Work(1_324, 0, 800, 400),
        Work(1_192, 4, 250, 30),
        Work(756, 3, 1_200, 5),
        Work(12_032, 10, 1_200, 1),
    ),
}
HELD_OUT = 914  # pairs of Hermes' test split
DOWNLOAD = 100e6  # bytes/s from the Hub; an assumption
# Weights a second on two CPU cores, as the committed rehearsal did them: merged, written as f16, and quantized to one more type.
MERGED, CONVERTED, QUANTIZED = 8e9 / 120, 8e9 / 130, 8e9 / 320
BITS = {"f16": 16.0, "Q8_0": 8.5, "Q6_K": 6.56, "Q5_K_M": 5.7, "Q4_K_M": 4.9}  # a weight, about
PYTHON = 2 * 2**30  # host memory of a process with torch and CUDA loaded; an assumption


class Params(params.Params):
    """All sections of a profile that shape what it needs."""

    data: DataSettings
    model: ModelSettings
    subset: SubsetSettings
    tokenize: TokenizeSettings
    base: BaseSettings
    reference: ReferenceSettings
    train: TrainSettings
    quantize: QuantizeSettings
    evaluate: EvaluateSettings


@dataclass(frozen=True)
class Need:
    """What a stage needs, in bytes, and its time in seconds."""

    stage: str
    gpu: int
    host: int
    disk: int
    seconds: float


def model_shape(loaded: Params) -> Shape:
    """The shape of the profile's base.

    Raises:
        UserError: it is known neither here nor from the Hub.
    """
    source, revision = loaded.model.source, loaded.model.revision
    manifest = BASE / "manifest.json"
    if manifest.is_file() and read_json(manifest)["source"] == source:
        return Shape.of(AutoConfig.from_pretrained(BASE))
    if source == "embedded":
        return Shape(30, 576, 1536, 9, 3, 64, 49_152, tied=True)
    if is_folder(source):
        return Shape.of(AutoConfig.from_pretrained(source))
    if source == published_run.BASE:
        return llama3.SHAPE
    commit = hub.check_revision(revision, "model.revision", source)
    files = [file for file in hub.list_files(source, commit, "model") if file.path == "config.json"]
    return Shape.of(LlamaConfig.from_json_file(hub.download(source, commit, "model", files) / "config.json"))


def pair_lengths(loaded: Params) -> tuple[Lengths, str]:
    """The lengths of the profile's training pairs, or of a mix like Hermes' where they are not here yet; and where they are from."""
    manifest, tokens = RAW / "manifest.json", TOKENS / "train.parquet"
    if tokens.is_file() and manifest.is_file() and read_json(manifest)["source"] == loaded.data.source:
        with open_parquet(tokens) as file:
            columns = [file.read(columns=[f"{name}_ids"]).column(0) for name in ("prompt", "chosen", "rejected")]
        found = [np.array([len(ids) for ids in column.to_pylist()]) for column in columns]
        return Lengths(*found), f"{tokens}, {len(found[0]):,} pairs"
    random = np.random.default_rng(0)
    drawn = [
        random.lognormal(np.log(mean) - deviation**2 / 2, deviation, loaded.subset.k or 2000).astype(int) + 1
        for mean, deviation in ((119, 0.8), (149, 0.7), (149, 0.7))
    ]
    whole, limit = drawn[0] + np.maximum(drawn[1], drawn[2]), loaded.tokenize.max_length
    if isinstance(limit, float):
        limit = int(np.quantile(whole, limit))
    fits = whole <= limit
    return Lengths(
        *(values[fits] for values in drawn)
    ), f"a mix with the means of Hermes, up to {limit} tokens; assumed"


def evaluation_seconds(loaded: Params, run: Training, gpu: Gpu) -> dict[str, float]:
    """Time of evaluate's held-out pairs, and of each suite, on base, merged and every GGUF; tasks on embedded data are not counted.

    Tokens that are read cost FLOPs, those that are written one pass over the weights a batch. Transformers reads a prompt once for two
    choices, or for all of one token, llama.cpp once for all.
    """
    shape, lengths, e = run.shape, run.lengths, loaded.evaluate
    weights = shape.linear_weights + shape.other_weights
    pairs = Work(HELD_OUT, 2, round(lengths.prompt.mean()), round((lengths.chosen + lengths.rejected).mean() / 2))
    asked: dict[str, tuple[Work, ...]] = {"pairs": (pairs,)} if "preference" in e.tasks else {}
    asked |= {name: SUITES[name] for name in e.suites}

    def seconds(part: Work, file: str) -> float:
        batch, together = (e.batch_size, 2) if file in ("base", "merged") else (e.slots, e.slots)
        prompts = max(1, math.ceil(part.choices / together)) if part.answer > 1 else 1
        read = part.questions * (prompts * part.prompt + part.choices * part.answer)
        written = part.questions * part.answer if part.choices == 0 else 0
        passes = written / batch * weights * BITS.get(file, 16.0) / 8
        return (2 * shape.linear_weights * read / gpu.flops + passes / gpu.bandwidth) / EFFICIENCY

    files = ("base", "merged", *e.types)
    return {name: sum(seconds(part, file) for part in parts for file in files) for name, parts in asked.items()}


def needs(loaded: Params, run: Training, gpu: Gpu) -> list[Need]:
    """What every stage needs on a GPU; fetch_data, subset, tokenize and report take seconds to minutes and megabytes.

    GPU memory: reference as train, without adapter and backward pass. Evaluate is the largest of generation by Transformers (weights in
    16 bits and a key-value cache of `batch_size` times `context`), of llama.cpp (the largest file, a cache for its slots and one more, and
    one to score in, hermes/model/gguf.py), and of the merged model in float32 with a row of logits, against which divergence is measured.
    Host memory: a Python process, the largest matrix twice in float32 where weights are quantized or merged, and what evaluate keeps of
    the float32 model's logits. Disk: DVC links its cache to what is in the folder, so every artifact counts once; fetch_model's two
    copies are the download's and the model's, of which one is left.
    Time on the GPU: FLOPs of the matrix products (2 a weight and token forward, the same again backward to the inputs, and a third time
    where activations are recomputed) at a share of the dense rate, in reference and train at least what Python takes to launch them. Of the
    others: the rehearsal's rates, and an assumed one of the network.
    """
    shape, lengths, s, e = run.shape, run.lengths, SIZES[loaded.base.dtype], loaded.evaluate
    weights = shape.linear_weights + shape.other_weights
    linear, head = 2 * shape.linear_weights, 2 * shape.vocabulary * shape.hidden
    tokens, answers = int(lengths.tokens.sum()), int((lengths.chosen + lengths.rejected).sum())
    forward = tokens * linear + answers * head  # of the training pairs
    held_out = HELD_OUT * forward / len(lengths.prompt)
    largest = 4 * max(shape.vocabulary * shape.hidden, max(a * b for a, b in shape.linear.values()))
    memory = run.memory()
    row, _ = lengths.largest_row(loaded.reference.batch_size)
    reference = (
        memory.weights + memory.constants + memory.workspace + memory.logits + row * shape.hidden * s * 8 + CONTEXT
    )
    passes = 3 if loaded.train.gradient_checkpointing else 2
    cache = 4 * shape.layers * shape.kv_heads * shape.head_size  # bytes a token, keys and values in 16 bits
    logits = int(e.divergence_pairs * 2 * lengths.chosen.mean() * shape.vocabulary * 4)
    generating = 2 * weights + e.batch_size * e.context * cache + CONTEXT
    bits = max(BITS.get(kind, 16.0) for kind in e.types) if e.types else 0.0
    cells = (e.slots + 1) * e.context + max(UBATCH, 2 * e.context)
    llama = round(weights * bits / 8) + cells * cache + CONTEXT if e.types else 0
    exact = 4 * weights + e.context * shape.vocabulary * 4 + CONTEXT if e.divergence_pairs else 0
    files = {kind: round(weights * BITS[kind] / 8) for kind in ("f16", *loaded.quantize.types)}
    speed, train = gpu.flops * EFFICIENCY, loaded.train

    def seconds(passes: float, held_out_passes: float, batch_size: int) -> float:
        """So many passes over the training and the held-out pairs: as long as the GPU computes, or as Python takes to launch it."""
        launched = (passes * len(lengths.prompt) + held_out_passes * HELD_OUT) / batch_size * shape.layers
        return max((passes * forward + held_out_passes * held_out) / speed, launched * LAUNCHING)

    quantized = weights / CONVERTED + len(loaded.quantize.types) * weights / QUANTIZED
    return [
        Need("fetch_model", 0, PYTHON, 2 * weights, 2 * weights / DOWNLOAD),
        Need("reference", reference, PYTHON + 2 * largest, 0, seconds(1, 1, loaded.reference.batch_size)),
        Need(
            "train",
            run.total(),
            PYTHON + 2 * largest,
            3 * memory.adapter,
            seconds(train.epochs * passes, train.evaluations, train.batch_size),
        ),
        Need("merge", 0, PYTHON + 2 * largest, 2 * weights, weights / MERGED),
        Need("quantize", 0, PYTHON + 2 * largest, sum(files.values()), quantized),
        Need(
            "evaluate",
            max(generating, llama, exact),
            PYTHON + logits,
            0,
            sum(evaluation_seconds(loaded, run, gpu).values()),
        ),
    ]


def training_of(loaded: Params) -> tuple[Training, str]:
    """The profile's training run, and where its lengths are from."""
    lengths, source = pair_lengths(loaded)
    return Training(model_shape(loaded), lengths, loaded.base, loaded.train), source


def disk(loaded: Params) -> int:
    """Bytes that all stages of a profile write."""
    return sum(need.disk for need in needs(loaded, training_of(loaded)[0], GPUS["A40"]))


def other_changes(loaded: Params) -> Iterator[tuple[str, dict[str, int]]]:
    """Changes that lower the memory of reference and evaluate, the smallest first: a section, and its new values."""
    for size in halves(loaded.reference.batch_size):
        yield "reference", {"batch_size": size}
    yield "evaluate", {"divergence_pairs": 0}
    e = loaded.evaluate
    for size in halves(max(e.batch_size, e.slots)):
        wanted = {"batch_size": min(e.batch_size, size), "slots": min(e.slots, max(2, size))}
        lower = {key: value for key, value in wanted.items() if value != getattr(e, key)}
        yield "evaluate", lower
        yield "evaluate", {"divergence_pairs": 0} | lower


def halves(number: int) -> list[int]:
    """Half of a number, half of that, and on down to 1."""
    return [number >> i for i in range(1, number.bit_length())]


def refusal(loaded: Params, run: Training, gpu: Gpu) -> str | None:
    """Why the profile cannot run on a GPU, and the smallest change after which it can; None where it can."""
    if (change := smallest_change(run, gpu.memory)) is not None:
        return f"training needs about {gibibytes(run.total())}; smallest change: {change}"
    for need in needs(loaded, run, gpu):
        if need.gpu > gpu.memory:
            for section, values in other_changes(loaded):
                changed = loaded.model_copy(update={section: getattr(loaded, section).model_copy(update=values)})
                if all(other.gpu <= gpu.memory for other in needs(changed, run, gpu) if other.stage == need.stage):
                    text = ", ".join(f"{section}.{key}: {value}" for key, value in values.items())
                    return f"{need.stage} needs about {gibibytes(need.gpu)}; smallest change: {text}"
            return f"{need.stage} needs about {gibibytes(need.gpu)}; a GPU with more memory is needed"
    return None


def report(loaded: Params, run: Training, source: str, name: str, gpu: Gpu) -> str:
    """The tables of a plan."""
    shape, memory, total = run.shape, run.on_gpu(), run.total()
    tokens, answers = run.lengths.largest_row(loaded.train.batch_size)
    lines = [
        f"model: {loaded.model.source}, {(shape.linear_weights + shape.other_weights) / 1e9:.2f} billion weights",
        f"lengths: {source}; largest row of {loaded.train.batch_size} pairs: {tokens:,} tokens, {answers:,} scored",
        f"GPU: {name}, {gibibytes(gpu.memory)} (predicted, until `make gpu-check` has confirmed it)",
        "",
        "training, by component",
    ]
    lines += [f"  {name:<12} {gibibytes(value):>12}" for name, value in vars(memory).items()]
    lines += [
        f"  {'CUDA, lost':<12} {gibibytes(total - memory.total):>12}",
        f"  {'all':<12} {gibibytes(total):>12}",
        "",
    ]
    lines.append(f"{'stage':<12} {'GPU':>12} {'host':>12} {'disk':>12} {'minutes':>9}")
    found = needs(loaded, run, gpu)
    for need in found:
        over = "  does not fit" if need.gpu > gpu.memory else ""
        sizes = "".join(f" {gibibytes(value):>12}" for value in (need.gpu, need.host, need.disk))
        lines.append(f"{need.stage:<12}{sizes} {need.seconds / 60:>9.0f}{over}")
    most, written = gibibytes(max(need.host for need in found)), gibibytes(sum(need.disk for need in found))
    lines.append(f"{'all':<12} {'':>12} {most:>12} {written:>12} {sum(need.seconds for need in found) / 60:>9.0f}")
    lines += ["", "evaluate, minutes for all models together"]
    lines += [f"  {name:<12} {seconds / 60:>12.0f}" for name, seconds in evaluation_seconds(loaded, run, gpu).items()]
    return "\n".join(lines)


def load(profile: str | None) -> Params:
    """The parameters of a profile, the selected one where none is named."""
    if profile is None:
        return params.load(Params)
    check_profile(profile)
    path = scratch_folder("plan") / "params.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(with_profile(params.PARAMS.read_text(), profile))
    return params.load(Params, path)


def plan(profile: str | None, gpu: str | None) -> tuple[str, str | None]:
    """The plan of a profile for a GPU of this name, the one here, or an A40; and why it is refused, if it is.

    Raises:
        UserError: an unknown profile, or a model of unknown shape.
    """
    loaded, here = load(profile), present_gpu()
    if gpu or here is None:
        name = gpu or "A40"
        device = GPUS[name]
    else:
        name, memory = here
        device = next((known for part, known in GPUS.items() if part in name), GPUS["A40"])._replace(memory=memory)
        name += "" if any(part in name for part in GPUS) else ", whose speed is taken to be an A40's"
    run, source = training_of(loaded)
    why = refusal(loaded, run, device)
    return report(loaded, run, source, name, device), why and (
        f"{why} (a prediction for {name}, {gibibytes(device.memory)})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.plan", description="Predict what a run needs.")
    parser.add_argument("--profile", help="of params.yaml; the selected one by default")
    parser.add_argument("--gpu", choices=sorted(GPUS), help="the GPU here by default, or an A40")
    parser.add_argument("--quiet", action="store_true", help="print nothing where it fits")
    given = parser.parse_args()
    try:
        text, why = plan(given.profile, given.gpu)
    except UserError as error:
        sys.exit(f"plan: {error}")
    if not given.quiet:
        print(text)
    if why:
        sys.exit(f"plan: does not fit: {why}")


if __name__ == "__main__":
    main()
