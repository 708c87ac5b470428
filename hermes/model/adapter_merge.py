"""A LoRA adapter added to a base, one weight at a time."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM
from transformers.quantizers import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from hermes.artifacts import REMAKE, read_object
from hermes.console import UserError, progress
from hermes.model.base import device, load_config
from hermes.model.safetensors_stream import Stored, stored_tensors, tensor_bytes, write_folder
from hermes.settings.base import BaseSettings

PIECE = 1 << 20  # weights
PLAIN = {
    "peft_type": "LORA",
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}


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
        config = read_config(folder)
        if odd := [name for name, value in PLAIN.items() if config.get(name, value) != value]:
            raise UserError(f"{folder}: `{odd[0]}` is {config[odd[0]]!r}; only plain LoRA is merged here")
        adapter = cls(config["lora_alpha"] / config["r"])
        try:
            with safe_open(folder / "adapter_model.safetensors", "pt") as file:
                count = len(file.keys())
                for name in sorted(file.keys()):
                    kind = file.get_slice(name)
                    if len(kind.get_shape()) != 2 or kind.get_dtype() != "F32":
                        raise UserError(
                            f"{folder}: {name} is {kind.get_dtype()} of {kind.get_shape()}; expected an F32 matrix; {REMAKE}"
                        )
                    module, _, rest = name.removeprefix("base_model.model.").partition(".lora_A")
                    if rest:
                        second = name.replace(".lora_A.", ".lora_B.")
                        adapter.factors[f"{module}.weight"] = file.get_tensor(name), file.get_tensor(second)
                        for factor, rank in (
                            (name, len(file.get_tensor(name))),
                            (second, file.get_tensor(second).shape[-1]),
                        ):
                            if rank != config["r"]:
                                raise UserError(
                                    f"{folder}: {factor} is of rank {rank}, and adapter_config.json says {config['r']}; {REMAKE}"
                                )
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder}: cannot be merged ({error}); delete it and run `dvc repro train`") from None
        if not adapter.factors or 2 * len(adapter.factors) != count:
            raise UserError(
                f"{folder}: holds {count} tensors, of which {len(adapter.factors)} are pairs of A and B; {REMAKE}"
            )
        return adapter

    def change(self, name: str) -> torch.Tensor:
        """What it adds to a weight, float32."""
        a, b = self.factors[name]
        return (b @ a).mul_(self.scaling)


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a LoRA adapter.

    Raises:
        UserError: it is missing, or does not hold what a LoRA adapter has.
    """
    path = folder / "adapter_config.json"
    config = read_object(path)
    for name, kind in (("r", int), ("lora_alpha", int), ("base_model_name_or_path", str)):
        value = config.get(name)
        if type(value) is not kind or not value or (isinstance(value, int) and not 1 <= value <= 10**9):
            raise UserError(
                f"{path}: `{name}` is {value!r:.40}; expected {'a positive number' if kind is int else 'text'}; {REMAKE}"
            )
    return config


def quantized_weights(folder: Path) -> set[str]:
    """The weights that hermes/model/base.py holds in nf4: those that Transformers gives to bitsandbytes."""
    config = load_config(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    linear = (name for name, part in model.named_modules() if type(part) is torch.nn.Linear)
    return {f"{name}.weight" for name in linear if should_convert_module(name, kept)}


def as_trained(weight: torch.Tensor, settings: BaseSettings) -> torch.Tensor:
    """A weight after a round trip through nf4, as training meets it: it is loaded in the type that the base computes in."""
    loaded = weight.to(device(), getattr(torch, settings.dtype))
    packed, state = quantize_4bit(loaded, quant_type="nf4", compress_statistics=settings.double_quantization)
    return dequantize_4bit(packed, state).to(weight.dtype).cpu()


class Merger:
    """The folders of a base and an adapter, merged a weight at a time onto the base as it is stored ("bf16") or as training met it ("nf4").

    Args:
        base: folder of the base.
        adapter: folder of the adapter.
        onto: "bf16", the base as it is stored, or "nf4", as training met it.
        settings: how training loaded the base.

    Attributes:
        tensors: of the base, by name.
        rounding: of the weights merged so far.

    Raises:
        UserError: base or adapter is damaged, or they do not fit together.
    """

    def __init__(self, base: Path, adapter: Path, onto: Literal["bf16", "nf4"], settings: BaseSettings) -> None:
        self.tensors, self.adapter, self.rounding = stored_tensors(base), Adapter.read(adapter), Rounding()
        self.folder, self.settings = adapter, settings
        self.in_nf4 = quantized_weights(base) if onto == "nf4" else set()
        stored = {tensor.name for tensor in self.tensors}
        if missing := self.adapter.factors.keys() - stored:
            raise UserError(f"{adapter}: changes {min(missing)}, which {base} does not have; run `dvc repro train`")
        if missing := self.in_nf4 - stored:
            raise UserError(f"{base}: stores {min(missing)} under another name; set `merge.base: bf16`")

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
            weight = as_trained(weight, self.settings)
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
