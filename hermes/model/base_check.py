"""What a base has to be for every stage from tokenize on, refused where it is not, before anything is computed.

It refuses and shapes no output, so no stage depends on it.
"""

import hashlib
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from gguf import GGUFReader
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from hermes.artifacts import read_object, scratch_folder, write_json
from hermes.console import UserError, warn
from hermes.data.chat_template import check_bounded
from hermes.data.chat_text import end_of_answer
from hermes.model import gguf_files
from hermes.model.adapter_merge import PLAIN
from hermes.model.base import load, load_config
from hermes.model.gguf import GgufModel
from hermes.model.safetensors_stream import DTYPES, stored_tensors
from hermes.model.tokenizer import load_tokenizer
from hermes.settings.train import TrainSettings
from hermes.training.exactness import quietly, shallow_config
from hermes.training.lora import lora_config

MEND = "choose another revision or model"
RANDOM = re.compile(r"\|\s*random\b|\blipsum\b")  # of Jinja
NOTICED = 0.02  # of the logits' deviation; rounding to float16 is some 0.002


def check_weights(folder: Path) -> None:
    """Refuses weights that merge and quantization cannot read.

    Raises:
        UserError: they are quantized, of a type that is no 16 or 32 bit float, or not those of the architecture; names the tensor.
    """
    if "quantization_config" in read_object(folder / "config.json"):
        raise UserError(f"{folder}: is quantized already (`quantization_config` in config.json); {MEND}")
    stored = {tensor.name: tensor for tensor in stored_tensors(folder)}
    for tensor in stored.values():
        if tensor.dtype not in DTYPES:
            raise UserError(f"{folder}: {tensor.name} is {tensor.dtype}; {', '.join(DTYPES)} are read, {MEND}")
    try:
        with quietly():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except Exception as error:  # whatever a configuration makes of a model
        raise UserError(f"{folder}: is not a readable model ({type(error).__name__}: {error})") from None
    _, found = loaded
    for what, names in (
        ("lacks", found["missing_keys"]),
        ("has another shape than the architecture for", [name for name, *_ in found["mismatched_keys"]]),
        ("holds what the architecture has no place for,", found["unexpected_keys"]),
    ):
        if names:
            raise UserError(f"{folder}: {what} {min(names)}; {MEND}")


