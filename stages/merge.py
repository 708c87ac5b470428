"""Stage merge: models/base + models/adapter -> models/merged, sharded safetensors with tokenizer, template and generation config.

Each adapted matrix becomes `W + scaling * B @ A`, the product in float32 and one rounding to W's type, which is what PEFT's merge
does. W is the base as it is stored (`base: bf16`), or as the adapter met it in training, quantized to nf4 and dequantized (`base: nf4`).
Tensors are read, merged and written one at a time (stages/weights.py); what no adapter touches is copied. Everything beside
the weights is carried over from the base and checked to be equal, but that generation also ends where the chat template ends an answer.
models/merged/merge.json says how much of the changes the rounding swallowed.
"""

import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from stages import params
from stages.artifacts import complete_folder, read_json, sha256_file, write_json
from stages.console import UserError, progress, run_stage
from stages.model import BaseSettings, device
from stages.tokenize import end_of_answer
from stages.weights import Stored, parse_size, stored_tensors, tensor_bytes, write_folder

BASE, ADAPTER, MERGED = Path("models/base"), Path("models/adapter"), Path("models/merged")
PROBE = [{"role": "user", "content": "Hello, world! naïve café 123"}, {"role": "assistant", "content": "Yes."}]
PIECE = 1 << 20  # weights
WEIGHTS = {"manifest.json", "model.safetensors.index.json", "merge.json"}
PLAIN = {
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}


class MergeSettings(params.Settings):
    """What the adapter is merged onto, and how the merged weights are stored."""

    base: Literal["bf16", "nf4"]
    max_shard_size: str


class Params(params.Params):
    """Parameters of merge."""

    base: BaseSettings
    merge: MergeSettings


@dataclass
class Rounding:
    """What rounding to the type of the weights did to their changes, over all merged matrices.

    Attributes:
        weights: how many there are.
        changed: of them, how many the adapter changes at all.
        swallowed: of those, how many are after the merge what they were before it.
        squared: sum of squares of the changes.
        lost: sum of squares of the part of the changes that rounding added or took away.
    """

    weights: int = 0
    changed: int = 0
    swallowed: int = 0
    squared: float = 0.0
    lost: float = 0.0

    def add(self, before: torch.Tensor, change: torch.Tensor, after: torch.Tensor) -> None:
        """Counts one matrix, a piece at a time: its temporaries would be most of the memory of a merge."""
        parts = (tensor.flatten().split(PIECE) for tensor in (before, change, after))
        for old, wanted, new in zip(*parts, strict=True):
            moved = wanted != 0
            self.weights += old.numel()
            self.changed += int(moved.sum())
            self.swallowed += int((moved & (new == old)).sum())
            self.squared += float(wanted.square().sum(dtype=torch.float64))
            self.lost += float((new.float() - old.float() - wanted).square_().sum(dtype=torch.float64))

    def summary(self) -> dict[str, float | int]:
        """The shares for the report."""
        return {
            "weights": self.weights,
            "changed": self.changed,
            "swallowed": self.swallowed / max(1, self.changed),
            "relative_error": math.sqrt(self.lost / self.squared) if self.squared else 0.0,
        }


@dataclass
class Adapter:
    """A LoRA adapter on disk, by the names of the weights that it changes.

    Attributes:
        scaling: of every update, alpha / rank.
        factors: (A (rank, inputs), B (outputs, rank)) float32 of each weight.
    """

    scaling: float
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Adapter":
        """Reads what stages/train.py wrote.

        Raises:
            UserError: a file is damaged, or it is another kind of adapter.
        """
        config = read_json(folder / "adapter_config.json")
        if odd := [name for name, value in PLAIN.items() if config.get(name, value) != value]:
            raise UserError(f"{folder}: `{odd[0]}` is {config[odd[0]]!r}; only plain LoRA is merged here")
        adapter = cls(config["lora_alpha"] / config["r"])
        try:
            with safe_open(folder / "adapter_model.safetensors", "pt") as file:
                for name in sorted(file.keys()):
                    module, _, rest = name.removeprefix("base_model.model.").partition(".lora_A")
                    if rest:
                        second = name.replace(".lora_A.", ".lora_B.")
                        adapter.factors[f"{module}.weight"] = file.get_tensor(name), file.get_tensor(second)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder}: cannot be merged ({error}); delete it and run `dvc repro train`") from None
        return adapter

    def change(self, name: str) -> torch.Tensor:
        """What it adds to a weight, float32."""
        a, b = self.factors[name]
        return (b @ a).mul_(self.scaling)


