"""Loading the frozen base exactly alike in reference and training, and the torch settings that make runs repeat.

The nf4 quantization is bitsandbytes' (QLoRA, arXiv 2305.14314). On CPUs with AVX-512 bfloat16, bitsandbytes repacks a layer's weights at
its first evaluation, for good. From then on gradients below it are wrong, without an error. The repacking is switched off here for every
layer.
"""

import gc
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from hermes.bits import CHOSEN, Bits, can
from hermes.console import UserError
from hermes.settings.base import BaseSettings


def set_determinism(threads: int) -> None:
    """Fixes the number of CPU threads and asks torch for deterministic kernels (a warning where a device has none).

    On Hopper GPUs torch would choose cuDNN's attention first, which builds a plan for every new length, and pairs differ in length: a step
    of the 8B profile took twice its time.

    Raises:
        RuntimeError: torch or oneDNN was loaded before this process chose its instructions (hermes/bits.py), and took others.
    """
    check_instructions()
    torch.backends.cuda.enable_cudnn_sdp(False)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid


def check_instructions() -> None:
    """Holds what torch and oneDNN take against what was chosen for this process, if anything was and the CPU can do it.

    Raises:
        RuntimeError: it is something else.
    """
    chosen = CHOSEN[-1] if CHOSEN else None
    if chosen is None or not can(chosen):
        return
    found = torch.backends.cpu.get_cpu_capability(), bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if found != (("AVX512", True) if chosen == "avx512" else ("AVX2", False)):
        raise RuntimeError(f"`bits: {chosen}` was chosen, and torch took {found[0]}, oneDNN bfloat16: {found[1]}")


def device() -> str:
    """The device that models run on: the GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_type(bits: Bits) -> torch.dtype:
    """The type that this machine computes in where nothing else is asked: float32 on a CPU with portable bits, else bfloat16."""
    return torch.float32 if bits == "portable" and device() == "cpu" else torch.bfloat16


def as_computed(settings: BaseSettings, bits: Bits) -> BaseSettings:
    """The settings of a base with the type that this machine computes in."""
    if compute_type(bits) == torch.float32:
        return settings.model_copy(update={"dtype": "float32"})
    return settings


def release() -> None:
    """Frees models that nobody names any more; torch would keep their memory of a GPU, and llama.cpp allocates its own beside it."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where CUDA is not in use


def load_base(folder: Path, settings: BaseSettings, sharded: bool = False) -> PreTrainedModel:
    """Loads the base, quantized as asked, in training mode with every weight frozen.

    FSDP shards floats only, so `sharded` packs nf4 into the type that the base computes in: the same bits under another name.

    Raises:
        UserError: the folder holds no readable model.
    """
    dtype = getattr(torch, settings.dtype)
    quantization = None
    if settings.quantization == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=settings.double_quantization,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype if sharded else None,
        )
    model = load(folder, dtype, quantization)
    in_nf4 = [module for module in model.modules() if isinstance(module, Linear4bit)]
    if quantization and not in_nf4:
        raise UserError(f"{folder}: has no layer that bitsandbytes quantizes; set `base.quantization: none`")
    for module in in_nf4:
        module.support_avx512bf16_for_cpu = False
    if quantization and settings.keep_dequantized:
        model = model.dequantize()  # to the compute type, so to the numbers that every product would make of them
    model.requires_grad_(False)
    model.config.use_cache = False
    model.config.output_router_logits = (
        False  # of a mixture of experts: its router is frozen, and needs no loss of its own
    )
    return model.train()


def load_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a local model folder.

    Raises:
        UserError: the folder is missing, damaged or no model.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; run `dvc repro` to make it")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the libraries raise about the files of others
        raise UserError(
            f"{folder}: is not a readable model ({type(error).__name__}: {error}); delete it and run `dvc repro`"
        ) from None


def load(
    folder: Path,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | CompressedTensorsConfig | None = None,
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """Loads a local model folder onto the device, without remote code; a configuration with fewer layers gives that many.

    What the stage compress packed to 4 bits is unpacked, to the type of its scales and then to `dtype`.

    Raises:
        UserError: the folder is missing, damaged or no model.
    """
    stated = getattr(config or load_config(folder), "quantization_config", None)
    if isinstance(stated, dict) and stated.get("quant_method") == "compressed-tensors":
        quantization = CompressedTensorsConfig(dequantize=True)
        warnings.filterwarnings("ignore", "You passed `quantization_config`")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            **({} if config is None else {"config": config}),
            dtype=dtype,
            quantization_config=quantization,
            device_map={"": device()},
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # safetensors, JSON and OS errors alike mean a damaged folder
        raise UserError(
            f"{folder}: not a readable model ({type(error).__name__}: {error}); delete it and run `dvc repro`"
        ) from None
    model: PreTrainedModel = loaded[0]
    found = loaded[1]
    if found["missing_keys"]:  # they would be random numbers
        raise UserError(f"{folder}: has no {min(found['missing_keys'])}; delete it and run `dvc repro`")
    return model
