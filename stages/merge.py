"""Stage merge: models/base + models/adapter -> models/merged, sharded safetensors with tokenizer, template and generation config.

Each adapted matrix becomes `W + scaling * B @ A`: the product in float32, then one rounding to W's type. PEFT's merge does the same. W is
the base as it is stored (`base: bf16`), or as the adapter met it in training, quantized to nf4 and dequantized (`base: nf4`). Tensors are
read, merged and written one at a time (hermes/model/safetensors_stream.py); what no adapter touches is copied. Everything beside the
weights is carried over from the base and checked to be equal. One thing is added: generation also ends where the chat template ends an
answer. models/merged/merge.json says how much of the changes the rounding swallowed.
"""

import shutil
from pathlib import Path

from transformers import GenerationConfig

from hermes import params
from hermes.artifacts import MANIFEST, check_together, complete_folder, write_json, write_manifest
from hermes.bits import Bits
from hermes.console import UserError
from hermes.data.chat_text import end_of_answer, rendered
from hermes.model.adapter_merge import Merger
from hermes.model.base import as_computed, check_instructions, load_config
from hermes.model.tokenizer import load_tokenizer
from hermes.run import run_stage
from hermes.settings.base import BaseSettings
from hermes.settings.merge import MergeSettings, parse_size

BASE, ADAPTER, MERGED = Path("models/base"), Path("models/adapter"), Path("models/merged")
PROBE = [{"role": "user", "content": "Hello, world! naïve café 123"}, {"role": "assistant", "content": "Yes."}]
WEIGHTS = {MANIFEST, "model.safetensors.index.json", "merge.json"}


class Params(params.Params):
    """Parameters of merge."""

    bits: Bits
    base: BaseSettings
    merge: MergeSettings


def generation_config(base: Path) -> GenerationConfig:
    """The base's, or where it has none what its config.json says; and it ends an answer also where the chat template ends one."""
    if (base / "generation_config.json").is_file():
        try:
            config = GenerationConfig.from_pretrained(base, local_files_only=True)
        except Exception as error:  # whatever Transformers raises about a damaged one
            raise UserError(
                f"{base}: its generation_config.json cannot be read ({error}); delete it and run `dvc repro`"
            ) from None
    else:
        config = GenerationConfig.from_model_config(load_config(base))
    found, end = config.eos_token_id, end_of_answer(load_tokenizer(base))
    ends = found if isinstance(found, list) else [] if found is None else [found]
    if end not in ends:
        config.eos_token_id = [*ends, end]
    return config


def check_companions(base: Path, merged: Path) -> None:
    """Compares what goes with the weights: chat template, ids of a probe conversation, special tokens, generation config.

    Raises:
        UserError: something differs; names it.
    """
    ours, theirs = map(load_tokenizer, (merged, base))
    probes = [t(rendered(t, PROBE), add_special_tokens=False)["input_ids"] for t in (ours, theirs)]
    written = GenerationConfig.from_pretrained(merged, local_files_only=True).to_dict()
    for name, left, right in (
        ("chat template", ours.chat_template, theirs.chat_template),
        ("ids of a probe conversation", *probes),
        ("special tokens", ours.special_tokens_map, theirs.special_tokens_map),
        ("generation config", written, generation_config(base).to_dict()),
    ):
        if left != right:
            raise UserError(f"{merged}: its {name} differs from that of {base}; delete it and run `dvc repro merge`")


def main() -> None:
    loaded = params.load(Params)
    check_instructions()
    settings, shard = loaded.merge, parse_size(loaded.merge.max_shard_size)
    if settings.base == "nf4" and loaded.base.quantization != "nf4":
        raise UserError("params.yaml: `merge.base: nf4` needs `base.quantization: nf4`, which training would have used")
    made_from = check_together(BASE, ADAPTER)
    with complete_folder(MERGED) as target:
        merger = Merger(BASE, ADAPTER, settings.base, as_computed(loaded.base, loaded.bits))
        merger.write(target, shard)
        write_json(target / "merge.json", {"base": settings.base, **merger.rounding.summary()})
        for path in sorted(BASE.iterdir()):
            if path.suffix != ".safetensors" and path.name not in WEIGHTS:
                shutil.copyfile(path, target / path.name)
        generation_config(BASE).save_pretrained(target)
        check_companions(BASE, target)
        write_manifest(target, made_from=made_from)


if __name__ == "__main__":
    run_stage("merge", main)
