"""The A40 profiles' base without the Hub: its shape, and its tokenizer, Llama-3's own, from the file of the Python package llama-models.

For tests of the text that those profiles train on, and for the rehearsal at full size. The file is under Meta's Llama 3 licence.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama-like model: `hidden` is the width of its residual stream, `intermediate` that of its gated unit.

    Where it is `tied`, the output matrix is the embedding.
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


PACKAGE, FILE = "llama-models", "llama_models/llama3/tokenizer.model"
NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
SPECIAL_TOKENS = 256
SHAPE = Shape(
    layers=32, hidden=4096, intermediate=14_336, heads=32, kv_heads=8, head_size=128, vocabulary=128_256, tied=False
)  # of the 8B model
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ bos_token + message['role'] + '\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant\n' }}{% endif %}"
)  # of the published base, as its notebook shows it


def special_tokens() -> list[str]:
    """The special tokens in the order of their ids, 128,000 and on; those without a use are reserved."""
    reserved = iter(range(SPECIAL_TOKENS))
    return [NAMED.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(SPECIAL_TOKENS)]


def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer as the published base has it: a text begins with the beginning-of-sequence token, and nothing pads."""
    file = Path(str(distribution(PACKAGE).locate_file(FILE)))
    begin, end = NAMED[0], NAMED[1]
    found = TikTokenConverter(str(file), extra_special_tokens=special_tokens()).converted()
    add_begin = TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, 128_000)]
    )
    found.post_processor = Sequence([ByteLevel(trim_offsets=False), add_begin])
    return PreTrainedTokenizerFast(
        tokenizer_object=found,
        bos_token=begin,
        eos_token=end,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def config_of(shape: Shape, **others: Any) -> LlamaConfig:
    """The Transformers configuration of a Llama of this shape."""
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        tie_word_embeddings=shape.tied,
        **others,
    )
