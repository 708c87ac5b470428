"""Ollama gets the texts of the chat template, or none at all."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from transformers import PreTrainedTokenizerBase

from hermes.artifacts import read_json, write_json
from hermes.console import UserError
from hermes.data.chat_template import apply
from hermes.model import llama3
from hermes.params import read_yaml
from tests.hermes import test_chat_templates as templates
from tools import modelfile
from tools.modelfile import Turns, Unwritable, turns_of

ROOT = Path(__file__).resolve().parents[2]
BOS = "<|begin_of_text|>"
CHATML = """\
{{ range $i, $_ := .Messages }}{{ if and (not $i) (ne .Role "system") }}<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
{{ end }}{{ if eq .Role "system" }}<|im_start|>system
{{ .Content }}<|im_end|>
{{ else if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ .Content }}<|im_end|>
{{ end }}{{ end }}<|im_start|>assistant
"""
LLAMA_3 = """\
{{ range $i, $_ := .Messages }}{{ if eq .Role "system" }}<|start_header_id|>system<|end_header_id|>

{{ .Content }}<|eot_id|>{{ else if eq .Role "user" }}<|start_header_id|>user<|end_header_id|>

{{ .Content }}<|eot_id|>{{ else if eq .Role "assistant" }}<|start_header_id|>assistant<|end_header_id|>

{{ .Content }}<|eot_id|>{{ end }}{{ end }}<|start_header_id|>assistant<|end_header_id|>

"""
LONG = [
    {"role": role, "content": f"{role} says\n\n  {i}: <b>{{{{ .Role }}}}</b> \\n"}
    for i, role in enumerate(["system", *["user", "assistant"] * 4, "user"])
]


@pytest.fixture(scope="module")
def llama_3() -> PreTrainedTokenizerBase:
    """Llama-3's tokenizer with the chat template of the profile a40."""
    tokenizer = llama3.tokenizer()
    tokenizer.chat_template = read_yaml(ROOT / "params.yaml")["profiles"]["a40"]["model"]["chat_template"]
    return tokenizer


def same_text(turns: Turns, tokenizer: PreTrainedTokenizerBase, first: str = "") -> bool:
    """Whether a conversation that was not shown before, with and without its system turn, is written as the chat template does."""
    return all(
        first + turns.text(messages) == apply(tokenizer, messages, add_generation_prompt=True)
        for messages in (LONG, LONG[1:], LONG[:2], LONG[1:2])
    )


def test_smollm2s_turns_and_its_own_system_prompt_are_written(embedded_tokenizer: PreTrainedTokenizerBase) -> None:
    turns, trims = turns_of(embedded_tokenizer)
    assert not trims
    assert turns.go() == CHATML
    assert same_text(turns, embedded_tokenizer)


def test_llama_3s_turns_are_written_behind_the_token_that_llama_cpp_puts_in_front(
    llama_3: PreTrainedTokenizerBase,
) -> None:
    turns, trims = turns_of(llama_3, first=BOS)
    assert trims
    assert turns.go() == LLAMA_3
    assert same_text(turns, llama_3, first=BOS)
    written, _ = turns_of(llama_3)
    assert same_text(written, llama_3)


def test_a_template_without_a_system_prompt_of_its_own_writes_none(byte_tokenizer: Any) -> None:
    byte_tokenizer.chat_template = templates.CHATML
    turns, _ = turns_of(byte_tokenizer)
    assert turns.unasked == ""
    assert " (not $i)" not in turns.go()
    assert same_text(turns, byte_tokenizer)


