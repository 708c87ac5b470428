"""Does this CPU compute the bits that others do? A few seconds of what training is made of, against hashes that are known.

    python -m tools.bits_probe            (make doctor runs it)

The operations are those of a training step on small random numbers, with the instructions that `bits` of params.yaml names. The hashes
were made on one AMD CPU with AVX-512. Exit code 0: all are the same; 1: some are not, and `make verify` says how far results are apart.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator
from typing import get_args

from hermes import bits
from hermes.console import say

THREADS = 2
KNOWN = {
    "portable": {
        "product of 131 x 576 x 1536": "75e35cdf413e",
        "product of 131 x 1536 x 576": "c191c2aca3aa",
        "product of 37 x 576 x 16": "ae378c9e61e6",
        "product of 16 x 576 x 4096": "cb60cc83ab34",
        "product of 1 x 576 x 1536": "739e33e5b48f",
        "attention": "ce34bffe80d9",
        "products in a batch": "8f9a31f7ecf5",
        "gated activation": "66631c3b08bb",
        "normalization": "63eb1a042623",
        "log-probabilities": "bc695a486ed0",
        "optimizer": "13be666969e4",
    },
    "avx512": {
        "product of 131 x 576 x 1536": "43133746ae44",
        "product of 131 x 1536 x 576": "0eaf2f786ad2",
        "product of 37 x 576 x 16": "4f9f332499ca",
        "product of 16 x 576 x 4096": "0131d28bda69",
        "product of 1 x 576 x 1536": "4a9aa13e0083",
        "attention": "008e3aaef14b",
        "products in a batch": "749afaa0e4eb",
        "gated activation": "b92ad1bbed53",
        "normalization": "c19433613829",
        "log-probabilities": "48579d7498c6",
        "optimizer": "13be666969e4",
    },
}


def computed(dtype_name: str) -> Iterator[tuple[str, str]]:
    """The name and the hash of each operation's result and gradients in this type."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(THREADS)
    dtype = getattr(torch, dtype_name)
    random = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(dtype).requires_grad_()

    def hashed(result: torch.Tensor, *inputs: torch.Tensor) -> str:
        result.sum().backward()
        digest = hashlib.md5()
        for tensor in (result, *(x.grad for x in inputs if x.grad is not None)):
            digest.update(tensor.detach().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    for rows, inner, columns in ((131, 576, 1536), (131, 1536, 576), (37, 576, 16), (16, 576, 4096), (1, 576, 1536)):
        a, b = numbers(rows, inner), numbers(columns, inner)
        yield f"product of {rows} x {inner} x {columns}", hashed((a @ b.T).square(), a, b)
    q, k, v = numbers(1, 9, 120, 64), numbers(1, 9, 120, 64), numbers(1, 9, 120, 64)
    yield "attention", hashed(functional.scaled_dot_product_attention(q, k, v, is_causal=True).square(), q, k, v)
    a, b = numbers(9, 120, 64), numbers(9, 64, 120)
    yield "products in a batch", hashed((a @ b).softmax(dim=-1).square(), a, b)
    x, y = numbers(131, 1536), numbers(131, 1536)
    yield "gated activation", hashed(functional.silu(x) * y, x, y)
    x, y = numbers(131, 576), numbers(576)
    yield "normalization", hashed(functional.rms_norm(x, (576,), y, 1e-5).square(), x, y)
    x = numbers(131, 576)
    yield "log-probabilities", hashed(x.float().log_softmax(dim=-1)[:, 7] * x.float().cos().mean(dim=-1), x)
    x = torch.nn.Parameter(torch.randn(64, 577, generator=random))
    optimizer = torch.optim.AdamW([x], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        x.square().mean().backward()
        torch.nn.utils.clip_grad_norm_([x], 0.01)
        optimizer.step()
    yield "optimizer", hashed(x.detach().requires_grad_())


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bits_probe", description="Compare this CPU's bits with known ones."
    )
    parser.add_argument("--bits", choices=get_args(bits.Bits), default="portable")
    parser.add_argument("--print", action="store_true", help="print the hashes of this CPU as Python")
    given = parser.parse_args()
    bits.set_variables(given.bits)
    found = dict(computed("float32" if given.bits == "portable" else "bfloat16"))
    if given.print:
        say(found)
        return 0
    other = [name for name, hashed in found.items() if KNOWN[given.bits].get(name) != hashed]
    say(
        f"{len(found) - len(other)} of {len(found)} operations have the known bits"
        + (f"; not {', '.join(other)}" if other else "")
    )
    return int(bool(other))


if __name__ == "__main__":
    sys.exit(main())
