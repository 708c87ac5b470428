"""What a run of a profile needs, before anything is loaded: memory, disk and time of every stage, on this CPU or on a GPU.

    python -m tools.plan                               (or: make plan) for the GPU here, or else for this CPU
    python -m tools.plan --profile a40 --gpu "RTX 4090"

The shape of the model comes from models/base if that is the profile's, from what is known of the published base, or from the Hub; lengths
from data/tokens if those are the profile's data, else a mix with the means of such data. Memory of training is computed as
tools/memory_plan.py says, for the largest row of an epoch; evaluation_plan.py and quantization_plan.py have the models' part. All numbers
are predictions: a GPU's until `make gpu-check` has confirmed them on one, a CPU's from the default profile's times on two cores of either
kind.

A run that does not fit is refused, with the smallest change that would: here, and on a GPU by `make repro` and run-stage before they start.
"""

import argparse
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow.compute as pc
import torch
from transformers import AutoConfig

from hermes import hub
from hermes.artifacts import open_parquet, read_object
from hermes.console import UserError, printable, say
from hermes.model import llama3
from hermes.model.gguf import UBATCH
from hermes.model.llama3 import Shape
from hermes.pages import published_run
from hermes.run import run_tool
from hermes.settings import experiment
from hermes.settings.experiment import Profile
from hermes.settings.sources import is_folder
from tools.disk import held, room
from tools.evaluation_plan import ASSUMED, MIXES, evaluation_seconds, held_out, kind
from tools.memory_plan import CONTEXT, GIB, SIZES, Memory, gibibytes, on_one_gpu, training_memory, with_overhead
from tools.quantization_plan import (
    BITS,
    compress_host,
    compress_memory,
    compress_seconds,
    evaluated,
    folder_size,
    gguf_size,
    gguf_types,
    quantize_seconds,
    weights_of,
)

RAW, TOKENS, BASE, SUBSET = Path("data/raw"), Path("data/tokens"), Path("models/base"), Path("reports/subset.json")
KNOWN = {"embedded": Shape(30, 576, 1536, 9, 3, 64, 49_152, tied=True), published_run.BASE: llama3.SHAPE}


class Device(NamedTuple):
    """Bytes of memory, bfloat16 FLOP/s and bytes/s: of a GPU those of its data sheet, of a CPU as training reaches them."""

    memory: int
    flops: float
    bandwidth: float
    evaluating: float = 1.0  # share of the FLOP/s that evaluation reaches
    is_gpu: bool = True

    @property
    def reached(self) -> tuple[float, float]:
        """FLOP/s and bytes/s that computing gets of them."""
        share = EFFICIENCY if self.is_gpu else 1.0
        return self.flops * share, self.bandwidth * share


GPUS = {name: Device(**gpu) for name, gpu in ASSUMED["gpus"].items()}
# Of the dense rate in training and scoring, as seen in training on one H100; of the memory's in generation, an assumption.
EFFICIENCY = 0.3
LAUNCHING = 0.013  # seconds that Python takes to launch a pass through a layer, forward, backward or computed again; seen there too
# FLOP/s of a core in training, and evaluation's share of them, by `bits`: those with which the default profile trained for 17.3 and 24.6
# minutes, and evaluated for 19.6 and 23.0, on two rented cores with AVX-512. On another day these took 0.6 of it. Bytes/s: an assumption.
CORE = {"avx512": (106e9, 0.79), "portable": (75e9, 0.93)}
CORE_BANDWIDTH = 10e9
DOWNLOAD = 100e6  # bytes/s from the Hub; an assumption
STARTING = 10  # seconds in which a stage starts, is hashed and ends; what the short stages of the default profile take
MERGED = 8e9 / 120  # weights a second on two CPU cores, as the committed rehearsal did them
PYTHON = GIB  # of a process with torch, its model apart; with it training's memory on two cores was within 11 % of reports/bench.md
ORDERS = 100


