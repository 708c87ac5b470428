"""The shared-prefix forward and its attention on the device: the numbers of separate sequences, by kernels that hold no scores."""

import copy
import re

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from hermes.training.packing import IGNORED, Blocks, pack_pairs
from hermes.training.row_attention import shared_prefix_attention
from hermes.training.shared_prefix import share_prefix
from tests.gpu.projects import (
    ROUNDING,
    SMOLLM2_135M,
    TINY,
    Found,
    error,
    preference_batch,
    random_model,
    random_pairs,
    shape_for,
)

pytestmark = pytest.mark.gpu

KERNEL = re.compile(r"aten::_\w*attention")  # torch's operators that are an attention kernel
FLASH = ("flash_attention", "efficient_attention")


def separate_logps(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities of all answer tokens by a model's own forward, a sequence at a time."""
    found = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = int(mask.sum())
        logps = model(input_ids=ids[None, :length]).logits[0, :-1].float().log_softmax(dim=-1)
        wanted = labels[1:length]
        found.append(logps.gather(1, wanted.clamp(min=0)[:, None])[:, 0][wanted != IGNORED])
    return torch.cat(found)


@torch.no_grad()
def test_bfloat16_forward(device: torch.device, found: Found) -> None:
    """In bfloat16, against separate sequences in float32: no more error than bfloat16's own, twice."""
    shape = shape_for(device, SMOLLM2_135M)
    stock = random_model(shape, device).eval()
    batch = preference_batch(random_pairs(shape, 4, 60, 80, ragged=True), device)
    expected = separate_logps(copy.deepcopy(stock).float(), batch)
    noise = float((separate_logps(stock, batch) - expected).abs().mean())
    stock.requires_grad_(False)
    share_prefix(stock)
    scored = stock(**batch, fused_lm_head=True)
    difference = (scored.log_probs[scored.label_mask] - expected).abs()
    mean, most = float(difference.mean()), float(difference.max())
    found(
        f"off float32 by {mean:.1e} nats a token, {most:.1e} at most; stock bfloat16 by {noise:.1e}",
        mean=mean,
        most=most,
        stock=noise,
    )
    assert mean <= 2 * noise


def test_attention_kernel(device: torch.device, found: Found) -> None:
    """Every block of the packed row goes through a kernel that never holds its scores, and gives the CPU's numbers in float32.

    The prompts have a common beginning, and one pair answers of a single token.
    """
    pairs = random_pairs(TINY, 4, 60, 80, ragged=True)
    beginning = pairs[0]["prompt_ids"][:24]
    pairs = [pair | {"prompt_ids": beginning + pair["prompt_ids"]} for pair in pairs]
    pairs[1] |= {name: pairs[1][name][:1] for name in ("chosen_ids", "rejected_ids")}
    packed, reference = (pack_pairs(**preference_batch(pairs, where)) for where in (device, torch.device("cpu")))
    generator, tokens = torch.Generator().manual_seed(0), packed.input_ids.size(1)
    states = [torch.randn(1, heads, tokens, 64, generator=generator).bfloat16() for heads in (6, 2, 2)]
    q, k, v = (state.to(device).requires_grad_() for state in states)
    with profile(activities=[ProfilerActivity.CPU]) as ran:
        output, _ = shared_prefix_attention(torch.nn.Module(), q, k, v, Blocks(packed.blocks))
    gradients = torch.autograd.grad(output.sum(), [q, k, v])
    exact = [state.float().requires_grad_() for state in states]
    wanted, _ = shared_prefix_attention(torch.nn.Module(), exact[0], exact[1], exact[2], Blocks(reference.blocks))
    exact_gradients = torch.autograd.grad(wanted.sum(), exact)
    worst = max(error(*both) for both in zip((output, *gradients), (wanted, *exact_gradients), strict=True))
    kernels = sorted({event.key for event in ran.key_averages() if KERNEL.match(event.key)})
    blocks = len(packed.blocks)
    found(f"{', '.join(kernels)} for {blocks} blocks, relative error {worst:.1e}", blocks=blocks, error=worst)
    assert kernels
    assert all(any(kind in name for kind in FLASH) for name in kernels)
    assert worst < ROUNDING


def test_cudnn_attention(device: torch.device, found: Found) -> None:
    """It builds a plan for every new length, which doubled the time of a step on an H100, so the stages leave it out."""
    off = not torch.backends.cuda.cudnn_sdp_enabled()
    found(f"cuDNN is {'out of' if off else 'in'} the choice of attention")
    assert off
