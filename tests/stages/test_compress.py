"""GPTQ and AWQ of a tiny model: what was packed is read back by hand, is nearer than rounding, has the same bits twice, or is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from hermes import params
from hermes.artifacts import file_hashes, read_json, write_manifest
from hermes.console import UserError
from hermes.data.calibration import calibration_ids
from hermes.model import compressed
from hermes.model.base import load
from hermes.settings.calibration import CalibrationSettings
from hermes.settings.compress import CompressSettings
from stages import compress

GROUP = 32
SETTINGS: dict[str, Any] = {"methods": ["gptq", "awq"], "group_size": GROUP, "awq_pairs": 4, "threads": 1}


def write_inputs(root: Path, model: Path) -> None:
    """The merged model, and pairs whose tokens come from a small part of the vocabulary, so that some columns matter more."""
    shutil.copytree(model, root / "models/merged")
    random = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, 200, (30,), generator=random).tolist() for _ in range(16)]
    rows = [{"prompt_ids": row[:10], "chosen_ids": row[10:], "rejected_ids": [1]} for row in ids]
    (root / "data/tokens").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "data/tokens/train.parquet")
    for folder in ("models/merged", "data/tokens"):
        write_manifest(root / folder)


def run(monkeypatch: pytest.MonkeyPatch, pairs: int = 12, **changes: Any) -> None:
    loaded = compress.Params(
        bits="portable", calibration=CalibrationSettings(pairs=pairs), compress=CompressSettings(**SETTINGS | changes)
    )
    monkeypatch.setattr(params, "load", lambda _: loaded)
    monkeypatch.setattr(compress, "set_determinism", lambda _: None)
    compress.main()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    root = tmp_path_factory.mktemp("compress")
    write_inputs(root, tiny_model_folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(root)
        run(monkeypatch)
    return root


def unpacked(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The matrix of this name by hand: 8 levels of 4 bits an int32, the lowest first, less the zero point, times the scale."""

    def levels(packed: torch.Tensor, count: int) -> torch.Tensor:
        shifts = torch.arange(0, 32, 4)
        return ((packed.unsqueeze(-1) >> shifts) & 15).flatten(1)[:, :count]

    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    scale = tensors[f"{name}.weight_scale"].float()
    zero = levels(tensors[f"{name}.weight_zero_point"].T.contiguous(), rows).T  # packed along the rows
    found = levels(tensors[f"{name}.weight_packed"], columns)
    return (found - zero.repeat_interleave(GROUP, 1)).float() * scale.repeat_interleave(GROUP, 1)


