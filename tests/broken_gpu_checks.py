"""A plugin for the checks in tests/gpu: it breaks for each what it checks, and interrupts them before the last."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import bitsandbytes
import pytest
import torch
from transformers import PreTrainedModel

from hermes.training import packing


def leak(common: int, start: int, prompt: int, chosen: int, rejected: int, device: torch.device) -> list:
    """Blocks of attention in which the rejected answer sees the chosen one."""
    return packing.causal_blocks((slice(0, common),), slice(start, start + prompt + chosen + rejected), device)


@pytest.fixture(autouse=True)
def broken(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module: Any = request.module

    def changed(name: str, change: Any, where: Any = module) -> None:
        monkeypatch.setattr(where, name, change)

    match request.node.originalname:
        case "test_nf4":
            dequantize = module.dequantize_4bit
            changed("dequantize_4bit", lambda *given: dequantize(*given) * 1.01)
        case "test_bfloat16_forward":
            changed("pair_blocks", leak, packing)
        case "test_attention_kernel":
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                yield
            return
        case "test_cudnn_attention":
            torch.backends.cuda.enable_cudnn_sdp(True)
        case "test_paged_adamw":
            paged = bitsandbytes.optim.PagedAdamW32bit
            changed("PagedAdamW32bit", lambda given, lr, weight_decay: paged(given, lr=lr * 1.01), bitsandbytes.optim)
        case "test_gradient_checkpointing":
            changed("gradient_checkpointing_enable", lambda *given, **named: None, PreTrainedModel)
        case "test_memory":
            predict = module.training_memory
            changed("training_memory", lambda *given: replace(it := predict(*given), activations=it.activations // 2))
        case "test_llama_cpp":
            changed("GgufModel", "no model")
        case "test_training":
            changed("REFERENCE_AND_TRAIN", "raise SystemExit('train: no memory')")
        case "test_resume":
            changed("TRAIN", "pass")
        case "test_two_processes":
            raise KeyboardInterrupt
    yield
