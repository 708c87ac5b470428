"""What training needs of a device's memory, by component, from the shape of the model and the parameters alone.

In bytes, for a row of T tokens (all prompts and answers of one forward, stages/shared_prefix.py) of which A are scored. h is the
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
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.shared_prefix import CHUNK

if TYPE_CHECKING:  # the stage train imports this module
    from stages.model import BaseSettings
    from stages.train import TrainSettings

SIZES = {"bfloat16": 2, "float32": 4}
BLOCK, BLOCKS_TOGETHER = 64, 256  # of nf4, and of its constants when these are quantized too


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama-like model.

    Attributes:
        layers: decoder layers.
        hidden: width of the residual stream.
        intermediate: width of the gated unit.
        heads: query heads.
        kv_heads: key-value heads.
        head_size: width of a head.
        vocabulary: rows of the embedding.
        tied: whether the output matrix is the embedding.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: Any) -> Shape:
        """That of a Transformers configuration."""
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocabulary=config.vocab_size,
            tied=config.tie_word_embeddings,
        )

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear layers of a decoder layer."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def linear_weights(self) -> int:
        """Weights of all linear layers but the output."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear.values())

    @property
    def other_weights(self) -> int:
        """Weights of embedding, output and normalizations."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + (2 * self.layers + 1) * self.hidden


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
