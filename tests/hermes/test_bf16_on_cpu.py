"""bfloat16 products by way of float32 have the numbers of exact ones rounded once, and stand in for torch's only where they are needed."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes.model import bf16_on_cpu

SIZE = st.sampled_from([0, 1, 2, 7, bf16_on_cpu.FEW - 1, bf16_on_cpu.FEW, 33])


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def exact(a: torch.Tensor) -> np.ndarray:
    return a.double().numpy()


def assert_rounded(found: torch.Tensor, wanted: np.ndarray) -> None:
    assert found.dtype == torch.bfloat16
    np.testing.assert_allclose(exact(found), wanted, rtol=2**-7, atol=2e-2)


@settings(deadline=None)
@given(SIZE, SIZE, SIZE, st.booleans())
def test_products_are_exact_ones_rounded(n: int, k: int, m: int, transposed: bool) -> None:
    a, b, c = random(n, k), random(m, k).T if transposed else random(k, m), random(m)
    product = exact(a) @ exact(b)
    assert_rounded(bf16_on_cpu.mm(a, b), product)
    assert_rounded(bf16_on_cpu.bmm(a.expand(2, n, k), b.expand(2, k, m)), np.stack([product, product]))
    total = 0.5 * exact(c) + 2 * product
    assert_rounded(bf16_on_cpu.addmm(c, a, b, beta=0.5, alpha=2.0), total)
    into = c.repeat(n, 1)
    assert bf16_on_cpu.addmm_(into, a, b, beta=0.5, alpha=2.0) is into
    assert_rounded(into, total)


def test_a_sum_is_rounded_at_its_end_alone() -> None:
    a, b = torch.ones(bf16_on_cpu.FEW, 1000).bfloat16(), torch.full((1000, 1), 1 + 2**-7).bfloat16()
    assert (
        bf16_on_cpu.mm(a, b).tolist() == [[1008.0]] * bf16_on_cpu.FEW
    )  # 1007.8125; one rounded all along stays at 256


@pytest.mark.parametrize("rows", [1, bf16_on_cpu.FEW])
def test_other_types_are_as_they_were(rows: int) -> None:
    for dtype in (torch.float32, torch.float64, torch.int64):
        a, b = (10 * random(rows, 4)).to(dtype), (10 * random(4, 5)).to(dtype)
        np.testing.assert_allclose(bf16_on_cpu.mm(a, b).numpy(), a.numpy() @ b.numpy(), rtol=1e-5, atol=1e-4)
        into = torch.zeros(rows, 5, dtype=dtype)
        assert bf16_on_cpu.addmm_(into, a, b) is into
        np.testing.assert_allclose(into.numpy(), a.numpy() @ b.numpy(), rtol=1e-5, atol=1e-4)
    with pytest.raises(RuntimeError, match="dtype"):
        bf16_on_cpu.mm(random(rows, 4), random(4, 5, dtype=torch.float32))


def test_a_cpu_with_bfloat16_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16_on_cpu, "has_bfloat16", lambda: True)
    assert bf16_on_cpu.fit_to_cpu.__wrapped__() is None


PROGRAM = """
import torch, warnings
from hermes.model import bf16_on_cpu
warnings.simplefilter("error")
bf16_on_cpu.has_bfloat16 = lambda: False
called = []
for name in ("mm", "bmm", "addmm", "addmm_"):
    real = getattr(bf16_on_cpu, name)
    def spy(*a, real=real, **k):
        called.append(real.__name__)
        return real(*a, **k)
    spy.__name__ = name
    setattr(bf16_on_cpu, name, spy)
assert bf16_on_cpu.fit_to_cpu() is bf16_on_cpu.fit_to_cpu()
x, w, c = torch.randn(2, 20, 8).bfloat16().requires_grad_(), torch.randn(3, 8).bfloat16(), torch.randn(20, 8).bfloat16()
found = torch.nn.functional.linear(x, w, w[:, 0])
found.sum().backward()
def near(a, b):
    torch.testing.assert_close(a.double(), b.double(), rtol=2**-6, atol=3e-2)
near(found, (x.double()[..., None, :] * w.double()).sum(-1) + w[:, 0].double())
near(x.grad, w.sum(dim=0).expand(2, 20, 8))
near(x @ x.transpose(1, 2), (x.double()[:, :, None] * x.double()[:, None]).sum(-1))
total = c.double() + (found[0].double()[:, :, None] * w.double()).sum(1)
near(torch.addmm(c, found[0], w), total)
near(c.clone().addmm_(found[0], w), total)
print(sorted(set(called)))
"""


def test_a_cpu_without_it_takes_them_forward_and_backward() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['addmm', 'addmm_', 'bmm', 'mm']"
