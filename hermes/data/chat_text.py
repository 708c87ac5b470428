"""Chat text and its ids: templates, the prompt's ids, and where an answer ends."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from hermes.console import UserError
from hermes.data.chat_template import Messages, apply

Ids = list[int]


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
    """The chat template's text of a question, up to where the assistant's answer begins.

    Raises:
        UserError: the template refuses these turns, or leaves out what the system or the user says.
    """
    messages = [*context, {"role": "user", "content": question}]
    text = rendered(tokenizer, messages, add_generation_prompt=True)
    written, place = dense(text), 0
    for message in messages:
        said = message["content"].rpartition("</think>")[2] if message["role"] == "assistant" else message["content"]
        found = written.find(dense(said), place)  # what an earlier answer thought may be left out
        if found < 0:
            raise UserError(
                f"chat template: leaves out what the {message['role']} says ({said.strip()[:60]!r}); "
                "use a template that writes it"
            )
        place = found + len(dense(said))
    return text


def dense(text: str) -> str:
    """A text without its white space, which templates may change."""
    return "".join(text.split())


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool = False) -> str:
    """The chat template's text of a conversation.

    Raises:
        UserError: the template refuses it; gives its reason.
    """
    try:
        return apply(tokenizer, messages, add_generation_prompt)
    except Exception as error:  # whatever the expressions of a template raise
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"chat template: refuses the turns {roles} ({str(error) or type(error).__name__}); use another template or leave them out"
        ) from None


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """All special tokens by id, also those without a name such as end-of-sequence, and the marks of turns that are not called special."""
    template = str(tokenizer.chat_template or "")
    tokens = tokenizer.added_tokens_decoder.items()
    return {
        i: token.content
        for i, token in tokens
        if token.special or (token.content.strip() and token.content in template)
    }


def end_of_answer(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that the chat template writes behind an answer: the end-of-sequence token, or Llama-3's <|eot_id|>.

    Raises:
        UserError: it writes none, or takes no conversation.
    """
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    _, found, rest = rendered(tokenizer, messages).rpartition("answer")
    if not found:
        raise UserError("chat template: leaves out the answer; use a template that writes it")
    ids, special = tokenizer(rest, add_special_tokens=False)["input_ids"], special_tokens(tokenizer)
    place = next((i for i, id in enumerate(ids) if id in special), 0)
    if (
        not ids or ids[place] not in special or str(tokenizer.decode(ids[:place])).strip()
    ):  # Llama-2 writes a space before it
        raise UserError(
            f"chat template: writes {rest[:40]!r} behind an answer, no token that ends it; use another template"
        )
    return int(ids[place])


def ends_of_answer(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens at which a written answer ends: the chat template's, and the end of the sequence."""
    return {end_of_answer(tokenizer), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}


def answer_ids(tokenizer: PreTrainedTokenizerBase, question: str, answer: str, context: Messages = ()) -> Ids:
    """The ids of an answer as a model would write it after the prompt's ids, ending in the only token that ends an answer.

    They are what follows the prompt in the ids of the whole conversation. Where the answer's first letters change the prompt's last token
    there, they are those of the answer's text alone: a model goes on from the prompt's ids.

    Raises:
        UserError: the prompt's text is not a prefix of that of prompt and answer, a part of the answer is left out, or it does not hold
            exactly one token that ends it.
    """
    prompt = prompt_text(tokenizer, question, context)
    messages = [*context, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    whole = rendered(tokenizer, messages)
    if not whole.startswith(prompt):
        raise UserError(
            f"chat template: the prompt is not a prefix of prompt and answer for {question[:60]!r}; use another template"
        )
    if dense(answer) not in dense(whole[len(prompt) :]):
        raise UserError(
            f"chat template: leaves out a part of the answer {answer[:60]!r}; use a template that writes it"
        )
    before, together = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole))
    rest, end = together[len(before) :], end_of_answer(tokenizer)
    if together[: len(before)] != before:
        rest = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
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
