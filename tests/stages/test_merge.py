"""The merge of one tensor at a time has the bits of PEFT's, and needs memory for its largest tensor only."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hermes.artifacts import sha256_file, write_json
from hermes.console import UserError
from hermes.model import adapter_merge
from hermes.model.base import load, load_base
from hermes.model.safetensors_stream import stored_tensors, write_folder
from hermes.settings.base import BaseSettings
from hermes.settings.merge import parse_size
from stages import merge
from stages.train import save_adapter
from tests.conftest import table_of
from tests.hermes.test_architectures import EXPECTED, small_config

ROOT = Path(__file__).parents[2]
MODULES = ["q_proj", "v_proj", "o_proj", "down_proj"]

TRAINED = BaseSettings(quantization="nf4", double_quantization=True, keep_dequantized=True, dtype="bfloat16", threads=1)


@pytest.fixture
def adapter(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """An adapter with random factors on four kinds of layers of the tiny model."""
    torch.manual_seed(0)
    model = get_peft_model(
        load(tiny_model_folder, torch.float32), LoraConfig(r=4, lora_alpha=6, target_modules=MODULES)
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(model, folder, sha256_file(tiny_model_folder / "manifest.json"))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("onto", ["bf16", "nf4"])
@pytest.mark.parametrize("double", [False, True])
def test_merged_tensors_have_the_bits_of_pefts_merge(
    onto: Literal["bf16", "nf4"], double: bool, tiny_model_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    """On the stored base, and on the base that training meets, dequantized."""
    target = tmp_path / "merged"
    settings = TRAINED.model_copy(update={"double_quantization": double})
    adapter_merge.Merger(tiny_model_folder, adapter, onto, settings).write(target, 10**9)
    base = load(tiny_model_folder, torch.bfloat16) if onto == "bf16" else load_base(tiny_model_folder, settings)
    peft = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    expected, before, ours = peft.state_dict(), weights(tiny_model_folder), weights(target)
    assert ours.keys() == before.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, expected[name]), name
    changed = sum(not torch.equal(tensor, before[name]) for name, tensor in ours.items())
    linear = sum("proj" in name for name in ours)
    assert changed == (len(adapter_merge.Adapter.read(adapter).factors) if onto == "bf16" else linear)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_a_base_stored_in_another_type_is_quantized_as_training_loads_it(
    stored: torch.dtype, tiny_model_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    generator = torch.Generator().manual_seed(0)
    model = load(tiny_model_folder, torch.float32)
    for parameter in model.parameters():  # numbers that bfloat16 rounds
        parameter.data = (parameter.data + 1e-3 * torch.randn(parameter.shape, generator=generator)).to(stored)
    model.config.dtype = stored
    model.save_pretrained(base)
    merger = adapter_merge.Merger(base, adapter, "nf4", TRAINED)
    merger.adapter.factors = {}
    expected = load_base(base, TRAINED).state_dict()
    found = {tensor.name: merger.weight(tensor) for tensor in merger.tensors}
    quantized = {name: weight for name, weight in found.items() if weight is not None}
    assert len(quantized) == 14
    assert all(torch.equal(weight.bfloat16(), expected[name]) for name, weight in quantized.items())


def test_shards_hold_every_tensor_once_and_load_alike(tiny_model_folder: Path, adapter: Path, tmp_path: Path) -> None:
    adapter_merge.Merger(tiny_model_folder, adapter, "bf16", TRAINED).write(tmp_path / "one", 10**9)
    adapter_merge.Merger(tiny_model_folder, adapter, "bf16", TRAINED).write(tmp_path / "many", 20_000)
    files = sorted(path.name for path in (tmp_path / "many").iterdir())
    assert len(files) > 3
    assert files[-1] == "model.safetensors.index.json"
    one, many = weights(tmp_path / "one"), weights(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / files[-1]).read_text())
    assert index["weight_map"].keys() == many.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in many.values())
    for path in (tmp_path / "many").glob("*.safetensors"):
        assert sum(tensor.nbytes for tensor in load_file(path).values()) <= 20_000 or len(load_file(path)) == 1


@pytest.mark.parametrize("brought", [False, True])
def test_the_merged_model_also_ends_where_the_chat_template_ends_an_answer(
    brought: bool, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """The published base brings no generation config, and its sequences end otherwise than a Llama-3 answer."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model_folder, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    (base / "chat_template.jinja").write_text(tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>"))
    if not brought:
        (base / "generation_config.json").unlink()
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    assert merge.generation_config(base).eos_token_id == ends
    assert merge.generation_config(tiny_model_folder).eos_token_id == tokenizer.eos_token_id


