"""The GGUF file of many architectures against Transformers: the ids of texts, and the logits of a few sequences.

docs/bring-a-model.md has the result as a table, which is what is expected here. The models are random and small. Their weights are float16
numbers, so that a file in float16 holds them exactly, and only the rounding of what llama.cpp computes with is left.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from ruamel.yaml import YAML
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from hermes.console import UserError
from hermes.model import gguf_files
from hermes.model.base import load
from hermes.model.base_check import check_base
from hermes.model.gguf import GgufModel
from tests.conftest import table_of
from tests.hermes.test_architectures import small_model
from tests.test_families import gemma_tokenizer, save_tokenizer

TOLERANCE = 0.0025  # of the logits' standard deviation; some 0.001 is rounding, and what is wrong is above 0.004
FAST = ("qwen2", "gemma2 query_pre_attn_scalar=16")
SENTENCEPIECE = ("gemma", "gemma2", "gemma3_text", "qwen2")


def read_families() -> dict[str, tuple[str, dict[str, Any], str]]:
    """The table: model type, settings and result of each of its models."""
    found = {}
    for names, settings, result in table_of("Which GGUF files are right?"):
        changes = {k: v for part in re.findall(r"`([^`]+)`", settings) for k, v in YAML(typ="safe").load(part).items()}
        for name in re.findall(r"`(\w+)`", names):
            found[" ".join([name, *(f"{k}={v}" for k, v in changes.items())])] = (name, changes, result)
    return found


FAMILIES = read_families()


def write_model(name: str, changes: dict[str, Any], folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A small model whose weights are float16 numbers, stored in float32."""
    tokens = {f"{key}_token_id": getattr(tokenizer, f"{key}_token_id") for key in ("bos", "eos", "pad")}
    model = small_model(name, **{"vocab_size": len(tokenizer), "max_position_embeddings": 512, **tokens, **changes})
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if name.startswith("gemma") and weight.ndim < 2 and "norm" in key:
                weight.sub_(1)  # its norms add one, and twice that would make what is rounded twice as large
            weight.copy_(weight.half().float())
    model.generation_config = GenerationConfig(**tokens)
    model.save_pretrained(folder)
    save_tokenizer(name, folder, tokenizer)


def distance(folder: Path, file: Path, size: int) -> float:
    """How far the file's logits are from those of Transformers in float32, in standard deviations of these."""
    generator = torch.Generator().manual_seed(0)
    prompts, answers = (
        [torch.randint(5, size, (n,), generator=generator).tolist() for n in counts] for counts in ((5, 40), (6, 20))
    )
    with GgufModel(file, threads=1, slots=2, context=128) as model:
        found = torch.cat([row for (row,) in model.answer_logits(prompts, [[answer] for answer in answers])])
    reference = load(folder, torch.float32).eval()
    expected = []
    with torch.no_grad():
        for prompt, answer in zip(prompts, answers, strict=True):
            expected.append(reference(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1])
    wanted = torch.cat(expected)
    return float((found - wanted).square().mean().sqrt() / wanted.std())


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family in FAST else pytest.mark.slow) for family in FAMILIES]
)
def test_the_gguf_file_of_every_family_is_what_the_documents_say(
    family: str, tmp_path: Path, embedded_tokenizer: PreTrainedTokenizerBase
) -> None:
    (name, changes, result), folder, file = FAMILIES[family], tmp_path / "model", tmp_path / "f16.gguf"
    tokenizer = gemma_tokenizer(folder) if name in SENTENCEPIECE else embedded_tokenizer
    write_model(name, changes, folder, tokenizer)
    verdict, _, why = result.partition(": ")
    if verdict == "refused":
        with pytest.raises(UserError, match=re.escape(re.findall(r"`([^`]+)`", why)[0])) as error:
            check_base(folder)
        assert "\n" not in str(error.value)
        return
    gguf_files.convert(folder, file, "f16")
    if verdict != "equal logits":
        read = AutoTokenizer.from_pretrained(folder)
        gguf_files.check_vocabulary(file, gguf_files.metadata(GGUFReader(file)), read)
    found = distance(folder, file, len(tokenizer))
    assert (found < TOLERANCE) == verdict.startswith("equal"), f"{found:.2g}"


def test_the_families_that_people_tune_are_in_the_documents() -> None:
    tuned = {"llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2", "granite"}
    assert tuned | {"cohere", "gpt_oss", "mixtral"} <= {name for name, _, _ in FAMILIES.values()}
