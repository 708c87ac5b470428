"""GPTQ (Frantar et al. 2022) and AWQ (Lin et al. 2023) by llm-compressor, in the format that Transformers and vLLM read.

Both round the matrices of the decoder layers to 4 bits. The levels go from the least to the largest weight of a group, as the papers have
it. Embedding and output stay as they are. One decoder layer is worked on at a time, and activations wait in the host's memory.
"""

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "LLM_COMPRESSOR_LOG_LEVEL": "ERROR"}  # before llm-compressor looks

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, fake_quantize
from compressed_tensors.utils import update_offload_parameter
from llmcompressor import oneshot
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.awq.mappings import AWQ_MAPPING_REGISTRY
from llmcompressor.modifiers.utils.pytorch_helpers import is_moe_model
from llmcompressor.pipelines.cache import IntermediatesCache
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel

from hermes.console import UserError
from hermes.settings.compress import Method

BITS, DAMPENING, SEARCHED = 4, 0.01, 20  # of the papers' own code
SIZES = (128, 64, 32)


class Gptq(GPTQModifier):
    """GPTQ that refuses where it would round a matrix to the nearest level instead, which it calls a fallback."""

    def _log_rtn_fallback_summary(self) -> None:
        if names := self._rtn_fallback_module_names:
            raise UserError(
                f"GPTQ cannot invert what it measured of {names[0]} ({len(names)} matrices in all); raise `calibration.pairs`, or take "
                "gptq out of `compress.methods`"
            )


class Awq(AWQModifier):
    """AWQ that refuses a model in which it finds nothing to scale, where it would be plain rounding."""

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        super().on_calibration_start(state, event, **kwargs)
        if not self._resolved_mappings:
            raise UserError("AWQ finds no matrices whose inputs it could scale; take awq out of `compress.methods`")


@contextmanager
def quiet() -> Iterator[ExitStack]:
    """Without the libraries' warnings, and without their bars where nobody watches."""
    shown, tracer = tqdm.__init__, logging.getLogger("torch.fx._symbolic_trace")

    def begin(bar: tqdm, *arguments: Any, **options: Any) -> None:
        shown(bar, *arguments, **(options | {"disable": None}))  # None: where the stream is no terminal

    with ExitStack() as stack, warnings.catch_warnings(action="ignore"):
        stack.enter_context(patch.object(tqdm, "__init__", begin))
        stack.enter_context(patch.object(tracer, "disabled", True))
        yield stack


def output_of(model: PreTrainedModel) -> list[str]:
    """The name of the output layer, which is not rounded."""
    return [name for name, module in model.named_modules() if module is model.get_output_embeddings()]


def matrices(model: PreTrainedModel) -> dict[str, torch.nn.Linear]:
    """The matrices that are rounded, by name: all linear layers but the output."""
    output = output_of(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name not in output
    }


def check(model: PreTrainedModel, methods: Sequence[Method]) -> None:
    """Refuses an architecture that was not tried, in one line.

    Raises:
        UserError: a mixture of experts, layers that are no `Linear`, or one whose scalings AWQ does not know.
    """
    name = type(model).__name__
    if is_moe_model(model):
        raise UserError(
            f"{name}: a mixture of experts, which was not tried with GPTQ and AWQ; set `compress.methods: []`"
        )
    others = sorted({type(module).__name__ for module in model.modules()} & {"Conv1D"})
    if others or not matrices(model):
        raise UserError(
            f"{name}: its matrices are {others[0] if others else 'no'} layers, not Linear; set `compress.methods: []`"
        )
    if "awq" in methods and name not in AWQ_MAPPING_REGISTRY:
        raise UserError(
            f"{name}: llm-compressor does not know what AWQ may scale in it; take awq out of `compress.methods`"
        )


def group_size(model: PreTrainedModel, wanted: int | None) -> int:
    """How many weights share a scale: as wanted, or the largest of 128, 64 and 32 that divides the inputs of every matrix.

    Raises:
        UserError: it does not divide them, or none does.
    """
    widths = sorted({module.in_features for module in matrices(model).values()})
    for size in SIZES if wanted is None else (wanted,):
        if not any(width % size for width in widths):
            return size
    odd = next(width for width in widths if width % (wanted or SIZES[-1]))
    fitting = [size for size in SIZES if not any(width % size for width in widths)]
    mend = f"set it to {fitting[0]}" if fitting else "set `compress.methods: []`"
    raise UserError(f"`compress.group_size`: {wanted or SIZES[-1]} does not divide a matrix's {odd} inputs; {mend}")


def compress(model: PreTrainedModel, method: Method, sequences: Sequence[Sequence[int]], size: int) -> None:
    """Rounds the matrices of a model in place, from what these sequences of ids, each alone, show of their inputs.

    Raises:
        UserError: the method cannot work on this model.
    """
    torch.manual_seed(0)
    weights = QuantizationArgs(num_bits=BITS, type="int", symmetric=False, strategy="group", group_size=size)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    recipe: list[Modifier] = (
        [Gptq(config_groups=groups, ignore=output_of(model), dampening_frac=DAMPENING)]
        if method == "gptq"
        else [Awq(n_grid=SEARCHED), QuantizationModifier(config_groups=groups, ignore=output_of(model))]
    )
    rows = [
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        for ids in sequences
    ]
    with quiet() as stack:
        if not torch.accelerator.is_available():  # which pinned memory needs
            stack.enter_context(patch.object(IntermediatesCache, "pin_memory"))
        oneshot(
            model=model,
            recipe=recipe,
            dataset=DataLoader(rows, batch_size=None, shuffle=False),  # type: ignore[arg-type]
            num_calibration_samples=len(rows),
            shuffle_calibration_samples=False,
            pipeline="sequential",
            log_dir=None,
        )
        with torch.no_grad():
            for module in matrices(
                model
            ).values():  # AWQ leaves them as they were; packing makes the same levels of both
                levels = module.weight, module.weight_scale, module.weight_zero_point
                update_offload_parameter(module, "weight", fake_quantize(*levels, args=weights))


def save(model: PreTrainedModel, source: Path, target: Path, dtype: torch.dtype) -> None:
    """Writes a rounded model as a complete folder: packed weights, the rest in `dtype`, and what lies beside the weights of `source`."""
    model.to(dtype)  # type: ignore[arg-type]
    model.config.dtype = dtype
    with quiet():
        model.save_pretrained(target, save_compressed=True)
    (target / "recipe.yaml").unlink(missing_ok=True)  # it holds Python object tags; config.json says what was done
    for path in source.iterdir():
        is_companion = path.suffix in (".json", ".jinja", ".model", ".txt") and not path.name.endswith(".index.json")
        if is_companion and path.name not in ("config.json", "manifest.json", "merge.json"):
            shutil.copyfile(path, target / path.name)
    for path in target.iterdir():
        path.chmod(0o644)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