def quantized_weights(folder: Path) -> set[str]:
    """The weights that stages/model.py holds in nf4: of every linear layer but the output."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    head = model.get_output_embeddings()
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return {f"{name}.weight" for name, _ in linear}


def as_trained(weight: torch.Tensor, double_quantization: bool) -> torch.Tensor:
    """A weight after a round trip through nf4, as training meets it."""
    packed, state = quantize_4bit(weight.to(device()), quant_type="nf4", compress_statistics=double_quantization)
    return dequantize_4bit(packed, state).to(weight.dtype).cpu()


class Merger:
    """An adapter and a base, merged a weight at a time.

    Args:
        base: folder of the base.
        adapter: folder of the adapter.
        onto: "bf16", the base as it is stored, or "nf4", as training met it.
        double_quantization: of the quantization constants, as in training.

    Attributes:
        tensors: of the base, by name.
        rounding: of the weights merged so far.

    Raises:
        UserError: base or adapter is damaged, or they do not fit together.
    """

    def __init__(self, base: Path, adapter: Path, onto: Literal["bf16", "nf4"], double_quantization: bool) -> None:
        self.tensors, self.adapter, self.rounding = stored_tensors(base), Adapter.read(adapter), Rounding()
        self.folder, self.double_quantization = adapter, double_quantization
        self.in_nf4 = quantized_weights(base) if onto == "nf4" else set()
        if missing := self.adapter.factors.keys() - {tensor.name for tensor in self.tensors}:
            raise UserError(f"{adapter}: changes {min(missing)}, which {base} does not have; run `dvc repro train`")

    def weight(self, stored: Stored) -> torch.Tensor | None:
        """The merged weight; None where it is that of the base.

        Raises:
            UserError: an update does not fit its weight, or makes it infinite.
        """
        changed = stored.name in self.adapter.factors
        if not changed and stored.name not in self.in_nf4:
            return None
        weight = stored.read()
        if stored.name in self.in_nf4:
            weight = as_trained(weight, self.double_quantization)
        if changed:
            change = self.adapter.change(stored.name)
            if change.shape != weight.shape:
                raise UserError(
                    f"{self.folder}: changes {stored.name} by {tuple(change.shape)}; it is {tuple(weight.shape)}"
                )
            before = weight.clone()
            weight += change
            if not weight.isfinite().all():
                raise UserError(
                    f"{self.folder}: makes {stored.name} infinite or no number; delete it and run `dvc repro train`"
                )
            self.rounding.add(before, change, weight)
        return weight

    def write(self, target: Path, max_shard_size: int) -> None:
        """Writes all weights into a folder."""
        bar = progress(range(len(self.tensors)), "merging", unit="tensor")

        def content(stored: Stored) -> Iterable[bytes]:
            bar.update(1)
            weight = self.weight(stored)
            return stored.pieces() if weight is None else tensor_bytes(weight)

        write_folder(target, self.tensors, content, max_shard_size)
        bar.close()


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


def generation_config(base: Path) -> GenerationConfig:
    """The base's, or where it has none what its config.json says; and it ends an answer also where the chat template ends one."""
    if (base / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(base)
    else:
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(base))
    found, end = config.eos_token_id, end_of_answer(AutoTokenizer.from_pretrained(base))
    ends = found if isinstance(found, list) else [] if found is None else [found]
    if end not in ends:
        config.eos_token_id = [*ends, end]
    return config


def check_companions(base: Path, merged: Path) -> None:
    """Compares what goes with the weights: chat template, ids of a probe conversation, special tokens, generation config.

    Raises:
        UserError: something differs; names it.
    """
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (merged, base))
    probes = [t.apply_chat_template(PROBE, return_dict=False) for t in (ours, theirs)]
    written = GenerationConfig.from_pretrained(merged).to_dict()
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
    settings, shard = loaded.merge, parse_size(loaded.merge.max_shard_size)
    if settings.base == "nf4" and loaded.base.quantization != "nf4":
        raise UserError("params.yaml: `merge.base: nf4` needs `base.quantization: nf4`, which training would have used")
    check_adapter_fits(ADAPTER, BASE)
    with complete_folder(MERGED) as target:
        merger = Merger(BASE, ADAPTER, settings.base, loaded.base.double_quantization)
        merger.write(target, shard)
        write_json(target / "merge.json", {"base": settings.base, **merger.rounding.summary()})
        for path in sorted(BASE.iterdir()):
            if path.suffix != ".safetensors" and path.name not in WEIGHTS:
                shutil.copyfile(path, target / path.name)
        generation_config(BASE).save_pretrained(target)
        check_companions(BASE, target)


if __name__ == "__main__":
    run_stage("merge", main)
