"""bfloat16 matrix products on CPUs without instructions for them, by way of float32.

On such a CPU (one without AVX-512, for example) torch multiplies bfloat16 in loops of its own: measured once on two AVX2 cores, 1.2
GFLOP/s in a backward pass, where float32 has 85. There `fit_to_cpu` replaces torch's products: the factors are converted, multiplied in
float32, and the result is rounded once, as the instructions do it, but for the order of a sum. A few rows times a transposed
matrix, as where one answer is written, stay torch's, which then are faster than the conversion. It takes twice the memory of the factors
while it lasts: 2 GiB for the output matrix of an 8B model. On other CPUs nothing changes.
"""

import warnings
from functools import cache

import torch
from torch import Tensor, library

FEW = 16  # rows below which converting a transposed matrix takes longer than torch's product (49,152 x 576, one thread)


def has_bfloat16() -> bool:
    """Whether this CPU's bfloat16 products are fast."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(..., n, k) and (..., k, m) factors, last of all arguments, and what is added to them, as float32 where that is faster.

    Other types stay as they are, and so do several, which torch refuses.
    """
    a, b = tensors[-2:]
    is_faster = a.size(-2) >= FEW or b.stride(-2) != 1
    is_bfloat16 = {x.dtype for x in tensors} == {torch.bfloat16}
    return tuple(x.float() for x in tensors) if is_bfloat16 and is_faster else tensors


# They write into `out`: without it they would call themselves.


def mm(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of (n, k) and (k, m)."""
    x, y = widened(a, b)
    return torch.mm(x, y, out=x.new_empty(x.size(0), y.size(1))).to(a.dtype)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of (batch, n, k) and (batch, k, m)."""
    x, y = widened(a, b)
    return torch.bmm(x, y, out=x.new_empty(x.size(0), x.size(1), y.size(2))).to(a.dtype)


def addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """`beta * c + alpha * a @ b`; c broadcasts to (n, m)."""
    z, x, y = widened(c, a, b)
    out = z.new_empty(x.size(0), y.size(1))
    return torch.addmm(z, x, y, beta=beta, alpha=alpha, out=out).to(a.dtype)


def addmm_(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """The same into (n, m) `c` itself."""
    z, x, y = widened(c, a, b)
    if z is c:
        return torch.addmm(c, a, b, beta=beta, alpha=alpha, out=c)
    return c.copy_(torch.addmm(z, x, y, beta=beta, alpha=alpha, out=z))


@cache
def fit_to_cpu() -> library.Library | None:
    """Puts these in place of torch's for this process, where the CPU has no bfloat16; once, and for good."""
    if has_bfloat16():
        return None
    kernels = library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about the replacement
        for function in (mm, bmm, addmm, addmm_):
            kernels.impl(function.__name__, function, "CPU")
    return kernels
