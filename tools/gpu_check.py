"""What a CPU cannot try, tried on the GPU that is here, in about ten minutes.

    python -m tools.gpu_check                  (or: make gpu-check)
    python -m tools.gpu_check --device cpu     the script itself, on tiny models

Each check is a function of a device and a folder of its own that yields `Line`s: pass or fail with its numbers, or skip with the reason.
Models are random and of a known shape, pairs are random and easy to tell apart, and what is compared is the project's own code: its
loading, forward, trainer, stages and predictions. Exit status 1 where anything fails. reports/gpu-check.json is the record of a
GPU to commit; that of a CPU goes to the scratch folder.
"""

import argparse
import copy
import csv
import gc
import math
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import bitsandbytes
import llama_cpp
import pyarrow as pa
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, quantize_4bit
from tokenizers import Tokenizer, models
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast
from trl.trainer.dpo_trainer import DataCollatorForPreference

from hermes import params
from hermes.artifacts import read_json, scratch_folder, write_json, write_parquet
from hermes.console import UserError
from hermes.model import llama3
from hermes.model.base import set_determinism
from hermes.model.gguf import GgufModel
from hermes.model.llama3 import Shape
from hermes.training.shared_prefix import IGNORED, pack_pairs, share_prefix, shared_prefix_attention
from stages import train
from stages.fetch_model import EMBEDDED_FILE, EMBEDDED_PACKAGE
from stages.reference import SCHEMA
from stages.tokenize import schema
from tools.doctor import present_gpu
from tools.dvc_runs import environment
from tools.memory_plan import Memory, gibibytes, layer_activations, training_memory, with_overhead
from tools.profiles import write_params

ROOT = Path(__file__).parent.parent
REPORT = Path("reports/gpu-check.json")
PROFILE = "a40"  # whose settings the checks train with
TINY = Shape(2, 64, 128, 4, 2, 16, 512, tied=True)
SMALL = Shape(4, 256, 704, 8, 2, 32, 1024, tied=False)
SMOLLM2_135M = Shape(30, 576, 1536, 9, 3, 64, 49_152, tied=True)
LLAMA_1B = Shape(16, 2048, 8192, 32, 8, 64, 128_256, tied=True)
LLAMA_8B_GROUP = replace(llama3.SHAPE, layers=4)
STEPS, CHECKPOINT_STEPS = 20, 4
WORDS = 8  # different tokens in all chosen answers together, and as many others in the rejected ones
WITHIN = 0.15  # of a prediction
ROUNDING = 0.02  # relative error that bfloat16 leaves where kernels differ; a wrong mask or block leaves ten times that
KERNEL = re.compile(r"aten::_\w*attention")  # torch's operators that are an attention kernel
FLASH = ("flash_attention", "efficient_attention")


@dataclass(frozen=True)
class Line:
    """What a check found: pass, fail or skip, in words, and the numbers behind them."""

    name: str
    verdict: Literal["pass", "fail", "skip"]
    finding: str
    numbers: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.verdict}  {self.name}: {self.finding}"


Check = Callable[[torch.device, Path], Iterator[Line]]


def judged(name: str, good: bool, finding: str, **numbers: float) -> Line:
    """A line that passes where `good`."""
    return Line(name, "pass" if good else "fail", finding, numbers)


def shape_for(device: torch.device, on_gpu: Shape, on_cpu: Shape = TINY) -> Shape:
    """The shape of a check's model: on the CPU only the script is tried."""
    return on_gpu if device.type == "cuda" else on_cpu


def model_config(shape: Shape) -> LlamaConfig:
    """The configuration of a check's model, whose tokenizer ends and pads with id 1."""
    return llama3.config_of(shape, eos_token_id=1, pad_token_id=1)


def random_model(shape: Shape, device: torch.device) -> PreTrainedModel:
    """A random Llama of this shape in bfloat16, always the same on one kind of device."""
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(model_config(shape), dtype=torch.bfloat16)


