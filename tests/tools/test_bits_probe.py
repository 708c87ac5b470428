"""The bits of this CPU are the known ones, and another's would be noticed."""

import subprocess
import sys
from pathlib import Path

import pytest

from hermes import bits
from tools import bits_probe

AMD = "AuthenticAMD" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else False
ROOT = Path(__file__).parents[2]


def probe(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    script = f"import sys; from tools import bits_probe; {before}sys.exit(bits_probe.main())"
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("asked", ["portable", "avx512"])
@pytest.mark.parametrize("threads", [1, 2])
def test_this_cpu_computes_the_known_bits_with_any_number_of_threads(asked: str, threads: int) -> None:
    if not (AMD and bits.can(asked)):
        pytest.skip("the hashes were made on an AMD CPU, and these instructions are needed")
    if asked == "avx512" and threads == 1:
        pytest.skip("with avx512 the number of threads is part of the promise")
    ran = probe("--bits", asked, before=f"bits_probe.THREADS = {threads}; ")
    count = len(bits_probe.KNOWN[asked])
    assert (ran.returncode, ran.stdout) == (0, f"{count} of {count} operations have the known bits\n"), ran.stderr


def test_other_bits_are_named() -> None:
    ran = probe(before="bits_probe.KNOWN['portable'] |= {'optimizer': 'x'}; ")
    assert ran.returncode == 1
    assert "optimizer" in ran.stdout.partition("; not ")[2]


@pytest.mark.skipif(not bits.can("avx512"), reason="a CPU without AVX-512, where torch takes AVX2 anyway")
def test_without_the_variables_a_cpu_with_avx512_computes_otherwise() -> None:
    ran = probe(before="bits_probe.bits.set_variables = lambda chosen: None; ")
    assert ran.returncode == 1
    assert "log-probabilities" in ran.stdout
