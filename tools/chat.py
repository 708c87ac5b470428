"""The tuned model and its base side by side in the terminal, on the same questions.

    python -m tools.chat                       (or: make chat)
    python -m tools.chat --model gptq          another: a type of models/gguf, a method of models/compressed, or merged
    python -m tools.chat --model ~/x/y.gguf    any GGUF file, or any folder that Transformers reads
    echo 'Tell me about salt.' | python -m tools.chat

llama.cpp decodes files and Transformers folders, both greedily; an answer appears as it is written. Each model keeps a conversation of its
own, since it goes on from its answers. The base's GGUF is made once, in .scratch under the hash of the base; it is bf16, as the base was
trained.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from gguf import GGUFReader
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList

from hermes.artifacts import complete_file, sha256_folder
from hermes.console import UserError, escaped, printable, warn
from hermes.data.chat_template import check_bounded
from hermes.data.chat_text import ends_of_answer, rendered
from hermes.model.base import compute_type, load
from hermes.model.gguf import GgufModel
from hermes.model.gguf_files import check_vocabulary, convert, metadata
from hermes.model.tokenizer import load_tokenizer
from hermes.run import run_tool

BASE, MERGED, GGUF, SCRATCH = Path("models/base"), Path("models/merged"), Path("models/gguf"), Path(".scratch/chat")
COMPRESSED, IMPORTANCE = Path("models/compressed"), "imatrix.gguf"  # the latter is no model
CONTEXT, MAX_NEW_TOKENS = 2048, 256
Ids = list[int]


class Model(Protocol):
    """What a conversation needs of a model: the tokens that end an answer, how many fit, and answers to prompts, `stopped` by nobody."""

    ends: set[int]
    context: int

    def generate(
        self, prompts: Sequence[Ids], max_new_tokens: int, /, *, stopped: Callable[[Ids], bool] | None
    ) -> list[Ids]: ...


class Folder:
    """A model folder in Transformers that answers as a GGUF file does."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = load(path, compute_type("portable")).eval()
        self.model.generation_config = GenerationConfig()  # a folder's own may sample, or punish repetition
        self.ends, self.context = ends_of_answer(tokenizer), CONTEXT

    def generate(
        self, prompts: Sequence[Ids], max_new_tokens: int, /, *, stopped: Callable[[Ids], bool] | None
    ) -> list[Ids]:
        """The likeliest tokens after each prompt; `stopped` sees an answer grow."""
        return [self.answer(prompt, max_new_tokens, stopped) for prompt in prompts]

    def answer(self, prompt: Ids, max_new_tokens: int, stopped: Callable[[Ids], bool] | None) -> Ids:
        """The likeliest tokens after one."""
        ids = torch.tensor([prompt], device=self.model.device)

        def look(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            ended = stopped is not None and stopped(ids[0, len(prompt) :].tolist())
            return torch.tensor([ended], device=ids.device)

        found = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(self.ends),
            pad_token_id=min(self.ends),
            stopping_criteria=StoppingCriteriaList([look]),
        )
        return found[0, len(prompt) :].tolist()


class Conversation:
    """One model's side of the chat: its history, and its next answer."""

    def __init__(self, model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
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


def gguf_files() -> list[Path]:
    """The tuned model's GGUF files, the smallest first."""
    files = (file for file in GGUF.glob("*.gguf") if file.name != IMPORTANCE)
    return sorted(files, key=lambda file: (file.stat().st_size, file.name))


def default_gguf() -> Path:
    """The largest file that is rounded, which answers most like the merged model; f16 where there is no other.

    Raises:
        UserError: there is none.
    """
    if not (files := gguf_files()):
        raise UserError(f"{GGUF}/*.gguf: no such file; run: make repro")
    return next((file for file in reversed(files) if file.stem != "f16"), files[-1])


def models_here() -> dict[str, Path]:
    """The tuned model in all its forms, by the name that --model takes, GGUF files first."""
    folders = [path for path in (*sorted(COMPRESSED.glob("*")), MERGED) if (path / "config.json").is_file()]
    return {file.stem: file for file in gguf_files()} | {path.name: path for path in folders}


def find_model(name: str | None) -> Path:
    """The file or the folder of a model by its name or its path, or `default_gguf`; a UserError names those there are."""
    if name is None:
        return default_gguf()
    here = models_here()
    path = here.get(name) or Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return path
    raise UserError(
        f"MODEL={name}: neither a GGUF file nor a folder with safetensors; there is {', '.join(here) or 'nothing here'}"
    )


def tokenizer_of(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model: a folder's own, that of the merged model for its GGUF files, else the one inside the file.

    Raises:
        UserError: there is none, it has no chat template or one that takes too much, or llama.cpp reads texts of the file otherwise.
    """
    if path.is_dir() or path.parent == GGUF:
        folder = MERGED if path.is_file() else path
        if not (folder / "tokenizer_config.json").is_file():
            raise UserError(f"{folder}: no tokenizer there; run: make repro")
        tokenizer = load_tokenizer(folder)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever the libraries raise about the files of others
            raise UserError(
                f"{path}: Transformers cannot read its tokenizer ({error}); take its folder instead"
            ) from None
        check_vocabulary(path, metadata(GGUFReader(path)), tokenizer)
    if not tokenizer.chat_template:
        raise UserError(f"{path}: has no chat template; choose a model that was tuned for conversations")
    check_bounded(tokenizer)
    return tokenizer


def open_model(path: Path, tokenizer: PreTrainedTokenizerBase) -> AbstractContextManager[Model]:
    """A file or a folder that answers up to where the chat template ends an answer, or to the end of the sequence."""
    if path.is_dir():
        return nullcontext(Folder(path, tokenizer))
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
        "--model",
        metavar="NAME",
        help="of models/gguf or models/compressed, merged, or a path; the largest rounded GGUF by default",
    )
    tuned = find_model(parser.parse_args().model)
    is_terminal = sys.stdin.isatty()
    console = Console(highlight=False)
    is_ours = tuned in models_here().values()
    sides = {f"tuned ({tuned.stem})" if is_ours else tuned.name: (tuned, tokenizer_of(tuned))}
    if is_ours or (BASE / "config.json").is_file():
        sides["base (bf16)"] = base_gguf(), tokenizer_of(BASE)
    with ExitStack() as stack:
        conversations = {
            heading: Conversation(stack.enter_context(open_model(path, tokenizer)), tokenizer)
            for heading, (path, tokenizer) in sides.items()
        }
        if is_terminal:
            with suppress(ImportError):
                import readline  # noqa: F401  # gives the prompt arrow keys and a history, where this Python has it
            console.print("/reset starts a new conversation, /quit or Ctrl-D ends")
        with suppress(KeyboardInterrupt):
            chat(conversations, is_terminal, console)


if __name__ == "__main__":
    run_tool("chat", main)