def test_what_rounding_swallows_is_counted() -> None:
    before = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.bfloat16)
    change = torch.tensor([1 / 1024, 0.5, 0.0, 1e-6])  # bfloat16 has 8 bits: next to 1 the step is 1/128
    rounding = adapter_merge.Rounding()
    rounding.add(before, change, (before.float() + change).bfloat16())
    found = rounding.summary()
    assert (found["weights"], found["changed"], found["swallowed"]) == (4, 3, 1 / 3)
    assert found["relative_error"] == pytest.approx(1 / 1024 / 0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "`use_dora` is True; only plain LoRA is merged here"),
        ({"alpha_pattern": {"q_proj": 3}}, "`alpha_pattern` is .* only plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, r"`modules_to_save` is \['lm_head'\]; only plain LoRA is merged here"),
    ],
)
def test_another_kind_of_adapter_is_refused(change: dict[str, Any], message: str, adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        adapter_merge.Adapter.read(adapter)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"r": 0}, r"`r` is 0; expected a positive number"),
        ({"r": "16"}, r"`r` is '16'; expected a positive number"),
        ({"r": None}, r"`r` is None; expected a positive number"),
        ({"r": True}, r"`r` is True; expected a positive number"),
        ({"lora_alpha": -6}, r"`lora_alpha` is -6; expected a positive number"),
        ({"lora_alpha": ...}, r"`lora_alpha` is None; expected a positive number"),
        ({"base_model_name_or_path": None}, r"`base_model_name_or_path` is None; expected text"),
        ("[]", r"holds '\[\]'; expected an object"),
        ('{"r": 4', r"not valid JSON \(Expecting ',' delimiter: line 1 column 8 \(char 7\)\)"),
    ],
)
def test_a_damaged_adapter_config_is_named_with_what_it_holds(
    content: dict[str, Any] | str, message: str, adapter: Path, tiny_model_folder: Path
) -> None:
    path = adapter / "adapter_config.json"
    if isinstance(content, dict):
        changed = json.loads(path.read_text()) | content
        content = json.dumps({key: value for key, value in changed.items() if value is not ...})
    path.write_text(content)
    for read in (adapter_merge.Adapter.read, adapter_merge.read_config):
        with pytest.raises(
            UserError, match=rf"^{re.escape(str(path))}: {message}; delete it and run `dvc repro`$"
        ) as error:
            read(adapter)
        assert "\n" not in str(error.value)