def nearest(weight: torch.Tensor) -> torch.Tensor:
    """Every weight rounded to the nearest of 16 levels between the least and the largest of its group, and zero."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 15
    zero = (-low / scale).round()
    return (((groups / scale).round() + zero).clamp(0, 15) - zero).mul(scale).flatten(1)


def inputs_of(model: PreTrainedModel, name: str, sequences: list[list[int]]) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    with torch.inference_mode(), model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0][0])):
        for ids in sequences:
            model(input_ids=torch.tensor([ids]))
    return torch.cat(seen).float()


def test_gptq_as_packed_by_hand_makes_a_smaller_error_on_what_it_saw_than_rounding(made: Path) -> None:
    model = load(made / "models/merged", torch.float32)
    tensors = load_file(made / "models/compressed/gptq/model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    weight = model.get_parameter(f"{name}.weight").detach()
    seen = inputs_of(model, name, calibration_ids(12, made / "data/tokens"))
    errors = [float((seen @ (other - weight).T).norm()) for other in (unpacked(tensors, name), nearest(weight))]
    assert 0 < errors[0] < 0.95 * errors[1]
    assert float((unpacked(tensors, name) - weight).norm() / weight.norm()) < 0.2
    loaded = load(made / "models/compressed/gptq", torch.float32)
    assert torch.equal(loaded.get_parameter(f"{name}.weight"), unpacked(tensors, name).bfloat16().float())


def distance(made: Path, method: str, root: Path) -> float:
    """KL to the model itself on the calibration pairs, in nats a token."""
    total, tokens = 0.0, 0
    model, other = (
        load(made / "models/merged", torch.float32),
        load(root / f"models/compressed/{method}", torch.float32),
    )
    with torch.inference_mode():
        for ids in calibration_ids(12, made / "data/tokens"):
            p, q = (m(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1) for m in (model, other))
            total, tokens = total + float((p.exp() * (p - q)).sum()), tokens + len(ids)
    return total / tokens


def test_both_are_near_the_model_and_smaller(made: Path) -> None:
    found = read_json(made / "models/compressed/compress.json")["files"]
    assert list(found) == ["awq", "gptq"]
    assert (found["gptq"]["pairs"], found["gptq"]["tokens"], found["awq"]["pairs"]) == (12, 360, 4)
    for method in ("gptq", "awq"):
        assert 0 < distance(made, method, made) < 0.05
        assert found[method]["group_size"] == GROUP
        assert found[method]["bytes"] < (made / "models/merged/model.safetensors").stat().st_size


def test_a_folder_is_complete_readable_by_transformers_and_says_nothing_of_when_and_where(made: Path) -> None:
    for method in ("gptq", "awq"):
        folder = made / "models/compressed" / method
        names = {path.name for path in folder.iterdir()}
        assert names >= {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "chat_template.jinja",
        }
        assert not names & {"recipe.yaml", "manifest.json", "merge.json"}
        assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())
        config = json.loads((folder / "config.json").read_text())
        assert config["quantization_config"]["format"] == "pack-quantized"
        assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] is False
        assert str(made) not in (folder / "config.json").read_text()
        options = CompressedTensorsConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=options, dtype=torch.float32)
        ours = load(folder, torch.float32)
        ids = torch.tensor([[1, 5, 9]])
        assert torch.equal(model(ids).logits, ours(ids).logits)


@pytest.mark.slow
def test_a_second_run_has_the_same_bits_and_other_pairs_have_others(
    made: Path, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_inputs(tmp_path, tiny_model_folder)
    monkeypatch.chdir(tmp_path)
    run(monkeypatch)
    assert file_hashes(tmp_path / "models/compressed") == file_hashes(made / "models/compressed")
    run(monkeypatch, pairs=6, methods=["gptq"])
    one, other = (root / "models/compressed/gptq/model.safetensors" for root in (tmp_path, made))
    assert one.read_bytes() != other.read_bytes()
    assert not (tmp_path / "models/compressed/awq").exists()


def test_no_methods_make_an_empty_folder(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_inputs(tmp_path, tiny_model_folder)
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, methods=[])
    assert read_json(Path("models/compressed/compress.json")) == {"files": {}}
    assert sorted(path.name for path in Path("models/compressed").iterdir()) == ["compress.json", "manifest.json"]


TINY: dict[str, Any] = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
WIDE: dict[str, Any] = {**TINY, "hidden_size": 64, "intermediate_size": 96}


@pytest.mark.parametrize(
    ("model", "methods", "message"),
    [
        (
            lambda: MixtralForCausalLM(MixtralConfig(**WIDE, num_local_experts=2, num_key_value_heads=2)),
            ["gptq"],
            r"^MixtralForCausalLM: a mixture of experts, .*; set `compress\.methods: \[\]`$",
        ),
        (
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_layer=1, n_head=2, n_embd=32)),
            ["gptq"],
            r"^GPT2LMHeadModel: its matrices are Conv1D layers, not Linear; set `compress\.methods: \[\]`$",
        ),
        (
            lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**WIDE)),
            ["gptq", "awq"],
            r"^GPTNeoXForCausalLM: llm-compressor does not know what AWQ may scale in it; take awq out of `compress\.methods`$",
        ),
    ],
)
def test_an_architecture_that_was_not_tried_is_refused(model: Any, methods: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compressed.check(model(), methods)
    if methods != ["gptq"]:
        compressed.check(model(), ["gptq"])
        assert "embed_out" not in compressed.matrices(model())


@pytest.mark.parametrize(
    ("widths", "wanted", "expected"),
    [
        ((128, 256), None, 128),
        ((64, 192), None, 64),
        ((64, 96), None, 32),
        ((64, 96), 32, 32),
        ((64, 96), 64, r"^`compress\.group_size`: 64 does not divide a matrix's 96 inputs; set it to 32$"),
        (
            (64, 72),
            None,
            r"^`compress\.group_size`: 32 does not divide a matrix's 72 inputs; set `compress\.methods: \[\]`$",
        ),
    ],
)
def test_a_group_has_to_divide_every_width(widths: tuple[int, int], wanted: int | None, expected: Any) -> None:
    config = LlamaConfig(**TINY, hidden_size=widths[0], intermediate_size=widths[1], num_key_value_heads=2)
    model = LlamaForCausalLM(config)
    if isinstance(expected, int):
        assert compressed.group_size(model, wanted) == expected
    else:
        with pytest.raises(UserError, match=expected):
            compressed.group_size(model, wanted)


def test_gptq_that_falls_back_to_rounding_is_refused(tiny_model_folder: Path) -> None:
    model = load(tiny_model_folder, torch.float32)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(float("nan"))  # so that no Hessian can be inverted
    with pytest.raises(
        UserError, match=r"^GPTQ cannot invert what it measured of .*; raise `calibration\.pairs`, or take gptq out"
    ):
        compressed.compress(model, "gptq", [[1, 2, 3]], GROUP)


def test_awq_that_finds_nothing_to_scale_is_refused(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcompressor.modifiers.transform.awq.base.get_layer_mappings_from_model", lambda _: [])
    with pytest.raises(UserError, match=r"^AWQ finds no matrices whose inputs it could scale"):
        compressed.compress(load(tiny_model_folder, torch.float32), "awq", [[1, 2, 3]], GROUP)


def test_calibration_pairs_are_evenly_spaced(tmp_path: Path) -> None:
    rows = [{"prompt_ids": [i], "chosen_ids": [100 + i], "rejected_ids": [0]} for i in range(10)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    assert calibration_ids(4, tmp_path) == [[0, 100], [2, 102], [5, 105], [7, 107]]
    assert len(calibration_ids(99, tmp_path)) == 10
    pq.write_table(pa.Table.from_pylist(rows).slice(0, 0), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"train\.parquet: has no pair to calibrate on; see reports/data\.json$"):
        calibration_ids(4, tmp_path)
