"""Stage quantize: models/merged -> models/gguf: a GGUF file for each type, and quantize.json, which describes them.

llama.cpp's own converter writes the f16 GGUF from the safetensors, and llama.cpp itself quantizes it to the smaller types. Converted
fine-tunes have been published with wrong token ids or templates. So what the file says about itself is compared with the tokenizer of the
merged model: token ids, end and padding tokens, pre-tokenizer and chat template. Tensors whose rows do not fit the blocks of a type fall
back to another, which is counted and reported. What happened to the weights is measured apart from what it does to answers.

With `quantize.imatrix` the rounding goes by imatrix.gguf, an importance matrix of training pairs (hermes/model/importance.py), and a file
is what `llama-quantize --imatrix` makes of it. Held-out rows are never looked at.
"""

from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
from gguf import GGUFReader, ReaderTensor, dequantize

from hermes import params
from hermes.artifacts import check_together, complete_folder, sha256_file, write_json, write_manifest
from hermes.console import progress, say
from hermes.data.calibration import TOKENS, calibration_ids
from hermes.model import importance
from hermes.model.gguf_files import check_vocabulary, convert, metadata, quantize, share_divided
from hermes.model.tokenizer import load_tokenizer
from hermes.run import run_stage
from hermes.settings.calibration import CalibrationSettings
from hermes.settings.quantize import Blocks256, QuantizeSettings

MERGED, OUTPUT = Path("models/merged"), Path("models/gguf")
# What llama.cpp gives one matrix of each of the first layers where there is an importance matrix.
BESIDE = {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}
UNWEIGHED = {"F32", "F16", "BF16", "Q8_0"}  # llama.cpp stores them without a look at an importance matrix
ROWS_AT_ONCE = 256


class Params(params.Params):
    """Parameters of quantize."""

    calibration: CalibrationSettings
    quantize: QuantizeSettings


def matrices(reader: GGUFReader) -> list[ReaderTensor]:
    """The tensors of more than one dimension; vectors (norms) stay float32 in every type."""
    return [tensor for tensor in reader.tensors if len(tensor.shape) > 1]


def fallen(reader: GGUFReader, kind: str) -> dict[str, int]:
    """How many matrices are stored in which other type than llama.cpp gives them, since their rows do not fit its blocks.

    Rows that 256 divides fit every type. Others have the file's own type where that has blocks of 32, and what is left in float32 was
    not to be rounded.
    """
    own = {kind.upper(), BESIDE.get(kind), "F32"}
    types = Counter(tensor.tensor_type.name for tensor in matrices(reader) if tensor.shape[0] % 256)
    return {name: count for name, count in sorted(types.items()) if name not in own}


def describe(path: Path, reader: GGUFReader, kind: str, weighed: Collection[str] = ()) -> dict[str, Any]:
    """Size in bytes, bits per weight, and the matrices by type, of a GGUF file; `fallback` counts the `fallen`.

    `weighed` names the tensors whose columns have an importance; `imatrix` says whether one of them was rounded by it.
    """
    weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    types = Counter(tensor.tensor_type.name for tensor in matrices(reader))
    return {
        "bytes": path.stat().st_size,
        "bits_per_weight": round(8 * sum(int(tensor.n_bytes) for tensor in reader.tensors) / weights, 4),
        "tensors": len(reader.tensors),
        "matrices_by_type": dict(sorted(types.items())),
        "fallback": sum(fallen(reader, kind).values()),
        "imatrix": any(t.name in weighed and t.tensor_type.name not in UNWEIGHED for t in reader.tensors),
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
        for tensor in matrices(file)
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


def weigh(f16: Path, source: GGUFReader, pairs: int, target: Path) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Writes the importance matrix of so many training pairs.

    Returns:
        the importance of each tensor's columns, as in the file, and what quantize.json says of it.
    """
    sequences = calibration_ids(pairs)
    importance.write(target, importance.importance(f16, source, sequences), sequences)
    columns = importance.read(target)
    return columns, {"pairs": len(sequences), "tokens": sum(map(len, sequences)), "matrices": len(columns)}


def main() -> None:
    loaded = params.load(Params)
    made_from = check_together(MERGED, TOKENS)
    tokenizer = load_tokenizer(MERGED)
    report: dict[str, Any] = {}
    with complete_folder(OUTPUT) as folder:
        f16 = folder / "f16.gguf"
        convert(MERGED, f16, "f16")
        source = GGUFReader(f16)  # once a file: its vocabulary alone takes seconds
        divided = share_divided(source)
        columns, weighed = None, None
        if loaded.quantize.imatrix:
            columns, weighed = weigh(f16, source, loaded.calibration.pairs, folder / "imatrix.gguf")
        for kind in progress(("f16", *loaded.quantize.named(divided >= 0.5)), "quantizing", unit="file"):
            path = folder / f"{kind}.gguf"
            if kind != "f16":
                quantize(f16, path, kind, importance=columns)
            reader = source if kind == "f16" else GGUFReader(path)
            check_vocabulary(path, metadata(reader), tokenizer)
            report[kind] = describe(path, reader, kind, columns or ()) | weight_change(reader, source)
            if divided < 0.5 and kind in get_args(Blocks256):
                types = ", ".join(f"{count} to {name}" for name, count in fallen(reader, kind).items())
                many = f"{report[kind]['fallback']} of {len(matrices(reader))}"
                say(f"{kind}: {many} matrices fall back, {types}, since 256 does not divide their rows")
        found = metadata(source)
        found.pop("template")
        described = {"files": report, "metadata": found, "importance": weighed, "divides_256": round(divided, 4)}
        write_json(folder / "quantize.json", described)
        hashes = {f"{kind}.gguf": file["sha256"] for kind, file in report.items()}
        write_manifest(folder, hashes, made_from=made_from)


if __name__ == "__main__":
    run_stage("quantize", main)
