"""Which instructions of a CPU compute, so that the CPU itself does not decide the bits of a result.

torch, oneDNN and MKL choose kernels by what a CPU has, and other kernels add in another order. `bits` of params.yaml chooses instead:

    portable    AVX2, which most x86-64 CPUs have since about 2015, and float32, which all of them multiply
    avx512      AVX-512 with products of bfloat16; AMX, which newer CPUs have besides, stays unused

The libraries read variables of the environment when they are loaded, so `choose` comes before them (stages/__init__.py). Afterwards
hermes/model/base.py asks them what they took. llama.cpp is compiled for AVX2 whatever `bits` says (setup.sh). On a GPU `bits` concerns
what its CPU does.
"""

import os
import platform
import re
from functools import cache
from pathlib import Path
from typing import Literal

from hermes.console import UserError
from hermes.params import PARAMS, read_yaml

Bits = Literal["portable", "avx512"]
# The stages whose computing is worth it; the others are portable always. They track `bits`.
CHOOSE = ("reference", "train", "merge", "compress", "evaluate")
# By Intel's guide ("Conditional Numerical Reproducibility") STRICT gives MKL's own products the same bits with any number of threads, too.
# None unsets a variable.
VARIABLES: dict[str, dict[str, str | None]] = {
    "portable": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2,STRICT"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "MKL_CBWR": None},
}
CHOSEN: list[str] = []  # by this process
NEEDED = {"portable": {"avx2", "fma", "f16c", "bmi2"}, "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512_bf16"}}


@cache
def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The instruction sets of this CPU by Linux's names; none on another system or another architecture."""
    found = re.search(r"^flags\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return frozenset(found[1].split() if found else ())


def can(bits: str) -> bool:
    """Whether this CPU has the instructions of a value of `bits`."""
    return platform.machine() in ("x86_64", "AMD64") and cpu_flags() >= NEEDED[bits]


def set_variables(chosen: str) -> None:
    """Sets the variables of a value of `bits` for what this process loads and starts."""
    for name, value in VARIABLES[chosen].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    CHOSEN.append(chosen)


def choose(stage: str) -> None:
    """The same for a stage; what is wrong with params.yaml is told later, when all of it is checked."""
    chosen: object = "portable"
    if stage in CHOOSE:
        try:
            chosen = read_yaml(PARAMS).get("bits")
        except UserError:
            return
    if str(chosen) in VARIABLES:
        set_variables(str(chosen))


def check(bits: str) -> None:
    """Refuses what this CPU cannot do. One without AVX2, of another architecture too, runs with `portable`, and no bits are promised.

    Raises:
        UserError: it lacks the instructions.
    """
    if bits == "avx512" and not can(bits):
        lacking = ", ".join(sorted(NEEDED[bits] - cpu_flags()))
        raise UserError(
            f"params.yaml: `bits: avx512` needs a CPU with {lacking}, which this one lacks; set `bits: portable`"
        )
