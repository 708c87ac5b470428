"""What training needs of a device's memory, by component, from the shape of the model and the parameters alone.

In bytes, for a row of T tokens (all prompts and answers of one forward, hermes/training/shared_prefix.py) of which A are scored. h is the
hidden size, i the intermediate size, q and k the widths of queries and keys, V the vocabulary, L the layers, r the rank of the
adapter, s the bytes of the base's type, P_q the weights of the linear layers but the output, P_o all others:

    weights       P_o * s + P_q / 2 in nf4, else P_q * s
    constants     P_q / 64 * 4 in nf4; doubly quantized P_q / 64 + P_q / 64 / 256 * 4
    adapter       4 * r * (inputs + outputs), of all adapted matrices
    gradients     as the adapter
    optimizer     twice the adapter, both moments of AdamW
    activations   what the backward pass keeps: of L layers, or with checkpointing L * T * h * s and of one layer, each
                      T * (2 * h + 2) * 4        both normalizations, in float32; a third behind all layers
                      T * (q + 2 * k) * s        queries, keys, values; on a GPU T * q * s more, the attention's output
                      T * 3 * i * s              both projections of the gated unit, and its activation
                      T * inputs * s             of the adapted matrices, what several read once; with dropout each keeps
                                                 its own, and a mask
                      T * r * s                  of each adapted matrix
                      r * (inputs + outputs) * s the adapter in the base's type
    logits        128 * V * (s + 12), the chunk in which they exist, and A * h * s for their gradient
    workspace     the largest matrix, dequantized, where the base is in nf4 and not kept dequantized, and the gradients
                  inside a layer, T * (2 * i + 2 * h) * s

The context of CUDA and what its allocator loses to fragments come on top and are no part of it.

`Training` adds what CUDA itself and its allocator's fragments take, as assumptions, says whether a run fits into a GPU and which
smallest change would make it fit. Plans were within 4 % of what the driver of one H100 counted (docs/environments.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hermes.model.llama3 import Shape

if TYPE_CHECKING:
    from hermes.settings.base import BaseSettings
    from hermes.settings.train import TrainSettings

from typing import TYPE_CHECKING

from hermes.training.shared_prefix import CHUNK

if TYPE_CHECKING:  # the stage train imports this module
    from hermes.settings.base import BaseSettings
    from hermes.settings.train import TrainSettings

SIZES = {"bfloat16": 2, "float32": 4}
BLOCK, BLOCKS_TOGETHER = 64, 256  # of nf4, and of its constants when these are quantized too


@dataclass(frozen=True)
class Memory:
    """Bytes by component (module docstring)."""

    weights: int
    constants: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(dataclasses.astuple(self))


def layer_activations(shape: Shape, base: BaseSettings, train: TrainSettings, tokens: int, cuda: bool) -> int:
    """What the backward pass keeps of one decoder layer, in bytes."""
    s, keys = SIZES[base.dtype], shape.kv_heads * shape.head_size
    adapted = {name: sizes for name, sizes in shape.linear.items() if name in train.lora_modules}
    if train.lora_dropout:
        mask = 1 if cuda else s
        inputs = sum(width * (s + mask) for width, _ in adapted.values())
    else:  # those that read the same tensor keep it once
        shared = {
            "q_proj": "attention",
            "k_proj": "attention",
            "v_proj": "attention",
            "gate_proj": "unit",
            "up_proj": "unit",
        }
        inputs = sum({shared.get(name, name): width for name, (width, _) in adapted.items()}.values()) * s
    queries = shape.heads * shape.head_size
    token = (
        (2 * shape.hidden + 2) * 4
        + (queries * (2 if cuda else 1) + 2 * keys) * s
        + 3 * shape.intermediate * s
        + inputs
        + len(adapted) * train.lora_rank * s
    )
    return tokens * token + sum(train.lora_rank * sum(sizes) for sizes in adapted.values()) * s


def training_memory(
    shape: Shape, base: BaseSettings, train: TrainSettings, tokens: int, answers: int, cuda: bool = True
) -> Memory:
    """What a training step needs, in bytes, with `tokens` in its largest row, of which `answers` are scored."""
    s, nf4 = SIZES[base.dtype], base.quantization == "nf4" and not base.keep_dequantized
    blocks = shape.linear_weights // BLOCK
    constants = blocks + blocks // BLOCKS_TOGETHER * 4 if base.double_quantization else blocks * 4
    adapter = (
        4
        * shape.layers
        * sum(train.lora_rank * sum(sizes) for name, sizes in shape.linear.items() if name in train.lora_modules)
    )
    layer = layer_activations(shape, base, train, tokens, cuda)
    kept = shape.layers * tokens * shape.hidden * s + layer if train.gradient_checkpointing else shape.layers * layer
    kept += tokens * (shape.hidden + 1) * 4
    largest = max(inputs * outputs for inputs, outputs in shape.linear.values())
    return Memory(
        weights=shape.other_weights * s + (shape.linear_weights // 2 if nf4 else shape.linear_weights * s),
        constants=constants if nf4 else 0,
        adapter=adapter,
        gradients=adapter,
        optimizer=2 * adapter,
        activations=kept,
        logits=min(CHUNK, answers) * shape.vocabulary * (s + 12) + answers * shape.hidden * s,
        workspace=(largest * s if nf4 else 0) + tokens * 2 * (shape.intermediate + shape.hidden) * s,
    )


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


def present_gpu() -> tuple[str, int] | None:
    """Name and bytes of the GPU here."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return found.name, int(found.total_memory)
