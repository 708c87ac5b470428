"""A Modelfile, from which Ollama makes a model of a GGUF file: with the texts of the chat template, greedily, up to where an answer ends.

    python -m tools.modelfile >Modelfile                      the largest rounded file of models/gguf
    python -m tools.modelfile --model Q5_0 >Modelfile         another of them

Ollama's templates are Go's, in which a chat template cannot be written in general. So conversations are shown to the chat template, and
what it writes around the text of each role becomes the template. A chat template that writes anything else is refused.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
from transformers import PreTrainedTokenizerBase

from hermes.console import UserError, say
from hermes.data.chat_template import Messages
from hermes.data.chat_text import ends_of_answer, rendered
from hermes.model.base import load_config
from hermes.model.gguf import GgufModel
from hermes.model.tokenizer import load_tokenizer
from hermes.run import run_tool
from tools.chat import GGUF, MERGED, find_model, gguf_files

LONGEST = 8192  # tokens of a context; a longer one takes gigabytes beside the model
ROLES = ("system", "user", "assistant")
CONVERSATIONS = ("user", "user assistant user", "system user", "system user assistant user assistant user")
TEXTS = ("Tell me about salt.", "a\n\nb\n", " {{ .Role }} ", "<think>\nWhy?\n</think>\n\nSo.", "assistant: No.", "1")


class Unwritable(UserError):
    """A chat template that has no counterpart in a Modelfile."""


@dataclass(frozen=True)
class Turns:
    """What a chat template writes: around the text of each role, where a conversation has no system turn, and before an answer."""

    before: Mapping[str, str]
    after: Mapping[str, str]
    unasked: str
    answer: str

    def text(self, messages: Messages) -> str:
        """A conversation up to where the next answer begins."""
        unasked = "" if messages[0]["role"] == "system" else self.unasked
        turns = (f"{self.before[m['role']]}{m['content']}{self.after[m['role']]}" for m in messages)
        return f"{unasked}{''.join(turns)}{self.answer}"

    def go(self) -> str:
        """The same as a Go template over `.Messages`; no action has a trimming dash, which would take the line breaks between turns."""
        unasked = f'{{{{ if and (not $i) (ne .Role "system") }}}}{self.unasked}{{{{ end }}}}' if self.unasked else ""
        turns = "{{ else ".join(
            f'if eq .Role "{role}" }}}}{self.before[role]}{{{{ .Content }}}}{self.after[role]}' for role in ROLES
        )
        return f"{{{{ range $i, $_ := .Messages }}}}{unasked}{{{{ {turns}{{{{ end }}}}{{{{ end }}}}{self.answer}"


def turns_of(tokenizer: PreTrainedTokenizerBase, first: str = "") -> tuple[Turns, bool]:
    """What a tokenizer's chat template writes, and whether it takes white space from the ends of a text, which Go's cannot.

    Args:
        tokenizer: has the chat template.
        first: what the runtime puts in front of a text by itself, and the template must not.

    Raises:
        Unwritable: the template writes something else, or refuses one of the conversations.
    """

    def written(messages: Messages, add_generation_prompt: bool = True) -> str:
        try:
            text = rendered(tokenizer, messages, add_generation_prompt)
        except UserError as error:
            raise Unwritable(str(error)) from None
        if not text.startswith(first):
            raise Unwritable(f"chat template: writes no {first} in front, which llama.cpp does")
        return text.removeprefix(first)

    def around(roles: str, add_generation_prompt: bool = False) -> list[str]:
        """What is written before, between and after the texts of these roles."""
        messages = conversation(roles, [f"<{i}>" for i in range(len(TEXTS))])
        rest, pieces = written(messages, add_generation_prompt), []
        for message in messages:
            piece, _, rest = rest.partition(message["content"])
            pieces.append(piece)
        return [*pieces, rest]

    if "strftime_now" in str(tokenizer.chat_template):
        raise Unwritable("chat template: writes today's date")
    opening, after_user = around("user")
    _, between, after_answer = around("user assistant")
    before_user = around("user assistant user")[2].removeprefix(after_answer)
    before_system, behind_system, _ = around("system user")
    turns = Turns(
        before={"system": before_system, "user": before_user, "assistant": between.removeprefix(after_user)},
        after={"system": behind_system.removesuffix(before_user), "user": after_user, "assistant": after_answer},
        unasked=opening.removesuffix(before_user),
        answer=around("user", add_generation_prompt=True)[1].removeprefix(after_user),
    )
    trims = False
    for roles in CONVERSATIONS:
        for shift in range(len(TEXTS)):
            messages = conversation(roles, TEXTS[shift:] + TEXTS[:shift])
            trimmed = [{**message, "content": message["content"].strip()} for message in messages]
            expected = written(messages)
            if expected == turns.text(trimmed) != turns.text(messages):
                trims = True
            elif expected != turns.text(messages):
                raise Unwritable(f"chat template: {roles.replace(' ', ', ')} is not written turn by turn")
    return turns, trims


def conversation(roles: str, texts: list[str] | tuple[str, ...]) -> list[dict[str, str]]:
    """Messages of these roles with the first of these texts."""
    return [{"role": role, "content": text} for role, text in zip(roles.split(), texts, strict=False)]


def modelfile(gguf: Path, model: Path, place: str) -> str:
    """The Modelfile of a GGUF file of the model in a folder.

    Args:
        gguf: the file.
        model: the folder.
        place: where the file lies, seen from the Modelfile.

    Raises:
        Unwritable: the chat template, or a token that ends an answer, cannot be written into one; says why.
    """
    tokenizer = load_tokenizer(model)
    with GgufModel(gguf, threads=1, weights=False) as file:
        adds_first = llama_cpp.llama_vocab_get_add_bos(file.vocab)
    turns, trims = turns_of(tokenizer, tokenizer.bos_token if adds_first else "")
    stops = [str(tokenizer.decode([id])) for id in sorted(ends_of_answer(tokenizer))]
    for text in (*turns.before.values(), *turns.after.values(), turns.unasked, turns.answer, *stops):
        if "{{" in text or '"""' in text or not text.replace("\n", "").replace("\t", "").isprintable():
            raise Unwritable(f"chat template: writes {text!r}, which a Modelfile cannot hold")
    positions = getattr(load_config(model).get_text_config(), "max_position_embeddings", None) or LONGEST
    lines = [
        *["# The chat template takes white space from the ends of a text; Ollama leaves it there."] * trims,
        f"FROM ./{place}",
        f'TEMPLATE """{turns.go()}"""',
        "PARAMETER temperature 0",
        f"PARAMETER num_ctx {min(positions, LONGEST)}",
        *(f'PARAMETER stop "{text}"' for text in stops),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.modelfile", description="Write a Modelfile for Ollama.")
    parser.add_argument("--model", metavar="TYPE", help="a file of models/gguf; the largest rounded one by default")
    name = parser.parse_args().model
    path = find_model(name)
    if path.parent != GGUF:
        raise UserError(
            f"--model {name}: no file of {GGUF}; choose one of {', '.join(file.stem for file in gguf_files())}"
        )
    say(*modelfile(path, MERGED, path.as_posix()).splitlines())


if __name__ == "__main__":
    run_tool("modelfile", main)
