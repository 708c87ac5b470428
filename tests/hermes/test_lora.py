"""The fused LoRA update against PEFT's own forward: same numbers and gradients in float32, within rounding in bfloat16."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from test_shared_prefix import tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM

from hermes.model.base import load_base
from hermes.settings.base import BaseSettings
from hermes.training.lora import fuse_updates

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(seed: int = 0, rank: int = 4, dropout: float = 0.0, **options: Any) -> PeftModel:
    """A tiny Llama in float32 with an adapter whose B is not zero."""
    config = LoraConfig(r=rank, lora_alpha=3 * rank, lora_dropout=dropout, target_modules=MODULES, **options)
    model = get_peft_model(tiny_llama(seed), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def logits_and_gradients(model: PeftModel, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(1)  # of the dropout
    logits = model(input_ids=ids).logits
    logits.float().square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12))


@settings(max_examples=40, deadline=None)
@example(seed=489, rank=1, rows=1, length=1, dropout=0.0)
@given(
    seed=st.integers(0, 1000), rank=st.integers(1, 9), rows=st.integers(1, 3), length=st.integers(1, 9),
    dropout=st.sampled_from([0.0, 0.3]),
)  # fmt: skip
def test_logits_and_gradients_equal_those_of_peft(seed: int, rank: int, rows: int, length: int, dropout: float) -> None:
    peft = adapted(seed, rank, dropout)
    ours = copy.deepcopy(peft)
    fuse_updates(ours)
    ids = torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(seed))
    (expected, wanted), (found, got) = (logits_and_gradients(model, ids) for model in (peft, ours))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert set(got) == set(wanted)
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    for name, gradient in wanted.items():  # a gradient far below the others is mostly their rounding
        assert (got[name] - gradient).norm() <= 1e-4 * max(float(gradient.norm()), 0.05 * largest), name


def test_in_bfloat16_the_update_is_within_rounding_and_the_gradients_are_float32() -> None:
    peft = adapted(rank=8).to(torch.bfloat16)
    for name, parameter in peft.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    ours = copy.deepcopy(peft)
    fuse_updates(ours)
    ids = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(0))
    (expected, wanted), (found, got) = (logits_and_gradients(model, ids) for model in (peft, ours))
    assert relative_error(found, expected) < 0.03
    for name, gradient in wanted.items():
        assert got[name].dtype == torch.float32 or "lora" not in name
        assert relative_error(got[name], gradient) < 0.1, name


@pytest.mark.parametrize("kept", [False, True])
def test_an_nf4_base_whose_layers_have_biases_is_trained(kept: bool, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(vocab_size=97, num_hidden_layers=2, attention_bias=True, **sizes)
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    settings = BaseSettings(
        quantization="nf4", double_quantization=True, keep_dequantized=kept, dtype="bfloat16", threads=1
    )
    model = get_peft_model(load_base(tmp_path, settings), LoraConfig(r=4, target_modules=MODULES))
    fuse_updates(model)
    _, gradients = logits_and_gradients(model, torch.arange(12).reshape(2, 6))
    assert all(bool(gradient.any()) for name, gradient in gradients.items() if "lora_B" in name)


def test_gradient_checkpointing_changes_no_bit_of_the_gradient() -> None:
    ids = torch.arange(12).reshape(2, 6)
    gradients = []
    for checkpointing in (False, True):
        model = adapted()
        fuse_updates(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        gradients.append(logits_and_gradients(model, ids)[1])
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def test_a_disabled_adapter_changes_no_bit_of_the_base() -> None:
    model, ids = adapted(), torch.arange(8).reshape(1, 8)
    fuse_updates(model)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, tiny_llama()(input_ids=ids).logits)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_what_is_no_plain_lora_is_refused(options: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match=r"q_proj: only plain LoRA"):
        fuse_updates(adapted(**options))


def test_an_adapter_merged_later_is_refused_too() -> None:
    model = adapted()
    fuse_updates(model)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="would add it again"):
        model(input_ids=torch.arange(4).reshape(1, 4))


def test_a_merged_adapter_is_refused() -> None:
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="only plain LoRA"):
        fuse_updates(model)
