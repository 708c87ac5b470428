"""What bits of a result may depend on: the CPU, its instructions, the GPU, the system, Python and the packages that shape outputs."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

from hermes import bits
from hermes.params import read_yaml
from tools import doctor

PACKAGES = Path(__file__).resolve().parents[1] / "packages.yaml"  # those that shape outputs
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")  # of /proc/cpuinfo: each chooses other kernels


def cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """The CPU's model and those of its instruction sets that choose kernels."""
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return {
        "model": model[1].strip() if model else platform.processor(),
        "flags": [name for name in FLAGS if name in bits.cpu_flags(cpuinfo)],
    }


def facts() -> dict[str, Any]:
    """All of them, as they are in this process."""
    gpu = doctor.present_gpu()
    return {
        "machine": platform.machine(),
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "gpu": None if gpu is None else {"name": gpu.name, "driver": gpu.driver},
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in read_yaml(PACKAGES)},
    }


def installed(package: str) -> str | None:
    """The version of a package that is installed; None where it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def packages() -> dict[str, str]:
    """The version of every package that is installed, by name."""
    return dict(
        sorted(
            {found.metadata["Name"]: found.version for found in distributions()}.items(), key=lambda one: one[0].lower()
        )
    )


def differences(here: dict[str, Any], there: dict[str, Any], prefix: str = "") -> list[str]:
    """What is not the same of two machines' facts, a line each."""
    found = []
    for name in sorted(here.keys() | there.keys()):
        ours, theirs = here.get(name), there.get(name)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            found += differences(ours, theirs, f"{prefix}{name} ")
        elif ours != theirs:
            found.append(f"{prefix}{name}: {shown(ours)} here, {shown(theirs)} there")
    return found


def shown(value: Any) -> str:
    """A value of the facts as a line has it."""
    return ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
