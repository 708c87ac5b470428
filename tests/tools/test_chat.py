"""Two conversations run beside each other, each on its own history, and end quietly."""

import io
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from hermes.console import UserError
from hermes.evaluation.greedy import answer_alone
from hermes.model.base import load
from hermes.model.compressed import compress, save
from tools import chat
from tools.chat import Conversation

EOS = 0


class Letters:
    """A tokenizer whose ids are code points; a turn is `<q:...>` or `<a:...>`, and an answer begins with `<a:`."""

    def apply_chat_template(self, turns: list[dict[str, str]], **options: Any) -> str:
        assert options == {"add_generation_prompt": True, "tokenize": False}
        return "".join(f"<{'q' if turn['role'] == 'user' else 'a'}:{turn['content']}>" for turn in turns) + "<a:"

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class Script:
    """A model that gives the answers it is told, and keeps the prompts it saw."""

    ends = frozenset({EOS})

    def __init__(self, answers: Iterable[str], context: int = 1000) -> None:
        self.answers, self.context = iter(answers), context
        self.prompts: list[str] = []

    def generate(self, prompts: list[list[int]], max_new_tokens: int, /, *, stopped: Any) -> list[list[int]]:
        (prompt,) = prompts
        assert len(prompt) + max_new_tokens <= self.context
        self.prompts.append("".join(map(chr, prompt)))
        answer = [*map(ord, next(self.answers)), EOS][:max_new_tokens]
        assert not any(stopped(answer[:n]) for n in range(1, len(answer) + 1))
        return [answer]


def conversation(model: Script) -> Conversation:
    return Conversation(model, Letters())  # type: ignore[arg-type]


def talk(monkeypatch: pytest.MonkeyPatch, typed: str, conversations: dict[str, Conversation]) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    console = Console(file=io.StringIO(), width=60)
    chat.chat(conversations, False, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_each_model_goes_on_from_its_own_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = Script(["L1", "L2"]), Script(["R1", "R2"])
    talk(monkeypatch, "one\ntwo\n", {"left": conversation(left), "right": conversation(right)})
    assert left.prompts == ["<q:one><a:", "<q:one><a:L1><q:two><a:"]
    assert right.prompts == ["<q:one><a:", "<q:one><a:R1><q:two><a:"]


def test_answers_stand_beside_each_other_under_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = talk(
        monkeypatch, "why?", {"left": conversation(Script(["[b]ecause"])), "right": conversation(Script(["so"]))}
    )
    assert "you> why?" in shown
    assert any("[b]ecause" in line and "so" in line for line in shown.splitlines())


def test_reset_forgets_and_quit_ends_and_empty_lines_are_no_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Script(["1", "2"])
    talk(monkeypatch, "one\n\n  \n/reset\ntwo\n/quit\nthree\n", {"it": conversation(model)})
    assert model.prompts == ["<q:one><a:", "<q:two><a:"]


def test_a_full_context_forgets_the_oldest_turns() -> None:
    model = Script(["1", "2", "3"], context=45)
    it = conversation(model)
    for question in ("first", "second", "third"):
        it.ask(question, max_new_tokens=10)
    assert model.prompts[1:] == ["<q:first><a:1><q:second><a:", "<q:second><a:2><q:third><a:"]


def test_a_question_that_does_not_fit_leaves_the_history_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Script(["1", "2"], context=chat.MAX_NEW_TOKENS + 40)
    it = conversation(model)
    shown = talk(monkeypatch, f"one\n{'x' * 100}\ntwo\n", {"it": it})
    assert "a question of 107 tokens is too long; 40 fit" in shown
    assert model.prompts == ["<q:one><a:", "<q:one><a:1><q:two><a:"]
    with pytest.raises(UserError):
        it.ask("x" * 100)


def test_an_unfinished_answer_says_so() -> None:
    assert conversation(Script(["12345"])).ask("?", max_new_tokens=3) == "123 [...]"
    assert conversation(Script(["12345"])).ask("?", max_new_tokens=6) == "12345"


def test_an_answer_ends_where_the_chat_template_ends_one(gguf_file: Path, byte_tokenizer: Any) -> None:
    byte_tokenizer.chat_template = byte_tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>")
    with chat.open_model(gguf_file, byte_tokenizer) as model:
        assert model.ends == {byte_tokenizer.convert_tokens_to_ids("<|endoftext|>"), byte_tokenizer.eos_token_id}


def test_missing_models_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["chat"])
    with pytest.raises(UserError, match=r"^models/gguf/\*\.gguf: no such file; run: make repro$"):
        chat.main()
    with pytest.raises(UserError, match=r"^models/base: no model there; run: make repro$"):
        chat.base_gguf()
    with pytest.raises(UserError, match=r"^MODEL=gptq: neither a GGUF file .*; there is nothing here$"):
        chat.find_model("gptq")
    chat.GGUF.mkdir(parents=True)
    (chat.GGUF / "Q8_0.gguf").touch()
    with pytest.raises(UserError, match=r"^models/merged: no tokenizer there; run: make repro$"):
        chat.tokenizer_of(chat.GGUF / "Q8_0.gguf")


