"""vLLM reads the folders that the stage compress writes, and finds their answers as likely as Transformers does. Where it is installed."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from hermes.bits import cpu_flags
from hermes.evaluation.chat_models import score
from hermes.model import compressed
from hermes.model.base import load
from tests.conftest import write_llama_for_vllm

PYTHON = Path(__file__).parent.parent / ".venv/vllm/bin/python"
ASK = """
import json, sys
from vllm import LLM, SamplingParams
folder, dtype, asked = sys.argv[1], sys.argv[2], json.load(open(sys.argv[3]))
model = LLM(folder, dtype=dtype, max_model_len=256, enforce_eager=True, skip_tokenizer_init=True, seed=0)
options = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
found = model.generate([{"prompt_token_ids": ids} for ids in asked], options, use_tqdm=False)
sums = [[next(iter(step.values())).logprob if step else 0.0 for step in one.prompt_logprobs] for one in found]
json.dump(sums, open(sys.argv[4], "w"))
"""
PROMPT = 12


def ask_vllm(folder: Path, dtype: str, asked: list[list[int]], scratch: Path) -> list[float]:
    """The log-likelihood of what follows the first tokens of each sequence, in nats."""
    (scratch / "asked.json").write_text(json.dumps(asked))
    command = [PYTHON, "-c", ASK, folder, dtype, scratch / "asked.json", scratch / "found.json"]
    own = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "2",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    own.pop("CUDA_VISIBLE_DEVICES", None)
    result = subprocess.run([str(part) for part in command], env=own, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return [sum(steps[PROMPT:]) for steps in json.loads((scratch / "found.json").read_text())]


def ask_transformers(folder: Path, asked: list[list[int]]) -> list[float]:
    model, found = load(folder, torch.float32), []
    with torch.inference_mode():
        for ids in asked:
            logits = model(input_ids=torch.tensor([ids])).logits[0]
            found.append(score(logits[PROMPT - 1 : -1], ids[PROMPT:])[0])
    return found


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.is_file(), reason="./setup.sh vllm has not run here")
def test_vllm_finds_answers_as_likely_as_transformers(
    tmp_path: Path, embedded_tokenizer: PreTrainedTokenizerBase
) -> None:
    write_llama_for_vllm(tmp_path / "model", embedded_tokenizer, torch.bfloat16)
    random = torch.Generator().manual_seed(1)
    asked = [torch.randint(0, len(embedded_tokenizer), (32,), generator=random).tolist() for _ in range(8)]
    folders = {"float32": tmp_path / "model"}
    for method in ("gptq", "awq"):
        model = load(tmp_path / "model", torch.float32)
        compressed.compress(model, method, asked, 32)
        compressed.save(model, tmp_path / "model", tmp_path / method, torch.bfloat16)
        folders[f"float16 {method}"] = tmp_path / method
    for name, folder in folders.items():
        if name != "float32" and "avx512f" not in cpu_flags():  # which vLLM's product of 4-bit weights is compiled for
            continue
        theirs, ours = ask_vllm(folder, name.split()[0], asked, tmp_path), ask_transformers(folder, asked)
        apart = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
        assert apart < (1e-3 if name == "float32" else 0.1), (name, apart)
    plain, other = (ask_transformers(tmp_path / name, asked) for name in ("model", "gptq"))
    assert max(abs(a - b) for a, b in zip(plain, other, strict=True)) > 0.15  # so that the bound above says something