def test_factors_of_two_ranks_are_refused(adapter: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    factors = load_file(file)
    second = min(name for name in factors if "lora_B" in name)
    save_file(factors | {second: factors[second][:, 1:].contiguous()}, file)
    with pytest.raises(UserError, match=r"adapter: .*lora_B\.weight is of rank 3, .* 4; "):
        adapter_merge.Merger(tiny_model_folder, adapter, "bf16", TRAINED).write(tmp_path / "bad", 10**9)


def test_a_rank_that_is_not_the_tensors_is_refused(adapter: Path) -> None:
    """Its scaling would be another."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    with pytest.raises(UserError, match=r"\.lora_A\.weight is of rank 4, and adapter_config\.json says 8; delete it"):
        adapter_merge.Adapter.read(adapter)


def test_an_adapter_of_another_shape_or_without_its_weight_or_not_finite_is_refused(
    tiny_model_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    file = adapter / "adapter_model.safetensors"
    good = load_file(file)
    first = min(name for name in good if "lora_A" in name)
    for bad, message in (
        ({first: good[first][:, 1:]}, "changes model.layers.0"),
        ({first: good[first] * float("nan")}, "infinite or no number"),
        (
            {
                name.replace("layers.0", "layers.9"): tensor.clone()
                for name, tensor in good.items()
                if "layers.0" in name
            },
            "does not have",
        ),
    ):
        save_file({name: tensor.contiguous() for name, tensor in (good | bad).items()}, file)
        with pytest.raises(UserError, match=message):
            adapter_merge.Merger(tiny_model_folder, adapter, "bf16", TRAINED).write(tmp_path / "bad", 10**9)
    file.write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be merged"):
        adapter_merge.Merger(tiny_model_folder, adapter, "bf16", TRAINED).write(tmp_path / "bad", 10**9)


@pytest.mark.parametrize("text", ["", "5", "GB", "0MB", "-1GB", "1.5GB", "5TB"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write it like 200MB or 5GB"):
        parse_size(text)
    assert parse_size("5GB") == 5 * 10**9


def test_a_cut_or_damaged_or_doubled_weight_file_is_one_line(tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no safetensors weights"):
        stored_tensors(tmp_path)
    whole = (tiny_model_folder / "model.safetensors").read_bytes()
    for content in (whole[:-5], whole + b"x"):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="is cut or has bytes too many"):
            stored_tensors(tmp_path)
    for content in (b"", b"\xff" * 100, (4).to_bytes(8, "little") + b"[ ] "):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="not a readable safetensors file"):
            stored_tensors(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(whole)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="is in another file too"):
        stored_tensors(tmp_path)


MEASURED = """
import resource, sys
from pathlib import Path
from hermes.model.adapter_merge import Merger
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
Merger(Path(sys.argv[1]), Path(sys.argv[2]), "bf16", None).write(Path(sys.argv[3]), 10**8)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.fixture
def wide(tmp_path: Path) -> tuple[Path, Path, int]:
    """A base of 40 matrices of 8 MB, its adapter, and its size."""
    base, adapter_folder = tmp_path / "wide", tmp_path / "wide-adapter"
    for folder in (base, adapter_folder):
        folder.mkdir()
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(40)]
    torch.manual_seed(0)
    save_file({f"{name}.weight": torch.randn(2048, 2048).bfloat16() for name in names}, base / "model.safetensors")
    factors = {f"base_model.model.{name}.lora_A.weight": torch.randn(8, 2048) for name in names}
    factors |= {f"base_model.model.{name}.lora_B.weight": torch.randn(2048, 8) for name in names}
    save_file(factors, adapter_folder / "adapter_model.safetensors")
    config = {"lora_alpha": 8, "r": 8, "base_model_name_or_path": "sha256:0"}
    (adapter_folder / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter_folder, (base / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(wide: tuple[Path, Path, int], tmp_path: Path) -> None:
    base, adapter_folder, size = wide
    command = [sys.executable, "-c", MEASURED, str(base), str(adapter_folder), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    grown = int(done.stdout.splitlines()[-1])
    assert size > 300e6
    assert grown < 150e6  # the adapter's factors, and some copies of a matrix of 8 MB in bfloat16 and float32
    assert sum(tensor.size for tensor in stored_tensors(tmp_path / "out")) == sum(t.size for t in stored_tensors(base))


def test_a_file_is_written_to_the_last_byte_or_not_at_all(tiny_model_folder: Path, tmp_path: Path) -> None:
    tensors = stored_tensors(tiny_model_folder)
    with pytest.raises(ValueError, match="bytes instead of"):
        write_folder(tmp_path / "out", tensors, lambda tensor: [b"x"], 10**9)
    assert not list((tmp_path / "out").glob("*"))
    write_folder(tmp_path / "out", tensors, lambda tensor: tensor.pieces(), 10**9)
    assert all(
        torch.equal(left, right)
        for left, right in zip(weights(tmp_path / "out").values(), weights(tiny_model_folder).values(), strict=True)
    )


def read_layouts() -> dict[str, tuple[str, dict[str, Any], str]]:
    """The table of docs/bring-a-model.md: model type, settings and result of every layout."""
    found = {}
    for _, examples, result in table_of("Which layouts are merged?"):
        for name, settings in re.findall(r"`([\w-]+)`(?: \(([^)]*)\))?", examples):
            changes = {key: value == "true" for key, value in re.findall(r"`(\w+): (true|false)`", settings)}
            found[" ".join([name, *map(str, changes.items())])] = (name, changes, result)
    return found


LAYOUTS = read_layouts()


def adapted_model(name: str, **changes: Any) -> tuple[PreTrainedModel, list[str]]:
    """A tiny random model of this architecture, and the names of all its linear layers but the output."""
    config = small_config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).bfloat16()
    head = model.get_output_embeddings()
    linear = {
        key.rpartition(".")[2]
        for key, m in model.named_modules()
        if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head
    }
    if "mamba" in name or name == "nemotron_h":
        linear.discard("out_proj")  # which PEFT refuses to adapt there
    return model, sorted(key for key in linear if not key.isdigit())


def check_merge(name: str, changes: dict[str, Any], onto: Literal["bf16", "nf4"], scratch: Path) -> None:
    """What is read back of a merge is what PEFT's merge has, and it differs from the base where it has to."""
    base, folder, target = scratch / "base", scratch / "adapter", scratch / "merged"
    model, linear = adapted_model(name, **changes)
    model.save_pretrained(base)
    write_json(base / "manifest.json", {})
    start = load(base, torch.bfloat16) if onto == "bf16" else load_base(base, TRAINED)
    before = {key: weight.clone() for key, weight in start.state_dict().items()}
    peft = get_peft_model(start, LoraConfig(r=4, lora_alpha=6, target_modules=linear))
    generator = torch.Generator().manual_seed(1)
    for key, parameter in peft.named_parameters():
        if "lora_" in key:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    folder.mkdir()
    target.mkdir()
    save_adapter(peft, folder, sha256_file(base / "manifest.json"))
    adapter_merge.Merger(base, folder, onto, TRAINED).write(target, 10**9)
    shutil.copy(base / "config.json", target)
    expected, found = peft.merge_and_unload().state_dict(), load(target, torch.bfloat16).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert sum(not torch.equal(found[key], before[key]) for key in found) == len(
        {key for key in before if key.rpartition(".")[0].rpartition(".")[2] in linear and key.endswith("weight")}
    )


@pytest.mark.parametrize(
    ("layout", "onto"),
    [
        (layout, onto)
        for layout, (_, _, result) in LAYOUTS.items()
        for onto in ("bf16", "nf4")
        if onto == "bf16" or result == "PEFT's bits"
    ],
)
def test_the_merge_of_every_layout_is_that_of_the_documents(
    layout: str, onto: Literal["bf16", "nf4"], tmp_path: Path
) -> None:
    name, changes, result = LAYOUTS[layout]
    if result == "PEFT's bits":
        check_merge(name, changes, onto, tmp_path)
        return
    with pytest.raises(UserError, match=re.escape(result.removeprefix("refused: "))):
        check_merge(name, changes, onto, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    sorted(name for name in EXPECTED.keys() - {name for name, _, _ in LAYOUTS.values()} if EXPECTED[name] != "refused"),
)
def test_the_merge_of_every_other_architecture_is_pefts(name: str, tmp_path: Path) -> None:
    check_merge(name, {}, "bf16", tmp_path)


def test_every_kind_of_layout_is_in_the_documents() -> None:
    assert {"llama", "qwen2", "phi3", "mixtral", "gpt_oss"} <= {name for name, _, _ in LAYOUTS.values()}
