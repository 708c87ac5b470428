"""bitsandbytes' paged 32-bit AdamW on the device against torch's."""

import bitsandbytes
import pytest
import torch

from tests.gpu.projects import Found, error
from tools.memory_plan import gibibytes

pytestmark = pytest.mark.gpu


def test_paged_adamw(device: torch.device, found: Found) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(400, 500), torch.randn(20, 400, 500)
    ends, is_paged = [], False
    for kind in (torch.optim.AdamW, bitsandbytes.optim.PagedAdamW32bit):
        parameter = torch.nn.Parameter(start.to(device, copy=True))
        steps = kind([parameter], lr=1e-3, weight_decay=0.1)
        for gradient in gradients:
            parameter.grad = gradient.to(device)
            steps.step()
        ends.append(parameter.detach().cpu())
        is_paged = getattr(steps.state[parameter].get("state1"), "is_paged", False)
    relative = error(ends[1] - start, ends[0] - start)
    paged = "paged" if is_paged else "not paged"
    found(f"moved as torch's AdamW in 20 steps but for {relative:.1e}; its state is {paged}", error=relative)
    assert relative <= 1e-3
    assert is_paged == (device.type == "cuda")


def test_paging(device: torch.device, found: Found) -> None:
    """A step whose optimizer state does not fit: torch's AdamW runs out of memory, the paged one does not."""
    if device.type != "cuda":
        pytest.skip("needs a GPU; on a CPU bitsandbytes falls back to AdamW without pages")
    parameter = torch.nn.Parameter(torch.zeros(2**27, device=device))
    parameter.grad = torch.ones_like(parameter)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(max(0, free - 2**28), dtype=torch.uint8, device=device)
    try:
        torch.optim.AdamW([parameter], lr=1e-3).step()
        overflows = False
    except torch.cuda.OutOfMemoryError:
        overflows = True
    bitsandbytes.optim.PagedAdamW32bit([parameter], lr=1e-3, weight_decay=0.0).step()
    torch.cuda.synchronize()
    del ballast  # what follows needs twice the parameter
    torch.cuda.empty_cache()
    off = float((parameter.detach() + 1e-3).abs().max())
    plain = "overflows" if overflows else "fits"
    found(
        f"1 GiB of state beside {gibibytes(2**28)} free: AdamW {plain}, the paged one steps, off by {off:.1e}",
        error=off,
    )
    assert overflows
    assert off < 1e-6
