"""Chat text and its ids: templates, the prompt's ids, and where an answer ends."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from hermes.console import UserError

Ids = list[int]
Messages = Sequence[dict[str, str]]


class Forged(UserError):
    """A text holds a special token, with which it could end its turn and begin another."""


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: str, context: Messages = ()) -> Ids:
    """The ids of a question (behind earlier messages) in the chat template, up to where the assistant's answer begins.

    Raises:
        UserError: the tokenizer put a beginning-of-sequence token where the template writes none.
    """
    text = prompt_text(tokenizer, question, context)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token
    if bos and ids.count(tokenizer.bos_token_id) != text.count(bos):
        raise UserError(
            f"tokenizer: {ids.count(tokenizer.bos_token_id)} {bos} in the ids of a prompt whose template writes {text.count(bos)}"
        )
    return ids


def prompt_text(tokenizer: PreTrainedTokenizerBase, question: str, context: Messages = ()) -> str:
    """The chat template's text of a question, up to where the assistant's answer begins."""
    messages = [*context, {"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """All special tokens by id, also those without a name such as end-of-sequence."""
    return {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def end_of_answer(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that the chat template writes behind an answer: the end-of-sequence token, or Llama-3's <|eot_id|>.

    Raises:
        UserError: it writes none.
    """
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    rest = str(tokenizer.apply_chat_template(messages, tokenize=False)).rpartition("answer")[2]
    first = next(iter(tokenizer(rest, add_special_tokens=False)["input_ids"]), None)
    if first not in special_tokens(tokenizer):
        raise UserError(
            f"chat template: writes {rest[:40]!r} behind an answer, no token that ends it; use another template"
        )
    return int(first)


def answer_ids(tokenizer: PreTrainedTokenizerBase, question: str, answer: str, context: Messages = ()) -> Ids:
    """The ids of an answer as a model would write it after the prompt's ids, ending in the only token that ends an answer.

    Raises:
        UserError: the prompt's text is not a prefix of that of prompt and answer, or the answer does not hold exactly one
            token that ends it.
    """
    prompt = prompt_text(tokenizer, question, context)
    messages = [*context, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    if not whole.startswith(prompt):
        raise UserError(
            f"chat template: the prompt is not a prefix of prompt and answer for {question[:60]!r}; use another template"
        )
    rest, end = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"], end_of_answer(tokenizer)
    if rest.count(end) != 1:
        raise UserError(
            f"chat template: {rest.count(end)} tokens that end an answer in {answer[:60]!r}; expected exactly one"
        )
    return rest[: rest.index(end) + 1]


def check_plain(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> None:
    """Refuses a pair of which a text holds one of the tokenizer's special tokens, which would forge a turn of the conversation.

    Raises:
        Forged: names the token.
    """
    before = [message["content"] for message in row.get("context") or []]
    tokens = special_tokens(tokenizer).values()
    for text in (row["question"], row["chosen"], row["rejected"], *before):
        for token in tokens:
            if token in text:
                raise Forged(
                    f"the text {text[:60]!r} holds the special token {token}; take it out, or set `tokenize.forged: drop`"
                )
