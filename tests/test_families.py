"""Every stage on a tiny random model of the families that people tune, from the data to the evaluation of a GGUF file."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from hermes.artifacts import read_json
from stages import evaluate, fetch_data, fetch_model, merge, quantize, reference, report, subset, tokenize, train
from tests.conftest import ROOT, cpu_params
from tests.hermes.test_architectures import small_config
from tests.test_pipeline import small_data

STAGES = (fetch_data, fetch_model, subset, tokenize, reference, train, merge, quantize, evaluate, report)
SEPARATE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES: dict[str, list[str]] = {
    "llama": SEPARATE,
    "qwen3": SEPARATE,
    "mistral": SEPARATE,
    "gemma2": SEPARATE,
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "granite": SEPARATE,
    "olmo2": SEPARATE,
}


def write_model(name: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = small_config(name)
    tokens = {f"{key}_token_id": getattr(tokenizer, f"{key}_token_id") for key in ("bos", "eos", "pad")}
    for key, value in {**tokens, "vocab_size": len(tokenizer), "max_position_embeddings": 512}.items():
        setattr(config, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).bfloat16()
    model.generation_config = GenerationConfig(**tokens)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_all_stages(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded_tokenizer: PreTrainedTokenizerBase
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(name, tmp_path / "my-model", embedded_tokenizer)
    small_data(tmp_path / "small-data")
    tree: dict[str, Any] = cpu_params(
        data={"source": "./small-data"},
        model={"source": "./my-model"},
        subset={"k": 12},
        base={"threads": 1},
        train={"lora_modules": FAMILIES[name], "batch_size": 4, "evaluations": 1},
        quantize={"types": ["Q8_0"]},
        evaluate={"types": ["f16", "Q8_0"], "max_new_tokens": 4, "divergence_pairs": 2, "threads": 1},
    )
    for file in ("dvc.yaml", "packages.yaml"):
        shutil.copy(ROOT / file, file)
    YAML().dump(tree, Path("params.yaml"))
    for stage in STAGES:
        stage.main()
    metrics = read_json(Path("reports/metrics.json"))
    assert abs(metrics["train"]["first_loss"] - 0.693147) < 5e-3
    assert metrics["gguf_kl"]["f16"] < 1e-3
    assert read_json(Path("models/merged/merge.json"))["base"] == "bf16"
    assert metrics["preference_accuracy"].keys() == {"base", "merged"}
