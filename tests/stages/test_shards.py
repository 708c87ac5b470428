"""A base in a hundred files goes through fetch_model, the check, merge and GGUF with the bits of the same base in one file."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig, get_peft_model
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from hermes.artifacts import check_together, read_json, write_json, write_manifest
from hermes.model import gguf_files
from hermes.model.base import load
from hermes.model.base_check import check_base
from hermes.model.safetensors_stream import INDEX, stored_tensors
from stages import fetch_model, merge
from stages.train import save_adapter
from tests.conftest import ROOT, cpu_params

SHARDS = 100


def write_model(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A random Llama of 110 tensors, in one file."""
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 12}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads, **tokens)).bfloat16()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def split(folder: Path) -> None:
    """Puts the tensors of model.safetensors into a hundred files and their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {key: f"model-{i % SHARDS + 1:05d}-of-{SHARDS:05d}.safetensors" for i, key in enumerate(sorted(tensors))}
    for name in set(places.values()):
        shard = {key: tensors[key].clone() for key, place in places.items() if place == name}
        save_file(shard, folder / name, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def run_both(scratch: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Path]:
    """The folders of a run from one file and of one from a hundred, which the merge writes as more than a hundred again."""
    places, source = {name: scratch / name for name in ("one", "many")}, scratch / "model"
    write_model(source, tokenizer)
    for name, place in places.items():
        place.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)
            shutil.copytree(source, "my-model")
            if name == "many":
                split(Path("my-model"))
            for file in ("dvc.yaml", "packages.yaml"):
                shutil.copy(ROOT / file, file)
            size = {"many": "1KB", "one": "1GB"}[name]
            tree = cpu_params(model={"source": "./my-model"}, merge={"max_shard_size": size, "base": "bf16"})
            YAML().dump(tree, Path("params.yaml"))
            fetch_model.main()
            model = load(fetch_model.BASE, torch.bfloat16)
            peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
            generator = torch.Generator().manual_seed(1)
            for key, parameter in peft.named_parameters():
                if "lora_" in key:
                    parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
            merge.ADAPTER.mkdir(parents=True)
            made_from = check_together(fetch_model.BASE)
            save_adapter(peft, merge.ADAPTER, made_from[str(fetch_model.BASE)])
            write_manifest(merge.ADAPTER, made_from=made_from)
            merge.main()
    return places


def contents(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of every tensor of a folder."""
    return {tensor.name: (tensor.dtype, tensor.shape, b"".join(tensor.pieces())) for tensor in stored_tensors(folder)}


def test_a_hundred_files_are_fetched_and_merged_as_one_is(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    merged = run_both(tmp_path, byte_tokenizer)
    for folder in (fetch_model.BASE, merge.MERGED):
        one, many = (merged[name] / folder for name in ("one", "many"))
        assert len(list(one.glob("*.safetensors"))) == 1
        assert len(list(many.glob("*.safetensors"))) >= SHARDS
        assert contents(many) == contents(one)
        same, split_ = (load(place, torch.bfloat16).state_dict() for place in (one, many))
        assert all(torch.equal(tensor, split_[key]) for key, tensor in same.items())
    assert contents(merged["one"] / merge.MERGED) != contents(merged["one"] / fetch_model.BASE)
    assert read_json(merged["many"] / merge.MERGED / "merge.json") == read_json(
        merged["one"] / merge.MERGED / "merge.json"
    )


@pytest.mark.slow
def test_a_hundred_files_are_checked_and_converted_as_one_is(
    tmp_path: Path, embedded_tokenizer: PreTrainedTokenizerBase
) -> None:
    merged = run_both(tmp_path, embedded_tokenizer)
    check_base(merged["many"] / fetch_model.BASE)
    readers = []
    for name, place in merged.items():
        gguf_files.convert(place / merge.MERGED, tmp_path / f"{name}.gguf", "f16")
        readers.append(GGUFReader(tmp_path / f"{name}.gguf"))
    one, many = readers
    assert gguf_files.metadata(one) == gguf_files.metadata(many)
    assert one.fields.keys() == many.fields.keys()
    found, expected = ({t.name: (t.tensor_type, t.data.tobytes()) for t in reader.tensors} for reader in (many, one))
    assert len(expected) == 110
    assert found == expected
