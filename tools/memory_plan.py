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

What CUDA takes for itself and what its allocator loses to fragments come on top, as assumptions. Plans were within 4 % of what the driver
of one H100 counted (docs/hardware-log.md).
"""

import dataclasses
from dataclasses import dataclass

from hermes.model.llama3 import Shape
from hermes.settings.base import BaseSettings
from hermes.settings.train import TrainSettings
from hermes.training.shared_prefix import CHUNK

GIB = 2**30
SIZES = {"bfloat16": 2, "float32": 4}
BLOCK, BLOCKS_TOGETHER = 64, 256  # of nf4, and of its constants when these are quantized too
CONTEXT = round(0.6 * GIB)  # what CUDA itself takes; an assumption
FRAGMENTS = 0.1  # share of activations, logits and workspace lost between blocks; an assumption
READ_ONCE = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # each reads what the other does


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
    s, queries, keys = SIZES[base.dtype], shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    adapted = {name: sizes for name, sizes in shape.linear.items() if name in train.lora_modules}
    if train.lora_dropout:
        inputs = sum(width * (s + (1 if cuda else s)) for width, _ in adapted.values())
    else:
        inputs = sum({READ_ONCE.get(name, name): width for name, (width, _) in adapted.items()}.values()) * s
    attention = (queries * (2 if cuda else 1) + 2 * keys) * s
    token = (2 * shape.hidden + 2) * 4 + attention + 3 * shape.intermediate * s + inputs
    ranks = train.lora_rank * s
    return tokens * (token + len(adapted) * ranks) + ranks * sum(sum(sizes) for sizes in adapted.values())


def training_memory(
    shape: Shape, base: BaseSettings, train: TrainSettings, tokens: int, answers: int, cuda: bool = True
) -> Memory:
    """What a training step needs, in bytes, with `tokens` in its largest row, of which `answers` are scored."""
    s, nf4 = SIZES[base.dtype], base.quantization == "nf4" and not base.keep_dequantized
    blocks = shape.linear_weights // BLOCK
    constants = blocks + blocks // BLOCKS_TOGETHER * 4 if base.double_quantization else blocks * 4
    adapted = sum(sum(sizes) for name, sizes in shape.linear.items() if name in train.lora_modules)
    adapter = 4 * shape.layers * train.lora_rank * adapted
    layer = layer_activations(shape, base, train, tokens, cuda)
    kept = shape.layers * tokens * shape.hidden * s + layer if train.gradient_checkpointing else shape.layers * layer
    largest = max(inputs * outputs for inputs, outputs in shape.linear.values())
    return Memory(
        weights=shape.other_weights * s + (shape.linear_weights // 2 if nf4 else shape.linear_weights * s),
        constants=constants if nf4 else 0,
        adapter=adapter,
        gradients=adapter,
        optimizer=2 * adapter,
        activations=kept + tokens * (shape.hidden + 1) * 4,
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
    return dataclasses.replace(memory, **shares, workspace=memory.workspace + gathered)


def with_overhead(memory: Memory) -> int:
    """All of a step's memory, in bytes, with what CUDA and fragments take."""
    return round(memory.total + FRAGMENTS * (memory.activations + memory.logits + memory.workspace) + CONTEXT)


def gibibytes(count: float) -> str:
    """Bytes as people read them."""
    return f"{count / GIB:.2f} GiB"