@pytest.mark.parametrize(
    ("template", "first", "message"),
    [
        (templates.QWEN_3, "", "user, assistant, user is not written turn by turn"),
        (templates.LLAMA_2, "", "system, user is not written turn by turn"),
        (templates.MISTRAL, "", "system, user is not written turn by turn"),
        (templates.GEMMA, "", "refuses the turns system, user"),
        (templates.CHATML.replace("m['content']", "m['content'] | upper"), "", "user is not written turn by turn"),
        (templates.CHATML.replace("m['content']", "m['content'].split('</think>')[-1]"), "", "is not written turn by turn"),
        (templates.CHATML.replace("m['role'] +", "m['role'] + (loop.length | string) +"), "", "is not written turn"),
        ("{{ strftime_now('%d') }}" + templates.CHATML, "", "writes today's date"),
        (templates.CHATML, BOS, rf"writes no {BOS} in front, which llama.cpp does".replace("|", r"\|")),
    ],
)  # fmt: skip
def test_a_template_of_another_shape_is_refused(byte_tokenizer: Any, template: str, first: str, message: str) -> None:
    byte_tokenizer.chat_template = template
    with pytest.raises(Unwritable, match=f"^chat template: .*{message}"):
        turns_of(byte_tokenizer, first)


def test_a_modelfile_names_the_file_the_texts_and_the_ends(gguf_file: Path, tiny_model_folder: Path) -> None:
    assert modelfile.modelfile(gguf_file, tiny_model_folder, gguf_file.name) == (
        f'FROM ./f16.gguf\nTEMPLATE """{CHATML}"""\n'
        'PARAMETER temperature 0\nPARAMETER num_ctx 512\nPARAMETER stop "<|im_end|>"\n'
    )


def test_the_command_writes_the_one_of_a_file_of_the_run(
    gguf_file: Path,
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model_folder, modelfile.MERGED)
    modelfile.GGUF.mkdir()
    for name in ("Q4_0", "Q8_0"):
        shutil.copy(gguf_file, modelfile.GGUF / f"{name}.gguf")
    for options, name in (((), "Q8_0"), (("--model", "Q4_0"), "Q4_0")):
        monkeypatch.setattr(sys, "argv", ["modelfile", *options])
        modelfile.main()
        assert capsys.readouterr().out.startswith(f'FROM ./models/gguf/{name}.gguf\nTEMPLATE """')
    monkeypatch.setattr(sys, "argv", ["modelfile", "--model", "merged"])
    with pytest.raises(UserError, match=r"^--model merged: no file of models/gguf; choose one of Q4_0, Q8_0$"):
        modelfile.main()


@pytest.fixture
def changed(gguf_file: Path, tiny_model_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of the tiny model's GGUF and folder."""
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    return Path(shutil.copy(gguf_file, tmp_path / "x.gguf")), tmp_path / "model"


def test_what_llama_cpp_puts_in_front_is_left_to_it(changed: tuple[Path, Path]) -> None:
    file, folder = changed
    reader = GGUFReader(file, "r+")
    reader.fields["tokenizer.ggml.add_bos_token"].parts[-1][0] = True
    reader.data.flush()
    found = modelfile.modelfile(file, folder, "x.gguf")  # whose token of this kind begins every turn
    assert '(ne .Role "system") }}system\nYou are' in found
    assert '{{ if eq .Role "system" }}system\n{{ .Content }}<|im_end|>\n{{ else' in found
    assert '{{ else if eq .Role "user" }}<|im_start|>user\n' in found


def test_a_long_context_is_cut(changed: tuple[Path, Path]) -> None:
    file, folder = changed
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"max_position_embeddings": 131_072})
    assert "PARAMETER num_ctx 8192\n" in modelfile.modelfile(file, folder, "x.gguf")


def test_white_space_that_only_the_chat_template_takes_is_told(changed: tuple[Path, Path]) -> None:
    file, folder = changed
    (folder / "chat_template.jinja").write_text(templates.CHATML.replace("m['content']", "m['content'] | trim"))
    assert modelfile.modelfile(file, folder, "x.gguf").startswith("# The chat template takes white space from the ends")


@pytest.mark.parametrize("odd", ['"""', "{{ '{{' }}", "\x07"])
def test_texts_that_a_modelfile_cannot_hold_are_refused(changed: tuple[Path, Path], odd: str) -> None:
    file, folder = changed
    (folder / "chat_template.jinja").write_text(odd + templates.CHATML)
    with pytest.raises(Unwritable, match=r"^chat template: writes .*, which a Modelfile cannot hold$"):
        modelfile.modelfile(file, folder, "x.gguf")