class Lengths(NamedTuple):
    """Tokens of every training pair: (pairs,) of prompts, chosen and rejected answers."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """Tokens of each pair in a row, its prompt once and the last of each answer not at all."""
        return self.prompt + self.chosen + self.rejected - 2

    @property
    def means(self) -> tuple[int, int]:
        """Tokens of a prompt and of an answer in the mean."""
        return round(self.prompt.mean()), round((self.chosen + self.rejected).mean() / 2)

    @property
    def calibrating(self) -> np.ndarray:
        """Tokens of each prompt with its chosen answer."""
        return self.prompt + self.chosen

    def largest_row(self, pairs: int) -> tuple[int, int]:
        """(tokens, answer tokens) of the largest row of so many pairs in `ORDERS` random orders: training's own is not known here."""
        random, starts, largest = np.random.default_rng(0), np.arange(0, len(self.prompt), pairs), (0, 0)
        for _ in range(ORDERS):
            order = random.permutation(len(self.prompt))
            tokens = np.add.reduceat(self.tokens[order], starts)
            answers = np.add.reduceat((self.chosen + self.rejected)[order], starts)
            largest = max(largest, (int(tokens.max()), int(answers[tokens.argmax()])))
        return largest


class Run(NamedTuple):
    """What shapes the needs of a run."""

    settings: Profile
    shape: Shape
    lengths: Lengths


Change = dict[str, dict[str, Any]]  # values of a profile, by section and key


def model_shape(loaded: Profile) -> Shape:
    """The shape of the profile's base; a UserError where neither this checkout, its folder nor the Hub knows it."""
    source, revision = loaded.model.source, loaded.model.revision
    manifest = BASE / "manifest.json"
    if manifest.is_file() and read_object(manifest).get("source") == source:
        try:
            return Shape.of(AutoConfig.from_pretrained(BASE, local_files_only=True, trust_remote_code=False))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{BASE}: says no shape of a Llama-like model ({printable(str(error))}); delete it and run `dvc repro`"
            ) from None
    if source in KNOWN:
        return KNOWN[source]
    if is_folder(source) and not (Path(source) / "config.json").is_file():
        raise UserError(f"{source}/config.json: no such file; `model.source` of params.yaml names this folder")
    try:
        return Shape.of(AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False))
    except Exception as error:  # whatever the libraries raise about the files of others
        if is_folder(source):
            raise UserError(
                f"{source}/config.json: says no shape of a Llama-like model ({printable(str(error))})"
            ) from None
        if not isinstance(error, hub.ERRORS):
            raise
        raise hub.failure(error, source, str(revision)) from None


def pair_lengths(loaded: Profile) -> tuple[Lengths, str]:
    """The lengths of the profile's training pairs, or of a mix where they are not here yet; and where they are from.

    The pairs here may be those of another profile with the same data: they are repeated, or cut, to as many as this one takes.
    """
    manifest, tokens = RAW / "manifest.json", TOKENS / "train.parquet"
    if (
        all(path.is_file() for path in (tokens, manifest, SUBSET))
        and read_object(manifest).get("source") == loaded.data.source
    ):
        with open_parquet(tokens) as file:
            table = file.read(columns=[f"{name}_ids" for name in Lengths._fields])
        try:
            subset = read_object(SUBSET)["train"]
            most = subset["read"] - sum(subset["removed"].values())
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{SUBSET}: does not count the training pairs; run `dvc repro --force subset`") from None
        count = min(loaded.subset.k or most, most)
        found = [np.resize(pc.list_value_length(table[f"{name}_ids"]), count) for name in Lengths._fields]
        return Lengths(*found), f"{tokens}, {count:,} pairs"
    random = np.random.default_rng(0)
    drawn = [
        random.lognormal(np.log(mean) - deviation**2 / 2, deviation, loaded.subset.k or 2000).astype(int) + 1
        for mean, deviation in MIXES[kind(loaded)].lengths
    ]
    whole, limit = drawn[0] + np.maximum(drawn[1], drawn[2]), loaded.tokenize.max_length
    if isinstance(limit, float):
        limit = int(np.quantile(whole, limit))
    source = f"a mix with the means of the {kind(loaded)} pairs, up to {limit} tokens; assumed"
    return Lengths(*(values[whole <= limit] for values in drawn)), source


