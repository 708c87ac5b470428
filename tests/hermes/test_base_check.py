"""What a later stage could not take of a base is refused in one line, before anything is computed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config

from hermes.console import UserError
from hermes.model.base import load_base
from hermes.model.base_check import check_adapter, check_base, check_lengths, check_weights, working_folder
from hermes.settings.base import BaseSettings
from tests.hermes.test_architectures import small_config, small_model
from tests.stages.test_train import FP32, NF4, SETTINGS


@pytest.fixture
def base(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "base"))


def change(name: str, **values: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return write


UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        edit(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return write


in_float64 = tensors(lambda found: found.update({name: tensor.double() for name, tensor in found.items()}))


def more_than_text(folder: Path) -> None:
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    Gemma3Config(text_config={**small, "model_type": "gemma3_text"}, vision_config=small).save_pretrained(folder)


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
        (lambda folder: (folder / "generation_config.json").write_text("[]"), "is not a readable model"),
        (change("config.json", text_config={"hidden_size": 64}), "is not a readable model"),
        (change("config.json", hidden_act="nonsense"), "is not a readable model"),
        (more_than_text, r"is a model of more than text \(gemma3\); choose one of text alone \(gemma3_text\)$"),
        (tensors(lambda found: found.pop(UP)), rf"base: lacks {UP}; choose another revision or model$"),
        (change("config.json", tie_word_embeddings=False), r"base: lacks lm_head\.weight; choose another"),
        (
            tensors(lambda found: found.update({UP: found[UP][:1].clone()})),
            rf"base: has another shape than the architecture for {UP}; choose another",
        ),
        (
            tensors(lambda found: found.update({UP.replace("1", "9"): found[UP].clone()})),
            r"holds what the architecture has no place for, model\.layers\.9\.mlp\.up_proj\.weight; choose another",
        ),
        (template("{{ 1 // 0 }}"), r"refuses the turns user, assistant \(integer division or modulo by zero\); use another"),
        (template("{{ messages[0] + 1 }}"), r"refuses the turns user, assistant \(unsupported operand type"),
        (template("{{ raise_exception('never') }}"), r"refuses the turns user, assistant \(never\); use another template"),
        (template("{% for m in messages %}\n{% endfo %}"), r"refuses the turns .* \(Encountered unknown tag 'endfo'\."),
    ],
)  # fmt: skip
def test_a_base_that_a_later_stage_could_not_take_is_refused(
    base: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(base)
    with pytest.raises(UserError, match=message) as error:
        check_base(base)
    assert "\n" not in str(error.value)


def test_what_an_old_checkpoint_stores_beside_its_weights_is_no_tensor_too_many(base: Path) -> None:
    tensors(lambda found: found.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))(base)
    check_weights(base)


@pytest.mark.parametrize("settings", [FP32, NF4], ids=["none", "nf4"])
@pytest.mark.parametrize("lost", [UP, NORM])
def test_a_base_without_a_tensor_is_never_filled_at_random(base: Path, settings: BaseSettings, lost: str) -> None:
    tensors(lambda found: found.pop(lost))(base)
    with pytest.raises(UserError, match=rf"base: has no {lost}; delete it and run `dvc repro`$"):
        load_base(base, settings)


def test_a_pair_may_reach_the_last_position_and_no_further(base: Path) -> None:
    check_lengths(base, 512)
    with pytest.raises(
        UserError,
        match=r"base: has 512 positions \(`max_position_embeddings`\), and a pair has 513 tokens; lower `tokenize\.max_length`$",
    ):
        check_lengths(base, 513)
    small_config("bloom").save_pretrained(base)  # which has none
    check_lengths(base, 10**6)


@pytest.mark.parametrize(
    ("name", "modules", "onto", "message"),
    [
        ("llama", ["q_proj", "c_attn"], "bf16", r"names c_attn, which is no linear layer of .*; it has down_proj, gate_proj, "),
        ("llama", ["lm_head"], "bf16", r"names lm_head, which is no linear layer of .*; it has down_proj, "),
        ("llama", ["norm"], "bf16", r"names norm, which is no linear layer of "),
        ("gpt2", ["q_proj"], "bf16", r"names q_proj, which is no linear layer of .*; it has c_attn, c_fc, c_proj$"),
        ("gpt2", ["c_attn"], "bf16", r"\['c_attn'\]: PEFT adapts some of these layers of .* otherwise \(`fan_in_fan_out`\), and only"),
        ("gpt2", "all-linear", "nf4", r"all-linear: PEFT adapts some of these layers of .* otherwise \(`fan_in_fan_out`\)"),
        ("mixtral", "all-linear", "bf16", r"otherwise \(`rank_pattern`\), and only plain LoRA is merged; it has k_proj, o_proj, q_proj"),
        ("mixtral", ["w1"], "bf16", r"names w1, which is no linear layer of .*; it has k_proj, o_proj, q_proj, v_proj$"),
        ("mamba", "all-linear", "bf16", r"all-linear: .*Module 'out_proj' is incompatible with Mamba-based models"),
        ("phimoe", ["router"], "bf16", r"stores model\.layers\.0\.mlp\.router under another name, so that it could not be merged; it"),
        ("phimoe", ["q_proj"], "nf4", r"stores model\.layers\.0\.mlp\.router under another name, so that it could not be merged; it"),
    ],
)  # fmt: skip
def test_an_adapter_that_could_not_be_merged_is_refused(
    name: str, modules: Any, onto: str, message: str, tmp_path: Path
) -> None:
    small_model(name).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"^params\.yaml: `train\.lora_modules` .*{message}") as error:
        check_adapter(tmp_path, SETTINGS.model_copy(update={"lora_modules": modules}), onto)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "modules", "onto"),
    [
        ("llama", "all-linear", "nf4"),
        ("phi3", ["qkv_proj"], "nf4"),
        ("mixtral", ["q_proj"], "nf4"),
        ("phimoe", ["q_proj"], "bf16"),
    ],
)
def test_an_adapter_of_linear_layers_under_their_own_names_passes(
    name: str, modules: Any, onto: str, tmp_path: Path
) -> None:
    small_model(name).save_pretrained(tmp_path)
    check_adapter(tmp_path, SETTINGS.model_copy(update={"lora_modules": modules}), onto)


def test_what_a_killed_check_left_is_gone_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with working_folder(Path("models/base")) as first:
        (first / "half.gguf").touch()
        shutil.copytree(first, tmp_path / "kept")
    assert not first.exists()
    shutil.copytree(tmp_path / "kept", first)  # as `kill -9` leaves it
    with working_folder(Path("models/base")) as again, working_folder(Path("models/another")) as other:
        assert again == first != other
        assert not list(again.iterdir())
    assert not [path for path in Path(".scratch/check").iterdir() if path.suffix != ".lock"]
