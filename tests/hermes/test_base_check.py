"""What a later stage could not take of a base is refused in one line, before anything is computed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hermes.console import UserError
from hermes.model.base_check import check_base


@pytest.fixture
def base(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "base"))


def change(name: str, **values: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return write


def in_float64(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.to(torch.float64) for name, tensor in tensors.items()}, folder / "model.safetensors")


def template(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(text)

    return write


def two_templates(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    both = [{"name": name, "template": "{{ messages[0]['content'] }}"} for name in ("default", "tool_use")]
    change("tokenizer_config.json", chat_template=both)(folder)


def test_a_sound_base_passes(base: Path) -> None:
    check_base(base)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("config.json", quantization_config={"quant_method": "fp8"}), "is quantized already"),
        (in_float64, r"model\.embed_tokens\.weight is F64; F32, F16, BF16 are read"),
        (change("config.json", pad_token_id=-1), "`pad_token_id` of config.json is -1"),
        (change("config.json", vocab_size=49_000), "has the id 49151, and its embedding 49000 rows"),
        (two_templates, r"several chat templates \(default, tool_use\)"),
        (template("{{ strftime_now('%d') }}"), "writes today's date"),
        (template("{{ messages[-1]['content'] }} done"), "writes ' done' behind an answer, no token that ends it"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "has no chat template"),
        (change("config.json", architectures=["NoSuchModel"]), "no GGUF file can be made of it"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not a readable model"),
    ],
)
def test_a_base_that_a_later_stage_could_not_take_is_refused(
    base: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(base)
    with pytest.raises(UserError, match=message) as error:
        check_base(base)
    assert "\n" not in str(error.value)