def seconds_of(run: Run, device: Device) -> dict[str, float]:
    """The time of every stage; the four short ones are one entry.

    Reference and train take the FLOPs of their matrix products at the device's rate. A forward has 2 a weight and token, and a backward as
    many. Where activations are recomputed there is a forward more. On a GPU they take at least what Python needs to launch the products.
    Merge and quantize go by the rehearsal's rates, and the download by an assumed one of the network.
    """
    loaded, shape, lengths = run
    train, pairs, weights = loaded.train, len(lengths.prompt), weights_of(shape)
    flops, bandwidth = device.reached
    calibrating = float(lengths.calibrating.mean())
    answers = (lengths.chosen + lengths.rejected).sum() * shape.vocabulary * shape.hidden
    forward = 2 * float(lengths.tokens.sum() * shape.linear_weights + answers) / pairs

    def computing(asked: float, batch_size: int) -> float:
        """So many pairs forward, or as much backward."""
        launched = asked / batch_size * shape.layers * (LAUNCHING if device.is_gpu else 0)
        return max(asked * forward / flops, launched)

    trained = pairs * train.epochs
    if train.max_steps is not None:
        trained = train.max_steps * train.batch_size * train.accumulation
    passes, validated = 3 if train.gradient_checkpointing else 2, held_out(loaded)
    found = {
        "fetch_model": 0 if is_folder(loaded.model.source) else 2 * weights / DOWNLOAD,
        "reference": computing(pairs + validated, loaded.reference.batch_size),
        "train": computing(passes * trained + train.evaluations * validated, train.batch_size),
        "merge": weights / MERGED,
        "quantize": quantize_seconds(loaded, shape, calibrating, flops * device.evaluating),
        "compress": compress_seconds(loaded, shape, calibrating, flops, bandwidth),
        "evaluate": sum(sum(parts.values()) for parts in evaluating(run, device).values()),
    }
    return {stage: seconds + STARTING for stage, seconds in found.items()} | {"the others": 4 * STARTING}


def evaluating(run: Run, device: Device) -> dict[str, dict[str, float]]:
    """The time of evaluation by model, and by what it is asked."""
    flops, bandwidth = device.reached
    return evaluation_seconds(*run[:2], *run.lengths.means, flops * device.evaluating, bandwidth)


def training_step(run: Run, is_gpu: bool) -> Memory:
    """What the largest step of training needs, by component."""
    loaded, shape, lengths = run
    row = lengths.largest_row(loaded.train.batch_size)
    return on_one_gpu(training_memory(shape, loaded.base, loaded.train, *row, is_gpu), shape, loaded.base, loaded.train)