def random_pairs(shape: Shape, count: int, prompt: int, answer: int, ragged: bool = False) -> list[dict[str, Any]]:
    """Pairs of random ids of these lengths, or of between half and all of them, whose answers are of different words."""
    generator = torch.Generator().manual_seed(0)

    def ids(first: int, stop: int, length: int) -> list[int]:
        if ragged:
            length = int(torch.randint(length // 2, length + 1, (), generator=generator))
        return torch.randint(first, stop, (length,), generator=generator).tolist()

    return [
        {
            "prompt_ids": ids(2, shape.vocabulary, prompt),
            "chosen_ids": ids(2, 2 + WORDS, answer),
            "rejected_ids": ids(2 + WORDS, 2 + 2 * WORDS, answer),
        }
        for _ in range(count)
    ]


def preference_batch(pairs: list[dict[str, Any]], device: torch.device) -> dict[str, torch.Tensor]:
    """TRL's padded batch of pairs, with labels."""
    batch = DataCollatorForPreference(pad_token_id=0)(pairs)
    batch["labels"] = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, IGNORED)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def make_project(
    folder: Path,
    device: torch.device,
    shape: Shape,
    pairs: list[dict[str, Any]],
    dtype: str = "bfloat16",
    **changes: Any,
) -> None:
    """What training reads, in a folder: random weights, these pairs, a reference of zeros, and the profile with `changes` of `train`.

    It computes in `dtype`.
    """
    base = folder / "models/base"
    random_model(shape, device).save_pretrained(base)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<end>", pad_token="<end>"
    ).save_pretrained(base)
    write_json(base / "manifest.json", {"source": "gpu-check"})
    zeros = [{f"{name}_logps": [0.0] * len(pair[f"{name}_ids"]) for name in ("chosen", "rejected")} for pair in pairs]
    for split in ("train", "validation"):
        write_parquet(folder / f"data/tokens/{split}.parquet", pa.Table.from_pylist(pairs, schema=schema()))
        write_parquet(folder / f"data/reference/{split}.parquet", pa.Table.from_pylist(zeros, schema=SCHEMA))
    shutil.copy(ROOT / params.PIPELINE, folder)
    settings = {"warmup_ratio": 0.0, "accumulation": 1, "evaluations": 0} | changes
    write_params(
        ROOT / params.PARAMS,
        folder / params.PARAMS,
        PROFILE,
        {"base": {"threads": 2, "dtype": dtype}, "train": settings},
    )


def peak_bytes(device: torch.device, work: Callable[[], Any]) -> int:
    """The most memory of the device that tensors made by `work` take together."""
    gc.collect()  # what an earlier model left behind would be freed in the middle
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())), default=0)


def held(tensors: list[torch.Tensor]) -> int:
    """Bytes of the storages behind tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference as a share of the norm of what was expected."""
    found, expected = found.detach().float().cpu(), expected.detach().float().cpu()
    return float((found - expected).norm() / expected.norm())


def nf4(device: torch.device, folder: Path) -> Iterator[Line]:
    """bitsandbytes' nf4 weights on the device against the formula on the CPU's codes: table[code] times the largest of the block."""
    rows, columns = (4096, 14_336) if device.type == "cuda" else (256, 512)
    torch.manual_seed(0)
    weight = torch.randn(rows, columns).mul_(0.02).bfloat16()
    for double in (False, True):
        how: Any = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": double}
        packed, state = quantize_4bit(weight, **how)
        codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).long()
        largest = dequantize_blockwise(state.absmax, state.state2) + state.offset if double else state.absmax
        expected = (state.code[codes].view(-1, 64) * largest.view(-1, 1)).view(rows, columns).bfloat16()
        found = dequantize_4bit(*quantize_4bit(weight.to(device), **how)).cpu()
        differing, relative = float((found != expected).float().mean()), error(found, expected)
        name = "nf4, doubly quantized" if double else "nf4"
        text = f"{differing:.2%} of {rows} x {columns} weights differ from the CPU's, relative error {relative:.1e}"
        yield judged(name, relative <= 1e-3, text, differing=differing, error=relative)


