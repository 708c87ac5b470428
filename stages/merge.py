"""Stage merge: models/base + models/adapter -> models/merged, sharded safetensors with tokenizer, template and generation config.

PEFT adds the adapter to the bfloat16 base that it was trained against in 4 bits; merging into 4-bit weights would round it away.
Everything beside the weights is carried over from the base and checked to be equal.
"""

import shutil
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoTokenizer, GenerationConfig

from stages import params
from stages.artifacts import complete_folder, read_json, sha256_file
from stages.console import UserError, run_stage
from stages.model import load

BASE, ADAPTER, MERGED = Path("models/base"), Path("models/adapter"), Path("models/merged")
PROBE = [{"role": "user", "content": "Hello, world! naïve café 123"}, {"role": "assistant", "content": "Yes."}]


class MergeSettings(params.Settings):
    """How the merged weights are stored."""

    max_shard_size: str


class Params(params.Params):
    """Parameters of merge."""

    merge: MergeSettings


def check_adapter_fits(adapter: Path, base: Path) -> None:
    """Refuses an adapter that was trained on another base.

    Raises:
        UserError: the base named by the adapter is not this one.
    """
    trained_on, found = (
        read_json(adapter / "adapter_config.json")["base_model_name_or_path"],
        f"sha256:{sha256_file(base / 'manifest.json')}",
    )
    if trained_on != found:
        raise UserError(
            f"{adapter}: was trained on base {trained_on[:19]}…, {base} is {found[:19]}…; run `dvc repro train`"
        )


def check_companions(base: Path, merged: Path) -> None:
    """Compares what goes with the weights: chat template, ids of a probe conversation, special tokens, generation config.

    Raises:
        UserError: something differs; names it.
    """
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (merged, base))
    probes = [t.apply_chat_template(PROBE, return_dict=False) for t in (ours, theirs)]
    configs = [GenerationConfig.from_pretrained(folder).to_dict() for folder in (merged, base)]
    for name, left, right in (
        ("chat template", ours.chat_template, theirs.chat_template),
        ("ids of a probe conversation", *probes),
        ("special tokens", ours.special_tokens_map, theirs.special_tokens_map),
        ("generation config", *configs),
    ):
        if left != right:
            raise UserError(f"{merged}: its {name} differs from that of {base}; delete it and run `dvc repro merge`")


def main() -> None:
    settings = params.load(Params).merge
    check_adapter_fits(ADAPTER, BASE)
    model = load(BASE, torch.bfloat16)
    try:
        merged = PeftModel.from_pretrained(model, str(ADAPTER)).merge_and_unload(safe_merge=True)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{ADAPTER}: cannot be merged ({error}); delete it and run `dvc repro train`") from None
    merged.config.use_cache = True
    with complete_folder(MERGED) as target:
        merged.save_pretrained(target, max_shard_size=settings.max_shard_size)
        for path in sorted(BASE.iterdir()):
            if path.suffix != ".safetensors" and path.name not in (
                "config.json",
                "manifest.json",
                "model.safetensors.index.json",
            ):
                shutil.copyfile(path, target / path.name)
        check_companions(BASE, target)


if __name__ == "__main__":
    run_stage("merge", main)
