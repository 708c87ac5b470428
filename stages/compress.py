"""Stage compress: models/merged -> models/compressed: a folder of 4-bit weights for each method, and compress.json, which describes them.

GPTQ and AWQ look at what training pairs put into each matrix, prompt and chosen answer in the model's own template, by the ids of
data/tokens; held-out rows are never looked at (hermes/model/compressed.py). Transformers, vLLM and SGLang read the folders. Every folder is
loaded once more, and has to answer a probe near to what its weights answered before they were packed.
"""

from pathlib import Path
from typing import Any

import torch

from hermes import params
from hermes.artifacts import check_together, complete_folder, sha256_file, write_json, write_manifest
from hermes.bits import Bits
from hermes.console import UserError, say
from hermes.data.calibration import TOKENS, calibration_ids
from hermes.model.base import compute_type, load, load_config, release, set_determinism
from hermes.model.compressed import check, compress, group_size, save
from hermes.run import run_stage
from hermes.settings.calibration import CalibrationSettings
from hermes.settings.compress import CompressSettings, Method

MERGED, OUTPUT = Path("models/merged"), Path("models/compressed")
APART = 0.05  # of the logits' norm; packing rounds the scales to 16 bits


class Params(params.Params):
    """Parameters of compress."""

    bits: Bits
    calibration: CalibrationSettings
    compress: CompressSettings


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    """The logits of one sequence, (tokens, vocabulary) in float32 on the CPU."""
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([ids], device=model.device)).logits[0]
    return logits.float().cpu()


def make(
    folder: Path, method: Method, settings: CompressSettings, sequences: list[list[int]], dtype: torch.dtype
) -> dict[str, Any]:
    """Makes the folder of one method; what compress.json says of it.

    Raises:
        UserError: the model cannot be rounded so, or what was written reads otherwise.
    """
    model = load(MERGED, dtype)
    size, stored = (
        group_size(model, settings.group_size),
        getattr(torch, str(load_config(MERGED).dtype).removeprefix("torch.")),
    )
    compress(model, method, sequences, size)
    expected = logits_of(model, sequences[0])
    save(model, MERGED, folder, stored)
    del model
    release()
    written = load(folder, dtype)
    apart = float((logits_of(written, sequences[0]) - expected).norm() / expected.norm())
    if not apart < APART:
        raise UserError(f"{method}: what was written does not answer as what was packed: logits are {apart:.1%} apart")
    weights = sum(parameter.numel() for parameter in written.parameters())
    del written
    release()
    files = sorted(folder.glob("*.safetensors"))
    held = sum(path.stat().st_size for path in files)
    return {
        "bytes": held,
        "bits_per_weight": round(8 * held / weights, 4),
        "group_size": size,
        "pairs": len(sequences),
        "tokens": sum(map(len, sequences)),
        "sha256": {path.name: sha256_file(path) for path in files},
    }


def main() -> None:
    loaded = params.load(Params)
    settings, dtype = loaded.compress, compute_type(loaded.bits)
    made_from = check_together(MERGED, TOKENS)
    set_determinism(settings.threads)
    report: dict[str, Any] = {}
    with complete_folder(OUTPUT) as target:
        if settings.methods:
            model = load(MERGED, torch.bfloat16)
            check(model, settings.methods)
            group_size(model, settings.group_size)
            del model
            release()
        for method in settings.methods:
            pairs = loaded.calibration.pairs if method == "gptq" else settings.awq_pairs
            sequences = calibration_ids(pairs)
            say(f"compress: {method} on {len(sequences)} pairs, {sum(map(len, sequences)):,} tokens")
            report[method] = make(target / method, method, settings, sequences, dtype)
        write_json(target / "compress.json", {"files": report})
        write_manifest(target, made_from=made_from)


if __name__ == "__main__":
    run_stage("compress", main)
