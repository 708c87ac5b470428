"""What several tests need, built in this process and without a network: tokenizers, a tiny model and its GGUF, lm-eval's tasks.

The tests hold for the CPU, to the bit in places, so a GPU is hidden from them and from what they start; `make gpu-check` tries that.
"""

import os
import re
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
os.environ["OMP_NUM_THREADS"] = "1"  # for tiny models, threads cost more than they save

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

from hermes.artifacts import sha256_file, write_json
from hermes.model import gguf_files
from hermes.params import read_yaml
from stages.fetch_model import EMBEDDED_FILE, EMBEDDED_PACKAGE

ROOT = Path(__file__).resolve().parent.parent

SPECIAL = {
    "unk_token": "<|endoftext|>",
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
}
# SmolLM2's, which writes a system turn where a conversation has none.
CHAT_TEMPLATE = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful assistant<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

LONGEST = (
    "test_memory_plan.py",
    "test_kills.py",
    "test_pipeline.py",
    "test_rehearse.py",
    "test_collect.py",
    "test_fetch_data.py",
    "test_fetch_hub.py",
    "test_families.py",
    "test_train.py",
    "test_run_benchmarks.py",
    "test_gguf_families.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that the cores end together; `make test` gives each core whole files."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def table_of(heading: str) -> list[list[str]]:
    """The rows of the table below this heading of docs/bring-a-model.md, without its first: what tests expect, readers see."""
    section = (ROOT / "docs/bring-a-model.md").read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def cpu_params(**sections: dict[str, Any]) -> dict[str, Any]:
    """The committed params.yaml with `cpu` as its only profile, in which these sections have other values."""
    tree = read_yaml(ROOT / "params.yaml")
    profile = tree["profiles"]["cpu"] | {"merge": tree["profiles"]["cpu"]["merge"] | {"base": "bf16"}}
    return tree | {"profile": "cpu", "profiles": {"cpu": profile | {k: profile[k] | v for k, v in sections.items()}}}


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows the 256 bytes and the special tokens of ChatML, under SmolLM2's ids and chat template."""
    names = [*dict.fromkeys(SPECIAL.values()), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **SPECIAL)


@pytest.fixture
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One id per byte; a fresh one, which a test may change."""
    return make_byte_tokenizer()


def load_embedded_tokenizer() -> PreTrainedTokenizerBase:
    """The embedded model's own, which llama.cpp's converter knows."""
    folder = Path(str(distribution(EMBEDDED_PACKAGE).locate_file(EMBEDDED_PACKAGE.replace("-", "_"))))
    return AutoTokenizer.from_pretrained(folder, gguf_file=EMBEDDED_FILE)


@pytest.fixture(scope="session")
def embedded_tokenizer() -> PreTrainedTokenizerBase:
    """The same, loaded once."""
    return load_embedded_tokenizer()


def write_llama_for_vllm(folder: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> Path:
    """A random Llama whose heads are of a width that vLLM has on a CPU."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    (model.bfloat16() if dtype == torch.bfloat16 else model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_random_llama(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A random, narrow Llama with this tokenizer, as fetch_model leaves one."""
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **tokens,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).bfloat16()
    model.generation_config = GenerationConfig(**tokens)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    files = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
    write_json(folder / "manifest.json", {"source": "tests/tiny", "revision": "0" * 40, "files": files})
    return folder


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory, embedded_tokenizer: PreTrainedTokenizerBase) -> Path:
    """A random model with the embedded one's tokenizer, whose 49,152 ids are nearly all of it; copy it to change it."""
    return write_random_llama(tmp_path_factory.mktemp("tiny") / "base", embedded_tokenizer)


@pytest.fixture(scope="session")
def byte_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 259 ids, which trains fast; llama.cpp's converter does not know its tokenizer."""
    return write_random_llama(tmp_path_factory.mktemp("bytes") / "base", make_byte_tokenizer())


@pytest.fixture(scope="session")
def gguf_file(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in float16."""
    path = tmp_path_factory.mktemp("gguf") / "f16.gguf"
    gguf_files.convert(tiny_model_folder, path, "f16")
    return path


@pytest.fixture(scope="session")
def manager() -> "TaskManager":
    """The index of lm-eval's tasks and the project's own."""
    from hermes.evaluation import suite_tasks  # which takes seconds to import

    return suite_tasks.task_manager()
