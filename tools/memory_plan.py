"""What training needs of a device's memory, by component, from the shape of the model and the parameters alone.

Bytes, for a row of some tokens (all prompts and answers of one forward, hermes/training/shared_prefix.py), of which some are scored. What
CUDA takes for itself and what its allocator loses to fragments come on top, as assumptions. Plans were within 4 % of what the driver of one
H100 counted (docs/hardware-log.md).
"""

from typing import NamedTuple

from hermes.model.llama3 import Shape
from hermes.settings.base import BaseSettings
from hermes.settings.train import TrainSettings
from hermes.training.answer_scores import CHUNK

GIB = 2**30
SIZES = {"bfloat16": 2, "float32": 4}
BLOCK, BLOCKS_TOGETHER = 64, 256  # of nf4, and of its constants when these are quantized too
CONTEXT = round(0.6 * GIB)  # what CUDA itself takes; an assumption
FRAGMENTS = 0.1  # share of activations, logits and workspace lost between blocks; an assumption
READ_ONCE = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # each reads what the other does


class Memory(NamedTuple):
    """Bytes by component."""

    weights: int
    constants: int  # of the quantization
    adapter: int
    gradients: int
    optimizer: int  # both moments of AdamW
    activations: int  # what the backward pass keeps
    logits: int  # of the chunk in which they exist, and what is kept for their gradient
    workspace: int  # the largest matrix, dequantized where that is not kept, and the gradients inside a layer

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(self)


def layer_activations(shape: Shape, base: BaseSettings, train: TrainSettings, tokens: int, cuda: bool) -> int:
    """What the backward pass keeps of one decoder layer, in bytes."""
    s, queries, keys = SIZES[base.dtype], shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    adapted = {name: sizes for name, sizes in shape.linear.items() if train.adapts(name)}
    if train.lora_dropout:  # each adapted matrix keeps its own input, and a mask
        inputs = sum(width * (s + (1 if cuda else s)) for width, _ in adapted.values())
    else:
        inputs = sum({READ_ONCE.get(name, name): width for name, (width, _) in adapted.items()}.values()) * s
    normalizations = (2 * shape.hidden + 2) * 4  # both, in float32
    attention = (queries * (2 if cuda else 1) + 2 * keys) * s  # queries, keys, values; on a GPU what comes out, too
    gated = 3 * shape.intermediate * s  # both projections of the gated unit, and its activation
    ranks = train.lora_rank * s
    factors = ranks * sum(sum(sizes) for sizes in adapted.values())  # the adapter in the base's type
    return tokens * (normalizations + attention + gated + inputs + len(adapted) * ranks) + factors


def training_memory(
    shape: Shape, base: BaseSettings, train: TrainSettings, tokens: int, answers: int, cuda: bool = True
) -> Memory:
    """What a training step needs, in bytes, with `tokens` in its largest row, of which `answers` are scored."""
    s, nf4 = SIZES[base.dtype], base.quantization == "nf4" and not base.keep_dequantized
    blocks = shape.linear_weights // BLOCK
    constants = blocks + blocks // BLOCKS_TOGETHER * 4 if base.double_quantization else blocks * 4
    adapted = sum(sum(sizes) for name, sizes in shape.linear.items() if train.adapts(name))
    adapter = 4 * shape.layers * train.lora_rank * adapted
    layer = layer_activations(shape, base, train, tokens, cuda)
    # with checkpointing the inputs of all layers, and all of one
    kept = shape.layers * tokens * shape.hidden * s + layer if train.gradient_checkpointing else shape.layers * layer
    largest = max(inputs * outputs for inputs, outputs in shape.linear.values())
    return Memory(
        weights=shape.other_weights * s + (shape.linear_weights // 2 if nf4 else shape.linear_weights * s),
        constants=constants if nf4 else 0,
        adapter=adapter,
        gradients=adapter,
        optimizer=2 * adapter,
        activations=kept + tokens * (shape.hidden + 1) * 4,  # and the normalization behind all layers
        logits=min(CHUNK, answers) * shape.vocabulary * (s + 12) + answers * shape.hidden * s,
        workspace=(largest * s if nf4 else 0) + tokens * 2 * (shape.intermediate + shape.hidden) * s,
    )


def on_one_gpu(memory: Memory, shape: Shape, base: BaseSettings, train: TrainSettings) -> Memory:
    """What one GPU holds of it: all, or its share under FSDP, which gathers a unit at a time, at most the embedding."""
    if train.distribution != "fsdp":
        return memory
    sharded = ("weights", "constants", "adapter", "gradients", "optimizer")
    gathered = shape.vocabulary * shape.hidden * SIZES[base.dtype]
    shares = {name: getattr(memory, name) // train.processes for name in sharded}
    return memory._replace(**shares, workspace=memory.workspace + gathered)


def with_overhead(memory: Memory) -> int:
    """All of a step's memory, in bytes, with what CUDA and fragments take."""
    return round(memory.total + FRAGMENTS * (memory.activations + memory.logits + memory.workspace) + CONTEXT)


def gibibytes(count: float) -> str:
    """Bytes as people read them."""
    return f"{count / GIB:.2f} GiB"
