"""Whether a training run fits into a GPU's memory, and the smallest change after which it does.

The components are those of stages/memory.py; what CUDA itself and its allocator's fragments take on top are assumptions, with which plans
were within 4 % of what the driver of one H100 counted (docs/environments.md); `make gpu-check` tries them on another GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stages.console import UserError
from stages.memory import SIZES, Memory, Shape, training_memory

if TYPE_CHECKING:
    from stages.model import BaseSettings
    from stages.train import TrainSettings

GIB = 2**30
Change = dict[str, Any]
CONTEXT = round(0.6 * GIB)  # what CUDA itself takes; an assumption
ORDERS = 100
FRAGMENTS = 0.1  # share of activations, logits and workspace lost between blocks; an assumption


@dataclass(frozen=True)
class Lengths:
    """Tokens of every training pair: (pairs,) of prompts, chosen and rejected answers."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """Tokens of each pair in a row, its prompt once and the last of each answer not at all."""
        return self.prompt + self.chosen + self.rejected - 2

    def largest_row(self, pairs: int) -> tuple[int, int]:
        """(tokens, answer tokens) of the largest row of so many pairs in `ORDERS` random orders: training's own is not known here."""
        random, starts, largest = np.random.default_rng(0), np.arange(0, len(self.prompt), pairs), (0, 0)
        for _ in range(ORDERS):
            order = random.permutation(len(self.prompt))
            tokens = np.add.reduceat(self.tokens[order], starts)
            answers = np.add.reduceat((self.chosen + self.rejected)[order], starts)
            largest = max(largest, (int(tokens.max()), int(answers[tokens.argmax()])))
        return largest


def with_overhead(memory: Memory) -> int:
    """All of a step's memory, in bytes, with what CUDA and fragments take."""
    lost = FRAGMENTS * (memory.activations + memory.logits + memory.workspace)
    return round(memory.total + lost + CONTEXT)


@dataclass(frozen=True)
class Training:
    """What shapes the memory of a training run."""

    shape: Shape
    lengths: Lengths
    base: BaseSettings
    train: TrainSettings

    def memory(self) -> Memory:
        """That of a step by component, in bytes, of a process for itself."""
        return training_memory(self.shape, self.base, self.train, *self.lengths.largest_row(self.train.batch_size))

    def on_gpu(self) -> Memory:
        """What a GPU holds of it: all, or its share under FSDP, which gathers a unit at a time, at most the embedding."""
        whole, n = self.memory(), self.train.processes
        if self.train.distribution != "fsdp":
            return whole
        shared = {
            name: getattr(whole, name) // n for name in ("weights", "constants", "adapter", "gradients", "optimizer")
        }
        gathered = self.shape.vocabulary * self.shape.hidden * SIZES[self.base.dtype]
        return dataclasses.replace(whole, **shared, workspace=whole.workspace + gathered)

    def total(self) -> int:
        """All of it, in bytes, with what CUDA and fragments take; under FSDP at least the whole base, which each loads."""
        whole = self.memory()
        return max(with_overhead(self.on_gpu()), whole.weights + whole.constants + CONTEXT)

    def changed(self, base: Change, train: Change) -> Training:
        """The same run with other values of these parameters."""
        return Training(
            self.shape, self.lengths, self.base.model_copy(update=base), self.train.model_copy(update=train)
        )


def changes(run: Training) -> Iterator[tuple[Change, Change]]:
    """Changes of `base` and `train` that lower the memory and leave the batch of a step as it is, the smallest first."""
    kept: Change = {"keep_dequantized": False} if run.base.keep_dequantized else {}
    checkpointing: Change = {} if run.train.gradient_checkpointing else {"gradient_checkpointing": True}
    if kept:
        yield kept, {}
    if checkpointing:
        yield kept, checkpointing
    size, pairs = run.train.batch_size, run.train.batch_size * run.train.accumulation
    smaller: list[Change] = [
        {"batch_size": n, "accumulation": pairs // n}
        for n in range(size - 1, 0, -1)
        if pairs % (n * run.train.processes) == 0
    ]
    for batch in smaller:
        yield kept, checkpointing | batch
    if run.base.quantization != "nf4":
        for batch in [{}, *smaller]:
            yield {"quantization": "nf4", "keep_dequantized": False}, checkpointing | batch


def smallest_change(run: Training, capacity: int) -> str | None:
    """None where training fits into so many bytes, else the smallest change after which it does, as params.yaml says it."""
    if run.total() <= capacity:
        return None
    for base, train in changes(run):
        if run.changed(base, train).total() <= capacity:
            named = [(f"base.{k}", v) for k, v in base.items()] + [(f"train.{k}", v) for k, v in train.items()]
            return ", ".join(
                f"{key}: {str(value).lower() if value is True or value is False else value}" for key, value in named
            )
    return "no change of batch, checkpointing or quantization is enough; a GPU with more memory is"


def gibibytes(count: float) -> str:
    """Bytes as people read them."""
    return f"{count / GIB:.2f} GiB"


def check_capacity(run: Training, capacity: int, device: str) -> None:
    """Refuses a training run that cannot fit.

    Raises:
        UserError: with what it needs and the smallest change after which it fits.
    """
    if (change := smallest_change(run, capacity)) is not None:
        raise UserError(
            f"params.yaml: training needs about {gibibytes(run.total())} of GPU memory, {device} has {gibibytes(capacity)}; "
            f"smallest change: {change}"
        )


def present_gpu() -> tuple[str, int] | None:
    """Name and bytes of the GPU here."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return found.name, int(found.total_memory)
