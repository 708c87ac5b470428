"""Stage quantize: models/merged -> models/gguf: a GGUF file for each type, and quantize.json, which describes them.

llama.cpp's own converter writes the f16 GGUF from the safetensors, and llama.cpp itself quantizes it to the smaller types. Converted
fine-tunes have been published with wrong token ids or templates. So what the file says about itself is compared with the tokenizer of the
merged model: token ids, end and padding tokens, pre-tokenizer and chat template. Tensors whose rows do not fit the blocks of a type fall
back to another, which is counted and reported. What happened to the weights is measured apart from what it does to answers.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor, dequantize

from hermes import params
from hermes.artifacts import check_together, complete_folder, sha256_file, write_json, write_manifest
from hermes.console import progress
from hermes.model.gguf_files import check_vocabulary, convert, metadata, quantize
from hermes.model.tokenizer import load_tokenizer
from hermes.run import run_stage
from hermes.settings.quantize import QuantizeSettings

MERGED, OUTPUT = Path("models/merged"), Path("models/gguf")
INTENDED = {"Q5_K_M": {"Q5_K", "Q6_K"}, "Q4_K_M": {"Q4_K", "Q6_K"}, "Q6_K": {"Q6_K"}, "Q8_0": {"Q8_0"}, "f16": {"F16"}}
ROWS_AT_ONCE = 256


class Params(params.Params):
    """Parameters of quantize."""

    quantize: QuantizeSettings


def describe(path: Path, reader: GGUFReader, kind: str) -> dict[str, Any]:
    """Size in bytes, bits per weight, and the tensors by type, of a GGUF file; `fallback` counts those of an unintended type.

    Vectors (norms) stay float32 in every type and are no fallback.
    """
    matrices = [tensor for tensor in reader.tensors if len(tensor.shape) > 1]
    types = Counter(tensor.tensor_type.name for tensor in matrices)
    weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    return {
        "bytes": path.stat().st_size,
        "bits_per_weight": round(8 * sum(int(tensor.n_bytes) for tensor in reader.tensors) / weights, 4),
        "tensors": len(reader.tensors),
        "matrices_by_type": dict(sorted(types.items())),
        "fallback": sum(count for name, count in types.items() if name not in INTENDED[kind]),
        "sha256": sha256_file(path),
    }


def weight_change(file: GGUFReader, source: GGUFReader) -> dict[str, float]:
    """How the matrices of a GGUF file differ from those of the one it was quantized from, over all their weights together.

    `weight_error` is the norm of the difference over the norm of the weights. `weight_stretch` is the part of it that all weights
    share: the least-squares slope of the new weights over the old, less 1; rounding that favours no direction has next to none.
    """
    originals = {tensor.name: tensor for tensor in source.tensors}
    blocks = [
        (tensor, originals[tensor.name], slice(row, row + ROWS_AT_ONCE))
        for tensor in file.tensors
        if len(tensor.shape) > 1
        for row in range(0, len(tensor.data), ROWS_AT_ONCE)
    ]

    def sums(block: tuple[ReaderTensor, ReaderTensor, slice]) -> tuple[float, float, float]:
        tensor, original, rows = block
        old = dequantize(original.data[rows], original.tensor_type).astype(np.float64)
        change = dequantize(tensor.data[rows], tensor.tensor_type) - old
        return float((old**2).sum()), float((change**2).sum()), float((change * old).sum())

    norm = squared = shared = 0.0
    with ThreadPoolExecutor() as pool:
        for a, b, c in pool.map(sums, blocks):
            norm, squared, shared = norm + a, squared + b, shared + c
    return {"weight_error": round((squared / norm) ** 0.5, 6), "weight_stretch": round(shared / norm, 6)}


def main() -> None:
    settings = params.load(Params).quantize
    made_from = check_together(MERGED)
    tokenizer = load_tokenizer(MERGED)
    report: dict[str, Any] = {}
    with complete_folder(OUTPUT) as folder:
        f16 = folder / "f16.gguf"
        convert(MERGED, f16, "f16")
        source = GGUFReader(f16)  # once a file: its vocabulary alone takes seconds
        for kind in progress(("f16", *settings.types), "quantizing", unit="file"):
            path = folder / f"{kind}.gguf"
            if kind != "f16":
                quantize(f16, path, kind)
            reader = source if kind == "f16" else GGUFReader(path)
            check_vocabulary(path, metadata(reader), tokenizer)
            report[kind] = describe(path, reader, kind) | weight_change(reader, source)
        found = metadata(source)
        found.pop("template")
        write_json(folder / "quantize.json", {"files": report, "metadata": found})
        hashes = {f"{kind}.gguf": described["sha256"] for kind, described in report.items()}
        write_manifest(folder, hashes, made_from=made_from)


if __name__ == "__main__":
    run_stage("quantize", main)
