"""The forward of training against the model's own, for every causal architecture of Transformers whose tiny model can be built.

docs/bring-a-model.md has the result as a table, which is what is expected here. Its models are random and small. What makes an
architecture special is on: a window of 8 tokens, soft caps of 2 and 3, a factor of the logits, sinks and biases that matter.
"""

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hermes.training.exactness import Pair, find_forward, own_scores, pair_scores

PAGE = Path(__file__).parent.parent.parent / "docs/bring-a-model.md"
ROW = re.compile(r"^\| (exact and fast|exact and slow|refused)[^|]*\| (.*) \|$", re.MULTILINE)
EXPECTED = {
    name: verdict for verdict, names in ROW.findall(PAGE.read_text()) for name in re.findall(r"`([^`]+)`", names)
}
# Of the families that people tune most.
FAMILIES = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "smollm3",
    "olmo2",
    "granite",
    "cohere",
]
FAMILIES += ["cohere2", "gpt_oss", "mixtral", "bloom", "mamba", "bert"]
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "lru_width"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_key_value_heads", "num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank"), 32),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_head_dim", "kv_lora_rank", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("sliding_window", "attention_window", "attention_chunk_size", "rotary_dim", "state_size"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "mamba_d_state", "mamba_n_heads", "mamba_num_heads"), 8),
    **{"mamba_d_conv": 4, "mamba_expand": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"max_position_embeddings": 256, "n_positions": 256, "vocab_size": 128, "vocab_size_per_layer_input": 128},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"logits_scaling": 8.0, "logit_scale": 0.25, "attention_multiplier": 0.3},
    **{"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
}
PARTICULAR: dict[str, dict[str, Any]] = {
    "hyperclovax": {"logits_scaling": 0.5},  # it multiplies by what others divide by
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},  # it has attention only by default
}
ALWAYS = {"sliding_window", "pad_token_id", "num_key_value_heads", "head_dim"}  # also where the default is none


def small_config(name: str) -> PreTrainedConfig:
    """A configuration of this model type that gives a tiny model."""
    kind = CONFIG_MAPPING[name]
    default = kind()
    known = {*vars(default), *kind.attribute_map}
    values = {k: v for k, v in SMALL.items() if k in known and (k in ALWAYS or getattr(default, k, None) is not None)}
    if "qk_rope_head_dim" in values:  # which is the head's size then
        values.pop("head_dim", None)
    return kind(**values | PARTICULAR.get(name, {}))


def small_model(name: str, **changes: Any) -> PreTrainedModel:
    """A random one in which no weight is without effect; some values of its configuration may be others."""
    transformers.logging.set_verbosity_error()
    config = small_config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            size = weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.2
            is_norm = weight.ndim < 2 and "norm" in key and "bias" not in key
            weight.copy_(torch.randn(weight.shape, generator=generator) * size + is_norm)
    return model


def some_pairs() -> list[Pair]:
    """Three pairs whose prompts have a common beginning; some reach over windows."""
    random.seed(0)

    def ids(count: int) -> list[int]:
        return [random.randrange(3, 128) for _ in range(count)]

    beginning = ids(5)
    return [(beginning + ids(n), ids(c), ids(r)) for n, c, r in ((20, 7, 9), (4, 3, 12), (33, 11, 2))]


def gradients(model: PreTrainedModel, scores: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (scores * torch.linspace(-1, 1, len(scores))).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def check(name: str) -> str:
    """The verdict on a model type; log-probabilities and gradients are those of the model's own forward."""
    model, pairs = small_model(name), some_pairs()
    own, attention = model.forward, model.config._attn_implementation
    try:
        how, _ = find_forward(model, pairs)
    except ValueError:
        return "refused"
    found = {}
    for way in ("ours", "own"):
        if way == "own":
            model.forward = own
            model.set_attn_implementation(attention)
        for weight in model.parameters():
            weight.requires_grad_(True)
        model.get_output_embeddings().requires_grad_(False)
        scores = pair_scores(model, pairs, how) if way == "ours" else own_scores(model, pairs)
        found[way] = (scores.detach(), gradients(model, scores))
    torch.testing.assert_close(found["ours"][0], found["own"][0], atol=1e-5, rtol=0)
    assert found["ours"][1].keys() == found["own"][1].keys()
    largest = max(float(expected.norm()) for expected in found["own"][1].values())
    for key, expected in found["own"][1].items():
        # The bias of a key has no influence, and so a gradient of rounding alone.
        distance = (found["ours"][1][key] - expected).norm() / expected.norm().clamp(min=1e-2 * largest)
        assert distance < 1e-4, f"{key}: {distance:.1g}"
    return "exact and fast" if how.shared else "exact and slow"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_families_that_people_tune(name: str) -> None:
    assert check(name) == EXPECTED[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EXPECTED.keys() - set(FAMILIES)))
def test_every_other_architecture(name: str) -> None:
    assert check(name) == EXPECTED[name]