def memory_of(run: Run, is_gpu: bool) -> dict[str, int]:
    """Bytes that stages need of the memory that they compute in.

    Reference is as train, without adapter and backward pass. Both load the whole base, under FSDP too. Evaluate is the largest of three:

        Transformers  weights in the computing type, and a key-value cache of `batch_size` times `context`
        llama.cpp     the largest file, a cache for its slots and one more, and one to score in (hermes/model/gguf.py)
        divergence    the merged model in float32 with a row of logits

    The forward is tried on a first layer in float32 (hermes/training/exactness.py), before the base is loaded. Evaluate tries two layers
    (hermes/evaluation/oracle.py), with the model beside them.

    The importance matrix takes the f16 file and a cache for its longest pair, and compress what tools/quantization_plan.py says.

    On a CPU three things more lie in the same memory: Python itself, the logits that evaluate keeps, and the largest matrix twice in
    float32, where weights are merged or quantized.
    """
    loaded, shape, lengths = run
    e, step, weights = loaded.evaluate, training_step(run, is_gpu), weights_of(shape)
    base = training_memory(shape, loaded.base, loaded.train, 0, 0)
    row, _ = lengths.largest_row(loaded.reference.batch_size)
    forward = step.workspace + step.logits + row * shape.hidden * SIZES[loaded.base.dtype] * 8
    cache = 4 * shape.layers * shape.kv_heads * shape.head_size  # bytes a token, keys and values in 16 bits
    cells = (e.slots + 1) * e.context + max(UBATCH, 2 * e.context)
    layer = 4 * shape.linear_weights // shape.layers
    tried = 4 * shape.other_weights + layer
    tried += 8 * int(max(lengths.chosen.max(), lengths.rejected.max())) * shape.vocabulary
    size = 2 if is_gpu else SIZES[loaded.base.dtype]
    needed = [size * weights + max(e.batch_size * e.context * cache * size // 2, tried + layer)]
    needed += [gguf_size(kind, shape) + cells * cache for kind in evaluated(loaded, shape) if kind in BITS]
    needed += [4 * weights + e.context * shape.vocabulary * 4] if e.divergence_pairs else []
    kept = base.weights + base.constants
    found = {"reference": max(tried, kept + forward), "train": max(tried, with_overhead(step) - CONTEXT)}
    found["evaluate"] = max(needed)
    longest = int(lengths.calibrating.max())
    found["quantize"] = gguf_size("f16", shape) + longest * cache if loaded.quantize.imatrix else 0
    found["compress"] = compress_memory(loaded, shape, float(lengths.calibrating.mean()), longest, size)
    if is_gpu:
        found["train"] = max(found["train"], kept)
        return {stage: memory + CONTEXT for stage, memory in found.items()}
    found["evaluate"] += int(e.divergence_pairs * 2 * lengths.chosen.mean() * shape.vocabulary * 4)
    found |= {"merge": largest_matrix(shape), "quantize": max(largest_matrix(shape), found["quantize"])}
    return {stage: memory + PYTHON for stage, memory in found.items()}


def largest_matrix(shape: Shape) -> int:
    """Bytes of the largest matrix, twice in float32, as merge and quantize hold it."""
    return 8 * max(shape.vocabulary * shape.hidden, *(inputs * outputs for inputs, outputs in shape.linear.values()))


def host_memory(run: Run) -> int:
    """Bytes of the host's memory that the stages need beside a GPU, merge, quantize and compress the most."""
    passing = compress_host(run.settings, run.shape, float(run.lengths.calibrating.mean()))
    return PYTHON + max(largest_matrix(run.shape), passing)


def disk_of(loaded: Profile, shape: Shape) -> dict[str, int]:
    """Bytes that stages write.

    DVC links its cache to what is in the folder, so every artifact counts once; of fetch_model's two copies, the download's and the
    model's, one is left.
    """
    weights = weights_of(shape)
    files = sum(gguf_size(kind, shape) for kind in ("f16", *gguf_types(loaded, shape)))
    folders = len(loaded.compress.methods) * folder_size(loaded, shape)
    adapter = 3 * training_memory(shape, loaded.base, loaded.train, 0, 0).adapter
    return {"fetch_model": 2 * weights, "train": adapter, "merge": 2 * weights, "quantize": files, "compress": folders}


def run_of(loaded: Profile) -> tuple[Run, str]:
    """What shapes the needs of a profile, and where its lengths are from."""
    lengths, source = pair_lengths(loaded)
    return Run(loaded, model_shape(loaded), lengths), source


def disk(loaded: Profile) -> int:
    """Bytes that all stages of a profile write."""
    return sum(disk_of(loaded, model_shape(loaded)).values())


def changes(loaded: Profile, stage: str) -> Iterator[Change]:
    """Changes that lower the memory of a stage and leave the batch of a step as it is, the smallest first."""
    base, train, e = loaded.base, loaded.train, loaded.evaluate
    if stage == "reference":
        yield from ({"reference": {"batch_size": size}} for size in halves(loaded.reference.batch_size))
    elif stage == "train":
        kept: dict[str, Any] = {"keep_dequantized": False} if base.keep_dequantized else {}
        checkpointing: dict[str, Any] = {} if train.gradient_checkpointing else {"gradient_checkpointing": True}
        pairs = train.batch_size * train.accumulation
        sizes = (n for n in range(train.batch_size - 1, 0, -1) if pairs % (n * train.processes) == 0)
        smaller = [checkpointing | {"batch_size": n, "accumulation": pairs // n} for n in sizes]
        yield from ({"base": kept, "train": other} for other in ({}, checkpointing, *smaller))
        if base.quantization != "nf4":
            kept = {"quantization": "nf4", "keep_dequantized": False}
            yield from ({"base": kept, "train": other} for other in (checkpointing, *smaller))
    elif stage == "quantize":
        yield {"quantize": {"imatrix": False}}
    elif stage == "compress":
        yield from (
            {"compress": {"methods": kept}} for kept in (["awq"], []) if set(kept) < set(loaded.compress.methods)
        )
    else:
        yield {"evaluate": {"divergence_pairs": 0}}
        for size in halves(max(e.batch_size, e.slots)):
            wanted = {"batch_size": min(e.batch_size, size), "slots": min(e.slots, max(2, size))}
            lower = {key: value for key, value in wanted.items() if value != getattr(e, key)}
            yield {"evaluate": lower}
            yield {"evaluate": {"divergence_pairs": 0} | lower}


def halves(number: int) -> list[int]:
    """Half of a number, half of that, and on down to 1."""
    return [number >> i for i in range(1, number.bit_length())]


def changed(run: Run, change: Change) -> Run:
    """The same run with other values in its profile."""
    sections = {name: getattr(run.settings, name).model_copy(update=values) for name, values in change.items()}
    return run._replace(settings=run.settings.model_copy(update=sections))


def smallest_change(run: Run, stage: str, device: Device) -> Change | None:
    """The first of `changes` after which a stage fits."""
    found = changes(run.settings, stage)
    return next((x for x in found if memory_of(changed(run, x), device.is_gpu)[stage] <= device.memory), None)


def refusal(run: Run, device: Device) -> str | None:
    """Why the profile cannot run on a device, and the smallest change after which it can; None where it can."""
    for stage, memory in memory_of(run, device.is_gpu).items():
        if memory > device.memory:
            change = smallest_change(run, stage, device)
            if change is None:
                return f"{stage} needs about {gibibytes(memory)}, and no change of the profile is enough"
            values = [(f"{name}.{key}", value) for name, keys in change.items() for key, value in keys.items()]
            text = ", ".join(f"{key}: {str(value).lower()}" for key, value in values)
            return f"{stage} needs about {gibibytes(memory)}; smallest change: {text}"
    return None


def report(run: Run, source: str, name: str, device: Device, price: float | None = None) -> str:
    """The tables of a plan; its cost too, where an hour has a price, in the price's currency."""
    loaded, shape, lengths = run
    tokens, answers = lengths.largest_row(loaded.train.batch_size)
    memory, disk, seconds = memory_of(run, device.is_gpu), disk_of(loaded, shape), seconds_of(run, device)
    rows = [(stage, memory.get(stage, 0), disk.get(stage, 0), seconds[stage]) for stage in seconds]
    rows.append(("all", max(memory.values()), sum(disk.values()), sum(seconds.values())))

    def size(count: int) -> str:
        return gibibytes(count) if count else ""

    lines = [
        f"model: {loaded.model.source}, {weights_of(shape) / 1e9:.2f} billion weights",
        f"lengths: {source}; largest row of {loaded.train.batch_size} pairs: {tokens:,} tokens, {answers:,} scored",
        f"device: {name}, {gibibytes(device.memory)}; what follows is a prediction",
        "",
        f"{'stage':<12} {'GPU memory' if device.is_gpu else 'memory':>12} {'disk':>12} {'minutes':>9}",
        *(f"{row[0]:<12} {size(row[1]):>12} {size(row[2]):>12} {row[3] / 60:>9,.1f}" for row in rows),
    ]
    if device.is_gpu:
        lines += ["", "train, by component; CUDA and what its allocator loses come on top"]
        lines += [f"  {name:<10} {gibibytes(value):>12}" for name, value in training_step(run, True)._asdict().items()]
        lines += ["", f"memory of the host: {gibibytes(host_memory(run))}"]
    parts = evaluating(run, device)
    asked = list(dict.fromkeys(part for found in parts.values() for part in found))
    units = [("minutes", 60.0, 1)] if price is None else [("minutes", 60.0, 1), ("cost", 3600 / price, 2)]
    for unit, seconds_of_one, digits in units:
        lines += ["", f"{unit} of evaluate, by model; gptq and awq as Transformers unpacks them"]
        lines.append(f"  {'':<10}" + "".join(f" {part:>12}" for part in asked))
        for model, found in parts.items():
            cells = (f"{found[part] / seconds_of_one:,.{digits}f}" if part in found else "not asked" for part in asked)
            lines.append(f"  {model:<10}" + "".join(f" {cell:>12}" for cell in cells))
    if price is not None:
        hours = sum(seconds.values()) / 3600
        lines += ["", f"cost of all: {hours * price:,.2f}, which is {hours:,.1f} hours at {price:,.2f}"]
    return "\n".join(lines)


def load(profile: str | None) -> Profile:
    """The parameters of a profile, the selected one where none is named."""
    return experiment.check(profile=profile).profile


def on_cpu(loaded: Profile, bits: str) -> Profile:
    """The same as a CPU computes it (hermes/bits.py)."""
    dtype = "float32" if bits == "portable" else loaded.base.dtype
    return loaded.model_copy(update={"base": loaded.base.model_copy(update={"dtype": dtype})})


def device_here(threads: int, bits: str) -> tuple[str, Device]:
    """The name of what torch computes on here, and what it can: a GPU, or so many threads of the CPU."""
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        device = next((known for part, known in GPUS.items() if part in found.name), None)
        name = found.name + ("" if device else ", whose speed is taken to be an A40's")
        return name, (device or GPUS["A40"])._replace(memory=int(found.total_memory))
    cores, memory = min(threads, os.cpu_count() or 1), psutil.virtual_memory().total
    flops, evaluating = CORE[bits]
    name = f"CPU, {cores} threads, `bits: {bits}`"
    return name, Device(memory, cores * flops, cores * CORE_BANDWIDTH, evaluating, is_gpu=False)


def plan(profile: str | None, gpu: str | None, price: float | None = None) -> tuple[str, str | None]:
    """The plan of a profile for a GPU of this name, or for what is here; and why it does not fit. Of a CPU only that is said then."""
    whole = experiment.check(profile=profile)
    loaded = whole.profile
    name, device = (gpu, GPUS[gpu]) if gpu else device_here(loaded.base.threads, whole.bits)
    run, source = run_of(loaded if device.is_gpu else on_cpu(loaded, whole.bits))
    why = refusal(run, device)
    if why is None or device.is_gpu:
        return report(
            run, source, name, device, price
        ), why and f"{why} (a prediction for {name}, {gibibytes(device.memory)})"
    return "", f"{why} (a prediction for this {name}, {gibibytes(device.memory)}); GPU=NAME (--gpu) plans for a GPU"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.plan", description="Predict what a run needs.")
    parser.add_argument("--profile", help="of params.yaml; the selected one by default")
    parser.add_argument("--gpu", choices=sorted(GPUS), help="by default the GPU here, or else this CPU")
    parser.add_argument("--price", type=float, help="of an hour of the device, in any currency: what it costs, too")
    parser.add_argument("--quiet", action="store_true", help="print nothing, and refuse only what does not fit a GPU")
    parser.add_argument("--disk", action="store_true", help="refuse a run that the disk has no room for, too")
    given = parser.parse_args()
    if given.quiet and not given.gpu and not torch.cuda.is_available():
        return
    if given.price is not None and not 0 < given.price < math.inf:
        raise UserError(f"PRICE={given.price}: not the price of an hour; write it like 0.40")
    text, why = plan(given.profile, given.gpu, given.price)
    if text and not given.quiet:
        say(*text.split("\n"))
    if given.disk and not why:
        found, mend = room(Path.cwd(), disk(load(given.profile)) - held(Path.cwd()))
        why = mend and f"{found}; {mend}"
    if why:
        raise UserError(f"does not fit: {why}")


if __name__ == "__main__":
    run_tool("plan", main)
