"""llama.cpp is built for the device, puts the embedded model there and writes with it."""

import time
from importlib import metadata
from pathlib import Path

import llama_cpp
import pytest
import torch

from hermes.model.gguf import GgufModel
from stages.fetch_model import EMBEDDED_FILE, EMBEDDED_PACKAGE
from tests.gpu.projects import Found
from tools.memory_plan import gibibytes

pytestmark = pytest.mark.gpu


def test_llama_cpp(device: torch.device, found: Found) -> None:
    package = metadata.distribution(EMBEDDED_PACKAGE)
    file = Path(str(package.locate_file(EMBEDDED_PACKAGE.replace("-", "_")))) / EMBEDDED_FILE
    is_gpu = device.type == "cuda"
    before = torch.cuda.mem_get_info()[0] if is_gpu else 0
    with GgufModel(file, threads=2, context=64) as model:
        began = time.monotonic()
        (answer,) = model.generate([model.tokenize("The sky is")], 8)
        seconds = time.monotonic() - began
        used = before - torch.cuda.mem_get_info()[0] if is_gpu else 0
    build = "GPU" if (offloads := llama_cpp.llama_supports_gpu_offload()) else "CPU"
    found(
        f"a {build} build, {gibibytes(used)} of the GPU, {len(answer)} tokens in {seconds:.2f} s",
        used=used,
        seconds=seconds,
    )
    assert answer
    assert offloads == is_gpu
    assert not is_gpu or used > file.stat().st_size / 2