def check_tokens(tokenizer: PreTrainedTokenizerBase, config: Any, source: Path) -> None:
    """Refuses a tokenizer with ids that the embedding lacks.

    Raises:
        UserError: names the first of them.
    """
    rows = config.get_text_config().vocab_size
    if (largest := max(tokenizer.get_vocab().values())) >= rows:
        raise UserError(f"{source}: its tokenizer has the id {largest}, and its embedding {rows} rows; {MEND}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found = getattr(config, name, None)
        for id in found if isinstance(found, list) else [found]:
            if id is not None and not 0 <= id < rows:
                raise UserError(
                    f"{source}: `{name}` of config.json is {id}; correct it in a copy, or set it to null there"
                )


def check_template(tokenizer: PreTrainedTokenizerBase, source: Path) -> None:
    """Refuses a chat template that is none, several, another one tomorrow or at every run, or without an end of an answer.

    Raises:
        UserError: says which, and what to do.
    """
    template = tokenizer.chat_template
    if not template:
        raise UserError(f"{source}: its tokenizer has no chat template; write one into `model.chat_template`")
    if not isinstance(template, str):
        raise UserError(
            f"{source}: has several chat templates ({', '.join(template)}); write one into `model.chat_template`"
        )
    if "strftime_now" in template:
        raise UserError(
            f"{source}: its chat template writes today's date, so that ids differ from day to day; "
            "copy it to `model.chat_template` with a fixed date"
        )
    if RANDOM.search(template):
        raise UserError(
            f"{source}: its chat template draws at random, so that ids differ from run to run; "
            "copy it to `model.chat_template` without that"
        )
    try:
        check_bounded(tokenizer)
        end_of_answer(tokenizer)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


@contextmanager
def working_folder(model: Path) -> Iterator[Path]:
    """An empty folder for the check of a model folder, gone afterwards. What a killed check of the same one left is removed first.

    It lies in .scratch: a large vocabulary takes gigabytes, more than some /tmp has.
    """
    path = scratch_folder("check") / hashlib.sha256(str(model.resolve()).encode()).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def check_gguf(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a model of whose first layers llama.cpp makes no file that it can read, or whose tokenizer it writes otherwise.

    The layers are as many as hold each kind of layer. Where the file's logits of a short text are not the model's, that is said.

    Raises:
        UserError: gives the converter's last line, or the first difference.
    """
    ids = [id for probe in gguf_files.PROBES for id in tokenizer(probe, add_special_tokens=False)["input_ids"]]
    with working_folder(folder) as scratch:
        first, path = scratch / "first", scratch / "first.gguf"
        try:
            with quietly():
                model = load(folder, torch.bfloat16, config=shallow_config(folder))
            model.save_pretrained(first)
            named = {"architectures": read_object(folder / "config.json").get("architectures")}
            write_json(first / "config.json", read_object(first / "config.json") | named)
            for file in folder.glob("*"):
                if not (first / file.name).exists() and ".safetensors" not in file.name:
                    shutil.copyfile(file, first / file.name)
            gguf_files.convert(first, path, "f16")
            gguf_files.check_vocabulary(path, gguf_files.metadata(GGUFReader(path)), tokenizer)
            with torch.no_grad():
                expected = model.float()(input_ids=torch.tensor([ids], device=model.device)).logits[0, :-1].cpu()
            with GgufModel(path, threads=1, slots=2, context=2 * len(ids)) as opened:
                ((found,),) = opened.answer_logits([ids[:1]], [[ids[1:]]])
        except UserError as error:
            raise UserError(f"{folder}: no GGUF file can be made of it ({error}); {MEND}") from None
    off = float((found - expected).square().mean().sqrt() / expected.std())
    if not off < NOTICED:
        warn(
            f"{folder}: llama.cpp computes its first layers otherwise: logits are {100 * off:.1f} % of their deviation off; "
            "the report says how far off each GGUF file is"
        )


def check_lengths(folder: Path, longest: int) -> None:
    """Refuses pairs that reach beyond the positions that a model was made for.

    Args:
        folder: of the model.
        longest: tokens of the longest prompt with its longer answer.

    Raises:
        UserError: gives both lengths.
    """
    config = load_config(folder)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and longest > positions:
        raise UserError(
            f"{folder}: has {positions} positions (`max_position_embeddings`), and a pair has {longest} tokens; lower `tokenize.max_length`"
        )


def check_adapter(folder: Path, settings: TrainSettings, onto: str = "bf16") -> None:
    """Refuses an adapter that could not be trained as plain LoRA, or not be merged onto the base ("bf16" or "nf4").

    Raises:
        UserError: names the layer, or what PEFT makes of it.
    """
    config = load_config(folder)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head, stored = model.get_output_embeddings(), {tensor.name for tensor in stored_tensors(folder)}
    linear = {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, (torch.nn.Linear, Conv1D)) and part is not head
    }
    known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
    where = f"params.yaml: `train.lora_modules` {settings.lora_modules}"
    if settings.lora_modules != "all-linear":
        for module in settings.lora_modules:
            if not any(name.rpartition(".")[2] == module for name in linear):
                raise UserError(
                    f"params.yaml: `train.lora_modules` names {module}, which is no linear layer of {folder}; it has {known}"
                )
    try:
        with warnings.catch_warnings(action="ignore"):
            adapted: Any = get_peft_model(model, lora_config(settings))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if odd := [name for name, value in PLAIN.items() if getattr(adapted.peft_config["default"], name, value) != value]:
        raise UserError(
            f"{where}: PEFT adapts some of these layers of {folder} otherwise (`{odd[0]}`), and only plain LoRA is merged; it has {known}"
        )
    names = [name for name, part in adapted.get_base_model().named_modules() if isinstance(part, LoraLayer)]
    for name in [*names, *(linear if onto == "nf4" else ())]:
        if f"{name}.weight" not in stored:
            raise UserError(
                f"{where}: {folder} stores {name} under another name, so that it could not be merged; it has {known}"
            )


def check_base(folder: Path) -> None:
    """Refuses a base that a later stage could not take.

    Raises:
        UserError: says why.
    """
    config = load_config(folder)
    try:
        text = config.get_text_config()
        assert text is config or text.model_type, "its `text_config` names no `model_type`"
        if (folder / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the libraries raise about the files of others
        raise UserError(f"{folder}: is not a readable model ({type(error).__name__}: {error})") from None
    if text is not config:
        raise UserError(
            f"{folder}: is a model of more than text ({config.model_type}); choose one of text alone ({text.model_type})"
        )
    tokenizer = load_tokenizer(folder)
    check_template(tokenizer, folder)
    check_tokens(tokenizer, config, folder)
    check_weights(folder)
    check_gguf(folder, tokenizer)