def separate_logps(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities of all answer tokens by a model's own forward, a sequence at a time."""
    found = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = int(mask.sum())
        logps = model(input_ids=ids[None, :length]).logits[0, :-1].float().log_softmax(dim=-1)
        wanted = labels[1:length]
        found.append(logps.gather(1, wanted.clamp(min=0)[:, None])[:, 0][wanted != IGNORED])
    return torch.cat(found)


@torch.no_grad()
def forward(device: torch.device, folder: Path) -> Iterator[Line]:
    """The shared-prefix forward in bfloat16 against separate sequences in float32: no more error than bfloat16's own, twice."""
    shape = shape_for(device, SMOLLM2_135M)
    stock = random_model(shape, device).eval()
    batch = preference_batch(random_pairs(shape, 4, 60, 80, ragged=True), device)
    expected = separate_logps(copy.deepcopy(stock).float(), batch)
    noise = float((separate_logps(stock, batch) - expected).abs().mean())
    stock.requires_grad_(False)
    share_prefix(stock)
    scored = stock(**batch, fused_lm_head=True)
    difference = (scored.log_probs[scored.label_mask] - expected).abs()
    mean, most = float(difference.mean()), float(difference.max())
    text = (
        f"off float32's log-probabilities by {mean:.1e} nats a token, {most:.1e} at most; stock bfloat16 by {noise:.1e}"
    )
    yield judged("bfloat16 forward", mean <= 2 * noise, text, mean=mean, most=most, stock=noise)


def attention(device: torch.device, folder: Path) -> Iterator[Line]:
    """Every block of the packed row goes through a kernel that never holds its scores, and gives the CPU's numbers in float32.

    The prompts have a common beginning, and one pair answers of a single token.
    """
    pairs = random_pairs(TINY, 4, 60, 80, ragged=True)
    beginning = pairs[0]["prompt_ids"][:24]
    pairs = [pair | {"prompt_ids": beginning + pair["prompt_ids"]} for pair in pairs]
    pairs[1] |= {name: pairs[1][name][:1] for name in ("chosen_ids", "rejected_ids")}
    packed, reference = (pack_pairs(**preference_batch(pairs, where)) for where in (device, torch.device("cpu")))
    generator, tokens = torch.Generator().manual_seed(0), packed.input_ids.size(1)
    states = [torch.randn(1, heads, tokens, 64, generator=generator).bfloat16() for heads in (6, 2, 2)]
    q, k, v = (state.to(device).requires_grad_() for state in states)
    with profile(activities=[ProfilerActivity.CPU]) as ran:
        output, _ = shared_prefix_attention(torch.nn.Module(), q, k, v, None, packed.blocks)
    gradients = torch.autograd.grad(output.sum(), [q, k, v])
    exact = [state.float().requires_grad_() for state in states]
    wanted, _ = shared_prefix_attention(torch.nn.Module(), exact[0], exact[1], exact[2], None, reference.blocks)
    exact_gradients = torch.autograd.grad(wanted.sum(), exact)
    worst = max(error(*both) for both in zip((output, *gradients), (wanted, *exact_gradients), strict=True))
    kernels = sorted({event.key for event in ran.key_averages() if KERNEL.match(event.key)})
    good = bool(kernels) and all(any(kind in name for kind in FLASH) for name in kernels)
    text = f"{', '.join(kernels) or 'no attention kernel'} for {len(packed.blocks)} blocks, relative error {worst:.1e}"
    yield judged("attention kernel", good and worst < ROUNDING, text, error=worst)


def optimizer(device: torch.device, folder: Path) -> Iterator[Line]:
    """Twenty steps of paged 32-bit AdamW against torch's."""
    torch.manual_seed(0)
    start, gradients = torch.randn(400, 500), torch.randn(20, 400, 500)
    ends, is_paged = [], False
    for kind in (torch.optim.AdamW, bitsandbytes.optim.PagedAdamW32bit):
        parameter = torch.nn.Parameter(start.to(device, copy=True))
        steps = kind([parameter], lr=1e-3, weight_decay=0.1)
        for gradient in gradients:
            parameter.grad = gradient.to(device)
            steps.step()
        ends.append(parameter.detach().cpu())
        is_paged = getattr(steps.state[parameter].get("state1"), "is_paged", False)
    relative = error(ends[1] - start, ends[0] - start)
    text = f"moved as torch's AdamW but for {relative:.1e}; its state is {'paged' if is_paged else 'not paged'}"
    yield judged("paged AdamW", relative <= 1e-3 and is_paged == (device.type == "cuda"), text, error=relative)


def paging(device: torch.device, folder: Path) -> Iterator[Line]:
    """A step whose optimizer state does not fit: torch's AdamW runs out of memory, the paged one does not."""
    if device.type != "cuda":
        yield Line("paging", "skip", "needs a GPU; on a CPU bitsandbytes falls back to AdamW without pages")
        return
    parameter = torch.nn.Parameter(torch.zeros(2**27, device=device))
    parameter.grad = torch.ones_like(parameter)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(max(0, free - 2**28), dtype=torch.uint8, device=device)
    try:
        torch.optim.AdamW([parameter], lr=1e-3).step()
        overflows = False
    except torch.cuda.OutOfMemoryError:
        overflows = True
    bitsandbytes.optim.PagedAdamW32bit([parameter], lr=1e-3, weight_decay=0.0).step()
    torch.cuda.synchronize()
    del ballast  # what follows needs twice the parameter
    torch.cuda.empty_cache()
    moved = float((parameter.detach() + 1e-3).abs().max())
    text = f"1 GiB of state beside {gibibytes(2**28)} free: AdamW {'overflows' if overflows else 'fits'}, paged steps, off by {moved:.1e}"
    yield judged("paging", overflows and moved < 1e-6, text, error=moved)


def checkpointing(device: torch.device, folder: Path) -> Iterator[Line]:
    """The gradient with and without gradient checkpointing: the same numbers, less memory; masks of dropout that differ would show."""
    shape = shape_for(device, LLAMA_1B, SMALL)
    make_project(folder, device, shape, random_pairs(shape, 4, 120, 150), batch_size=2, gradient_checkpointing=True)
    with chdir(folder):
        trainer = train.build_trainer(
            params.load(train.Params), Path("scratch"), AutoTokenizer.from_pretrained(train.BASE), []
        )
        model, batch = trainer.model.train(), next(iter(trainer.get_train_dataloader()))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        gradients, peaks = [], []
        without, with_it = model.gradient_checkpointing_disable, model.gradient_checkpointing_enable
        for switch in (without, without, with_it):
            switch()
            model.zero_grad()
            torch.manual_seed(0)  # of the dropout
            peaks.append(peak_bytes(device, lambda: trainer.compute_loss(model, batch).backward()))
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    first, again, recomputed = gradients
    noise, relative = error(again, first), error(recomputed, first)
    text = (
        f"off the gradient without it by {relative:.1e}, a second time without it by {noise:.1e}; "
        f"the peak is {gibibytes(peaks[2])} instead of {gibibytes(peaks[1])}"
    )
    good = relative <= (ROUNDING if device.type == "cuda" else 0.0) and peaks[2] < peaks[1]
    yield judged("gradient checkpointing", good, text, error=relative, noise=noise, with_it=peaks[2], without=peaks[1])


def step_peak(shape: Shape, loaded: train.Params, tokens: int, predicted: Memory, cuda: bool) -> int:
    """The most that a step makes and drops, where a plan adds up what comes one after another.

    It is there in the forward's last chunk of logits, or in the backward pass of a layer, which with checkpointing has been computed again.
    """
    checkpointing = loaded.train.gradient_checkpointing
    again = layer_activations(shape, loaded.base, loaded.train, tokens, cuda) if checkpointing else 0
    forward = predicted.activations - again + predicted.logits
    return max(forward, predicted.activations + predicted.workspace)


def measured_memory(
    device: torch.device, folder: Path, shape: Shape, pairs: int, prompt: int, answer: int
) -> Iterator[Line]:
    """Two steps of the profile's training, with AdamW that torch's allocator sees, against tools/memory_plan.py, by component."""
    name = f"memory of {(shape.linear_weights + shape.other_weights) / 1e9:.2g} billion weights"
    is_gpu = device.type == "cuda"
    rows = random_pairs(shape, 2 * pairs, prompt, answer)  # two forwards, so that the second finds gradients
    dtype = "bfloat16" if is_gpu else "float32"  # whose products make no copies on any CPU
    settings: dict[str, Any] = {"batch_size": pairs, "accumulation": 2, "max_steps": 2, "optimizer": "adamw_torch"}
    make_project(folder, device, shape, rows, dtype, **settings)
    with chdir(folder):
        loaded = params.load(train.Params)
        trainer = train.build_trainer(loaded, Path("scratch"), AutoTokenizer.from_pretrained(train.BASE), [])
        parameters = list(trainer.model.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        peak = peak_bytes(device, trainer.train)
    moments: Any = trainer.optimizer.state if trainer.optimizer else {}
    states = [state for p in parameters if (state := getattr(p, "quant_state", None)) is not None]
    found = {
        "weights": held([parameter for parameter in parameters if not parameter.requires_grad]),
        "constants": held([s.absmax for s in states] + [s.state2.absmax for s in states if s.nested]),
        "adapter": held(trained),
        "optimizer": held([t for state in moments.values() for t in state.values() if t.ndim]),
    }
    tokens = pairs * (prompt + 2 * answer - 2)
    predicted = training_memory(shape, loaded.base, loaded.train, tokens, 2 * pairs * answer, is_gpu)
    expected = {key: getattr(predicted, key) for key in found}
    found["the step's own"] = peak - found["optimizer"] - predicted.gradients
    expected["the step's own"] = step_peak(shape, loaded, tokens, predicted, is_gpu)
    for sizes in (found, expected):
        sizes["all"] = sum(sizes.values()) + predicted.gradients
    off = {key: found[key] / expected[key] - 1 for key in found}
    cells = (f"{key} {found[key] / 2**20:,.1f} MiB ({share:+.0%})" for key, share in off.items())
    # What is kept is freed bit by bit as the backward pass goes on, so the step's own may be less.
    good = all(share <= WITHIN and (share >= -WITHIN or key == "the step's own") for key, share in off.items())
    yield judged(name, good, ", ".join(cells), **found)
    if is_gpu:
        yield planned_memory(name, predicted)


def planned_memory(name: str, predicted: Memory) -> Line:
    """What the process takes of the GPU, the context of CUDA and lost blocks included, against what a plan says with all of them."""
    free, total = torch.cuda.mem_get_info()
    planned = with_overhead(predicted)
    used = total - free
    text = f"the driver counts {gibibytes(used)}, the plan says {gibibytes(planned)}"
    return judged(f"plan, {name}", abs(used / planned - 1) <= WITHIN, text, used=used, planned=planned)


def memory(device: torch.device, folder: Path) -> Iterator[Line]:
    """The prediction by component at about a billion weights, and at four layers of the 8B shape where they fit."""
    gpu = device.type == "cuda"
    for number, shape in enumerate([LLAMA_1B, LLAMA_8B_GROUP] if gpu else [SMALL]):
        if gpu and (free := torch.cuda.mem_get_info()[0]) < 12 * 2**30:
            yield Line(f"memory of {shape.layers} layers", "skip", f"{gibibytes(free)} free, 12 GiB wanted")
            continue
        pairs, prompt, answer = (4, 120, 150) if gpu else (1, 60, 40)
        yield from measured_memory(device, folder / str(number), shape, pairs, prompt, answer)


ERRORS = Path("errors.txt")


def start(project: Path, program: str) -> subprocess.Popen[bytes]:
    """Starts a Python program in a project, with this checkout's code; its errors go to a file there, since nobody empties a pipe."""
    with (project / ERRORS).open("wb") as errors:
        return subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=project,
            env=environment() | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )


def finish(process: subprocess.Popen[bytes], project: Path) -> None:
    """Waits for a program that `start` began.

    Raises:
        UserError: it failed; its last line.
    """
    if process.wait():
        errors = (project / ERRORS).read_text(errors="replace").strip().splitlines()
        raise UserError((errors or [f"exit code {process.returncode}"])[-1])


TRAIN = "from stages import train; train.main()"
REFERENCE_AND_TRAIN = "from stages import reference; reference.main(); " + TRAIN


def losses(project: Path) -> list[float]:
    """The preference loss of each step."""
    with (project / train.REPORTS / "history.csv").open() as file:
        return [float(row["preference_loss"]) for row in csv.DictReader(file)]


def judged_training(name: str, project: Path, seconds: float) -> Line:
    """Whether a run started at ln 2 and learned."""
    found = losses(project)
    last = sum(found[-3:]) / 3
    noise = read_json(project / train.REPORTS / "summary.json")["reference_difference"]
    good = len(found) == STEPS and abs(found[0] - math.log(2)) < 5e-3 and last < 0.9 * math.log(2)
    text = f"{len(found)} steps in {seconds:.0f} s, loss {found[0]:.4f} at the first and {last:.4f} at the last three"
    return judged(name, good, text, first=found[0], last=last, seconds=seconds, reference_difference=noise)


def kill_at_a_checkpoint(project: Path, seconds: float = 300.0) -> int:
    """Starts training, kills it as soon as it has a checkpoint; the step of that.

    Raises:
        UserError: it ended before, or has none after so many seconds.
    """
    process, deadline = start(project, TRAIN), time.monotonic() + seconds
    try:
        while not (found := list(project.glob(".scratch/train/*/checkpoint-*/trainer_state.json"))):
            if process.poll() is not None:
                finish(process, project)
                raise UserError("training ended before it could be killed")
            if time.monotonic() > deadline:
                raise UserError(f"training has no checkpoint after {seconds:.0f} s")
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    return int(found[0].parent.name.partition("-")[2])


def training(device: torch.device, folder: Path) -> Iterator[Line]:
    """The stages reference and train, then train again, killed and resumed: the loss begins at ln 2, falls, and repeats."""
    shape = shape_for(device, SMOLLM2_135M)
    changes: dict[str, Any] = {
        "max_steps": STEPS,
        "checkpoint_steps": CHECKPOINT_STEPS,
        "batch_size": 4,
        "learning_rate": 2e-3,
    }
    make_project(folder, device, shape, random_pairs(shape, 40, 20, 30, ragged=True), **changes)
    began = time.monotonic()
    finish(start(folder, REFERENCE_AND_TRAIN), folder)
    yield judged_training("training", folder, time.monotonic() - began)
    whole = losses(folder)
    step = kill_at_a_checkpoint(folder)
    shutil.rmtree(folder / train.REPORTS)
    finish(start(folder, TRAIN), folder)
    again = losses(folder)
    worst = max((abs(a - b) for a, b in zip(whole, again, strict=True)), default=math.inf)
    same = "the same losses" if whole == again else f"losses off by {worst:.1e} at most"
    text = f"killed after step {step}, resumed to {same}"
    yield judged("resume", worst <= (1e-3 if device.type == "cuda" else 0.0), text, step=step, error=worst)


def two_processes(device: torch.device, folder: Path) -> Iterator[Line]:
    """Training in two processes on two GPUs: each with the whole base (DDP), and each with half of it (FSDP)."""
    if (count := torch.cuda.device_count()) < 2:
        yield Line("two processes", "skip", f"needs two GPUs, there are {count}")
        return
    rows = random_pairs(SMOLLM2_135M, 40, 20, 30, ragged=True)
    for distribution in ("ddp", "fsdp"):
        project = folder / distribution
        changes: dict[str, Any] = {"processes": 2, "distribution": distribution, "accumulation": 2, "batch_size": 2}
        make_project(project, device, SMOLLM2_135M, rows, max_steps=STEPS, learning_rate=2e-3, **changes)
        began = time.monotonic()
        finish(start(project, REFERENCE_AND_TRAIN), project)
        yield judged_training(f"two processes, {distribution}", project, time.monotonic() - began)


def llama(device: torch.device, folder: Path) -> Iterator[Line]:
    """llama.cpp is built for the device, puts the embedded model there and writes with it."""
    package = metadata.distribution(EMBEDDED_PACKAGE)
    file = Path(str(package.locate_file(EMBEDDED_PACKAGE.replace("-", "_")))) / EMBEDDED_FILE
    is_gpu = device.type == "cuda"
    before = torch.cuda.mem_get_info()[0] if is_gpu else 0
    with GgufModel(file, threads=2, context=64) as model:
        began = time.monotonic()
        (answer,) = model.generate([model.tokenize("The sky is")], 8)
        seconds = time.monotonic() - began
        used = before - torch.cuda.mem_get_info()[0] if is_gpu else 0
    offloads = llama_cpp.llama_supports_gpu_offload()
    good = bool(answer) and offloads == is_gpu and (not is_gpu or used > file.stat().st_size / 2)
    text = (
        f"a {'GPU' if offloads else 'CPU'} build, {gibibytes(used)} of the GPU, {len(answer)} tokens in {seconds:.2f} s"
    )
    yield judged("llama.cpp", good, text, used=used, seconds=seconds)


CHECKS: tuple[Check, ...] = (
    nf4, forward, attention, optimizer, checkpointing, memory, training, llama, two_processes, paging,
)  # fmt: skip


def run(check: Check, device: torch.device, folder: Path) -> Iterator[Line]:
    """The lines of a check; an error is a line that fails."""
    folder.mkdir(parents=True)
    try:
        yield from check(device, folder)
    except Exception as problem:
        if os.environ.get("HERMES_TRACEBACK"):
            traceback.print_exc()
        yield Line(check.__name__, "fail", f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}")
    finally:
        shutil.rmtree(folder)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def run_all(device: torch.device, scratch: Path, target: Path) -> list[Line]:
    """The lines of all checks, printed as they come.

    The record is written after each check, with the names of those that are left, so that a run cut short leaves what it found.
    """
    found, lines = machine(device), []
    for number, check in enumerate(CHECKS):
        for line in run(check, device, scratch / check.__name__):
            print(line, flush=True)
            lines.append(line)
        left = [other.__name__ for other in CHECKS[number + 1 :]]
        write_json(target, {"machine": found, "lines": [asdict(line) for line in lines], "left": left})
    return lines


def machine(device: torch.device) -> dict[str, str]:
    """What the numbers were found on: GPU, driver, and the versions that matter."""
    packages = ("torch", "bitsandbytes", "llama-cpp-python", "transformers", "trl", "peft", "accelerate")
    found = {"device": device.type, **{name: metadata.version(name) for name in packages}}
    if device.type == "cuda":
        gpu, properties = present_gpu(), torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "memory": gibibytes(properties.total_memory),
            "capability": f"{properties.major}.{properties.minor}",
            "gpus": str(torch.cuda.device_count()),
            "driver": gpu.driver if gpu else "unknown",
            "cuda": str(torch.version.cuda),
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description="Try on a GPU what no CPU can.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    device = torch.device(parser.parse_args().device)
    if device.type == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the stages take a GPU where there is one
    elif not torch.cuda.is_available():
        sys.exit("gpu-check: no CUDA device here; python -m tools.gpu_check --device cpu tries the script itself")
    set_determinism(threads=2)
    scratch = scratch_folder("gpu-check")
    shutil.rmtree(scratch, ignore_errors=True)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    target = REPORT if device.type == "cuda" else scratch / "cpu.json"
    try:
        lines = run_all(device, scratch, target)
    except KeyboardInterrupt:
        sys.exit(f"gpu-check: interrupted; {target} has the checks that were done, if any")
    counts = {verdict: sum(line.verdict == verdict for line in lines) for verdict in ("pass", "fail", "skip")}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + f"; {target}")
    return 1 if counts["fail"] else 0


if __name__ == "__main__":
    sys.exit(main())
