"""Random models, pairs and projects of known shapes for the checks, and how they measure."""

import gc
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from tokenizers import Tokenizer, models
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast
from trl.trainer.dpo_trainer import DataCollatorForPreference

from hermes import params
from hermes.artifacts import write_manifest, write_parquet
from hermes.model import llama3
from hermes.model.llama3 import Shape
from hermes.training.packing import IGNORED
from stages.reference import SCHEMA
from stages.tokenize import schema
from tools.profiles import write_params

ROOT = Path(__file__).parent.parent.parent
PROFILE = "a40"  # whose settings the checks train with
TINY = Shape(2, 64, 128, 4, 2, 16, 512, tied=True)
SMALL = Shape(4, 256, 704, 8, 2, 32, 1024, tied=False)
SMOLLM2_135M = Shape(30, 576, 1536, 9, 3, 64, 49_152, tied=True)
LLAMA_1B = Shape(16, 2048, 8192, 32, 8, 64, 128_256, tied=True)
LLAMA_8B_GROUP = replace(llama3.SHAPE, layers=4)
WORDS = 8  # different tokens in all chosen answers together, and as many others in the rejected ones
Found = Callable[..., None]  # the fixture `found`: what a check says that it found, in words and numbers
ROUNDING = 0.02  # relative error that bfloat16 leaves where kernels differ; a wrong mask or block leaves ten times that


def shape_for(device: torch.device, on_gpu: Shape, on_cpu: Shape = TINY) -> Shape:
    """The shape of a check's model: on the CPU only the check itself is tried."""
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
    write_manifest(base)
    zeros = [{f"{name}_logps": [0.0] * len(pair[f"{name}_ids"]) for name in ("chosen", "rejected")} for pair in pairs]
    for split in ("train", "validation"):
        write_parquet(folder / f"data/tokens/{split}.parquet", pa.Table.from_pylist(pairs, schema=schema()))
        write_parquet(folder / f"data/reference/{split}.parquet", pa.Table.from_pylist(zeros, schema=SCHEMA))
    write_manifest(folder / "data/tokens")
    write_manifest(folder / "data/reference")
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


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference as a share of the norm of what was expected."""
    found, expected = found.detach().float().cpu(), expected.detach().float().cpu()
    return float((found - expected).norm() / expected.norm())
