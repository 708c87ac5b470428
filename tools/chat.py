"""The tuned model and its base side by side in the terminal, on the same questions.

    python -m tools.chat                       (or: make chat)
    python -m tools.chat --gguf Q8_0           another of models/gguf
    echo 'Tell me about salt.' | python -m tools.chat

Both are GGUF files that llama.cpp decodes greedily; an answer appears as it is written. Each model keeps a conversation of its own, since
it goes on from its answers. The base's GGUF is made once, in .scratch under the hash of the base; it is bf16, as the base was trained.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from hermes.artifacts import complete_file, sha256_folder
from hermes.console import UserError, escaped, printable, warn
from hermes.data.chat_template import check_bounded
from hermes.data.chat_text import ends_of_answer, rendered
from hermes.model.gguf import GgufModel
from hermes.model.gguf_files import convert
from hermes.model.tokenizer import load_tokenizer
from hermes.run import run_tool

BASE, MERGED, GGUF, SCRATCH = Path("models/base"), Path("models/merged"), Path("models/gguf"), Path(".scratch/chat")
CONTEXT, MAX_NEW_TOKENS = 2048, 256


class Conversation:
    """One model's side of the chat: its history, and its next answer."""

    def __init__(self, model: GgufModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.history: list[dict[str, str]] = []

    def ask(
        self, question: str, max_new_tokens: int = MAX_NEW_TOKENS, show: Callable[[str], None] = lambda text: None
    ) -> str:
        """The model's answer, shown as it grows. Where the context is full, the oldest questions and their answers are forgotten.

        Raises:
            UserError: the question alone does not fit the context; the history is as it was.
        """
        turns = [*self.history, {"role": "user", "content": question}]
        room = self.model.context - max_new_tokens
        while len(ids := self.prompt(turns)) > room:
            if len(turns) == 1:
                raise UserError(f"a question of {len(ids)} tokens is too long; {room} fit")
            turns = turns[2:]

        def stopped(answer: list[int]) -> bool:
            show(self.text(answer))
            return False

        (answer,) = self.model.generate([ids], max_new_tokens, stopped=stopped)
        ended, text = answer[-1] in self.model.ends, self.text(answer)
        self.history = [*turns, {"role": "assistant", "content": text}]
        return text if ended else f"{text} [...]"

    def text(self, answer: list[int]) -> str:
        """The text of an answer without the token that ends it."""
        return str(self.tokenizer.decode(answer[:-1] if answer and answer[-1] in self.model.ends else answer)).strip()

    def prompt(self, turns: list[dict[str, str]]) -> list[int]:
        """The token ids of these turns up to where the answer begins."""
        text = rendered(self.tokenizer, turns, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def base_gguf() -> Path:
    """The bf16 GGUF of models/base, converted where there is none of these weights yet; a UserError where the base is missing."""
    if not (BASE / "config.json").is_file():
        raise UserError(f"{BASE}: no model there; run: make repro")
    path = SCRATCH / f"base-{sha256_folder(BASE)[:16]}.gguf"
    if not path.is_file():
        warn("chat: converting the base, once")
        with complete_file(path) as temporary:
            convert(BASE, temporary, "bf16")
    return path


def tuned_gguf(kind: str | None) -> Path:
    """The tuned model's GGUF of a type, or the smallest; a UserError where there is none, which names those there are."""
    made = sorted(GGUF.glob("*.gguf"), key=lambda file: (file.stat().st_size, file.name))
    path = made[0] if made and kind is None else GGUF / f"{kind or '*'}.gguf"
    if path not in made:
        mend = f"choose one of {', '.join(sorted(file.stem for file in made))}" if made else "run: make repro"
        raise UserError(f"{path}: no such file; {mend}")
    if not (MERGED / "tokenizer_config.json").is_file():
        raise UserError(f"{MERGED}: no tokenizer there; run: make repro")
    return path


def open_gguf(path: Path, tokenizer: PreTrainedTokenizerBase) -> GgufModel:
    """A GGUF file that answers up to where the chat template ends an answer, or to the end of the sequence."""
    model = GgufModel(path, os.cpu_count() or 1, context=CONTEXT)
    model.ends = ends_of_answer(tokenizer)
    return model


def questions(is_terminal: bool) -> Iterator[str]:
    """The lines that are typed or piped in, up to /quit or the end of the input; empty ones are left out."""
    with suppress(EOFError):
        while (line := input("you> " if is_terminal else "").strip()) != "/quit":
            if line:
                yield line


def side_by_side(answers: dict[str, str]) -> Table:
    """The answers in columns of equal width, {heading: answer}; what would steer the terminal is left out of them."""
    table = Table(expand=True)
    for heading in answers:
        table.add_column(Text(printable(heading)), ratio=1, overflow="fold")
    shown = ("".join(c for c in answer if c.isprintable() or c == "\n") for answer in answers.values())
    table.add_row(*map(Text, shown))  # Text: an answer's [brackets] are no markup
    return table


def answer(question: str, conversations: dict[str, Conversation], console: Console) -> None:
    """Asks every conversation, {heading: conversation}, and shows the answers beside each other as they are written."""
    answers = dict.fromkeys(conversations, "")

    def show(heading: str, text: str) -> None:
        answers[heading] = text
        live.update(side_by_side(answers))

    with Live(console=console, vertical_overflow="visible") as live:
        for heading, conversation in conversations.items():
            show(heading, conversation.ask(question, show=partial(show, heading)))


def chat(conversations: dict[str, Conversation], is_terminal: bool, console: Console) -> None:
    """Asks every conversation every question, {heading: conversation}, and prints the answers beside each other."""
    for question in questions(is_terminal):
        if question == "/reset":
            for conversation in conversations.values():
                conversation.history = []
            console.print("a new conversation")
            continue
        if not is_terminal:
            console.print(Text(escaped(f"you> {question}")))
        try:
            answer(question, conversations, console)
        except UserError as error:
            console.print(Text(printable(str(error))))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.chat", description="Talk to the tuned model and its base.")
    parser.add_argument(
        "--gguf", metavar="TYPE", help="a file of models/gguf, without its ending; the smallest by default"
    )
    tuned = tuned_gguf(parser.parse_args().gguf)
    is_terminal = sys.stdin.isatty()
    console = Console(highlight=False)
    files = {f"tuned ({tuned.stem})": tuned, "base (bf16)": base_gguf()}
    tokenizer = load_tokenizer(MERGED)
    check_bounded(tokenizer)
    with ExitStack() as stack:
        conversations = {
            heading: Conversation(stack.enter_context(open_gguf(path, tokenizer)), tokenizer)
            for heading, path in files.items()
        }
        if is_terminal:
            with suppress(ImportError):
                import readline  # noqa: F401  # gives the prompt arrow keys and a history, where this Python has it
            console.print("/reset starts a new conversation, /quit or Ctrl-D ends")
        with suppress(KeyboardInterrupt):
            chat(conversations, is_terminal, console)


if __name__ == "__main__":
    run_tool("chat", main)
