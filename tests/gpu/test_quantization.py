"""bitsandbytes' nf4 weights on the device against the formula on the CPU's codes: table[code] times the largest of the block."""

from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, quantize_4bit

from tests.gpu.projects import Found, error

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("double", [False, True], ids=["once", "doubly"])
def test_nf4(double: bool, device: torch.device, found: Found) -> None:
    rows, columns = (4096, 14_336) if device.type == "cuda" else (256, 512)
    torch.manual_seed(0)
    weight = torch.randn(rows, columns).mul_(0.02).bfloat16()
    how: Any = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": double}
    packed, state = quantize_4bit(weight, **how)
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).long()
    largest = dequantize_blockwise(state.absmax, state.state2) + state.offset if double else state.absmax
    expected = (state.code[codes].view(-1, 64) * largest.view(-1, 1)).view(rows, columns).bfloat16()
    there = dequantize_4bit(*quantize_4bit(weight.to(device), **how)).cpu()
    differing, relative = float((there != expected).float().mean()), error(there, expected)
    found(
        f"{differing:.2%} of {rows} x {columns} weights differ from the CPU's, relative error {relative:.1e}",
        differing=differing,
        error=relative,
    )
    assert relative <= 1e-3