def test_a_model_is_found_by_its_name_or_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chat.GGUF.mkdir(parents=True)
    for name, content in {"Q8_0": b"large", "Q4_0": b"less", "imatrix": b""}.items():
        (chat.GGUF / f"{name}.gguf").write_bytes(content)
    for folder in (chat.MERGED, chat.COMPRESSED / "gptq", Path("elsewhere"), Path("pickled"), Path("half")):
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
        (folder / ("model.bin" if folder.name == "pickled" else "model.safetensors")).touch()
    Path("half/config.json").unlink()
    (chat.COMPRESSED / "compress.json").touch()
    Path("elsewhere/x.gguf").touch()
    assert chat.find_model(None) == chat.GGUF / "Q8_0.gguf"
    (chat.GGUF / "f16.gguf").write_bytes(b"the largest")
    assert chat.find_model(None) == chat.GGUF / "Q8_0.gguf"  # f16 is not rounded
    (chat.GGUF / "f16.gguf").unlink()
    for name, path in {
        "Q8_0": chat.GGUF / "Q8_0.gguf",
        "gptq": chat.COMPRESSED / "gptq",
        "merged": chat.MERGED,
        "elsewhere": Path("elsewhere"),
        "elsewhere/x.gguf": Path("elsewhere/x.gguf"),
        f"{tmp_path}/elsewhere": tmp_path / "elsewhere",
    }.items():
        assert chat.find_model(name) == path
    for name in ("Q4_K_M", "imatrix", "pickled", "half", "elsewhere/config.json", "../Q8_0", ""):
        with pytest.raises(UserError, match=rf"^MODEL={name}: neither .*; there is Q4_0, Q8_0, gptq, merged$"):
            chat.find_model(name)


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_answers_with_the_likeliest_tokens_as_they_come(
    packed: bool, byte_model_folder: Path, byte_tokenizer: Any, tmp_path: Path
) -> None:
    if packed:
        whole = load(byte_model_folder, torch.float32)
        compress(whole, "gptq", [[*range(3, 99)]] * 2, size=32)
        save(whole, byte_model_folder, tmp_path, torch.bfloat16)
    with chat.open_model(tmp_path if packed else byte_model_folder, byte_tokenizer) as model:
        assert model.ends == {byte_tokenizer.eos_token_id}
        it, grown = Conversation(model, byte_tokenizer), list[str]()
        ids = it.prompt([{"role": "user", "content": "Why?"}])
        (answer,) = model.generate([ids], 20, stopped=None)
        assert isinstance(model, chat.Folder)
        assert answer == answer_alone(model.model, ids, model.ends, 20)
        assert it.ask("Why?", max_new_tokens=20, show=grown.append).startswith(it.text(answer))
        assert grown == [it.text(answer[:n]) for n in range(1, len(answer) + 1)]


def test_a_file_from_elsewhere_is_read_with_the_tokenizer_inside_it(
    gguf_file: Path, embedded_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer = chat.tokenizer_of(gguf_file)
    assert tokenizer.chat_template == embedded_tokenizer.chat_template
    turns = [{"role": "user", "content": "naïve  café\n日本"}]
    with chat.open_model(gguf_file, tokenizer) as model:
        assert Conversation(model, tokenizer).prompt(turns) == Conversation(model, embedded_tokenizer).prompt(turns)
    damaged = tmp_path / "x.gguf"
    damaged.write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"x\.gguf: Transformers cannot read its tokenizer"):
        chat.tokenizer_of(damaged)


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path, byte_tokenizer: Any) -> None:
    byte_tokenizer.chat_template = None
    byte_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no chat template; choose a model that was tuned for conversations"):
        chat.tokenizer_of(tmp_path)


def test_the_base_stands_beside_the_tuned_model_and_beside_others_where_there_is_one(
    byte_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chat, "MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(chat, "base_gguf", lambda: byte_model_folder)

    def headings(name: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["chat", "--model", name])
        monkeypatch.setattr(sys, "stdin", io.StringIO("Why?\n"))
        chat.main()
        shown = capsys.readouterr().out
        return [heading for heading in ("mine", "tuned (merged)", "base (bf16)") if heading in shown]

    shutil.copytree(byte_model_folder, "mine")
    shutil.copytree(byte_model_folder, chat.MERGED)
    assert headings("mine") == ["mine"]
    shutil.copytree(byte_model_folder, chat.BASE)
    assert headings("mine") == ["mine", "base (bf16)"]
    assert headings("merged") == ["tuned (merged)", "base (bf16)"]


def test_the_base_is_converted_once_for_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    converted: list[bytes] = []

    def convert(model: Path, target: Path, kind: str) -> None:
        assert kind == "bf16"
        converted.append((model / "weights").read_bytes())
        target.write_bytes(b"gguf")

    monkeypatch.setattr(chat, "convert", convert)
    chat.BASE.mkdir(parents=True)
    (chat.BASE / "config.json").touch()
    for weights in (b"a", b"a", b"b"):
        (chat.BASE / "weights").write_bytes(weights)
        assert chat.base_gguf().read_bytes() == b"gguf"
    assert converted == [b"a", b"b"]


def test_an_answer_is_shown_as_it_grows_and_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    grown: list[str] = []
    assert conversation(Script(["abc"])).ask("?", show=grown.append) == "abc"
    assert grown == ["a", "ab", "abc", "abc"]
    shown = talk(monkeypatch, "?", {"it": conversation(Script(["red\x1b[31m\x07 alert"]))})
    assert "red[31m alert" in shown
    assert "\x1b" not in shown
