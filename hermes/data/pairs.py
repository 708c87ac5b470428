"""Preference tables of any layout, as the one that the stages read: question, chosen, rejected, delta_score, and context.

Columns say where the parts are, and the format how their texts are written:

    plain     strings
    chatml    strings with ChatML marks; the question holds all turns before the answers, which hold one end mark or none
    messages  lists of {role, content}, or of ShareGPT's {from, value}; an answer is the last message of a list, and what comes before
              it the same in both answers (argilla's and UltraFeedback's layout); a string counts as one message

`context` is what comes before the question, a list of {role, content}: a system prompt, earlier turns. It is a column only where the
format or a system column can bring one. Other columns are carried along.

A row that is not of the layout is a `Misfit`, of a kind under which such rows are counted; whether one stops a run is decided by
stages/subset.py.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from hermes.console import UserError
from hermes.data.misfits import Misfit
from hermes.settings.data import Columns, Format

Message = dict[str, str]
Pair = dict[str, Any]
UNSTORABLE = (pa.ArrowException, ValueError, OverflowError)

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
PARTS = {
    "context": MESSAGES,
    "question": pa.string(),
    "chosen": pa.string(),
    "rejected": pa.string(),
    "delta_score": pa.float64(),
}
TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>\n?|\Z)", re.DOTALL)
SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system"}


def from_chatml(text: str) -> list[Message]:
    """The messages of a ChatML string, without an opened turn of the assistant at its end.

    Raises:
        Misfit: it is not made of turns.
    """
    turns = [{"role": role, "content": content.strip()} for role, content in TURN.findall(text)]
    if not turns or TURN.sub("", text).strip():
        raise Misfit("not_chatml", f"{text[:60]!r} is not made of ChatML turns")
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def chatml_answer(text: str) -> str:
    """An answer without the mark at its end and the one of its turn.

    Raises:
        Misfit: another mark is inside.
    """
    answer = text.strip().removeprefix("<|im_start|>assistant\n").removesuffix("<|im_end|>").strip()
    if "<|im_" in answer:
        raise Misfit("several_turns", f"the answer {text[:60]!r} holds more than one turn")
    return answer


def from_messages(value: Any, role: str) -> list[Message]:
    """A list of messages in the standard keys; a string is one message of this role.

    Raises:
        Misfit: it is no list of messages.
    """
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise Misfit("no_messages", f"{str(value)[:60]!r} is neither text nor a list of messages")
    found = []
    for message in value:
        parts = message if isinstance(message, dict) else {}
        who, what = parts.get("role") or parts.get("from"), parts.get("content", parts.get("value"))
        if not isinstance(who, str) or not isinstance(what, str):
            raise Misfit("no_messages", f"{str(message)[:60]!r} is not a message with role and content")
        found.append({"role": SHAREGPT.get(who, who), "content": what})
    return found


def text_of(row: Pair, column: str | None) -> str:
    """The text in a column.

    Raises:
        Misfit: there is something else.
    """
    value = row[str(column)]
    if not isinstance(value, str):
        raise Misfit("not_text", f"`{column}` is {str(value)[:60]!r} ({type(value).__name__}); expected text")
    return value


def read_texts(row: Pair, columns: Columns, layout: Format) -> tuple[list[Message], str, str]:
    """The turns before the answers, and the two answers."""
    question, chosen, rejected = (text_of(row, name) for name in (columns.question, columns.chosen, columns.rejected))
    if layout == "plain":
        return [{"role": "user", "content": question}], chosen, rejected
    return from_chatml(question), chatml_answer(chosen), chatml_answer(rejected)


def read_messages(row: Pair, columns: Columns) -> tuple[list[Message], str, str]:
    """The turns before the answers, and the two answers.

    Raises:
        Misfit: an answer is not the assistant's, or the two follow different turns.
    """
    asked = from_messages(row[columns.question], "user") if columns.question else []
    conversations = [from_messages(row[name], "assistant") for name in (columns.chosen, columns.rejected)]
    for name, messages in zip(("chosen", "rejected"), conversations, strict=True):
        if not messages or messages[-1]["role"] != "assistant":
            raise Misfit("no_answer", f"the last message of `{name}` is not the assistant's")
    (*before, chosen), (*before_rejected, rejected) = conversations
    if before != before_rejected:
        raise Misfit("different_turns", "chosen and rejected follow different turns")
    if before and asked and before[-len(asked) :] != asked:
        raise Misfit(
            "other_question", "the question is not what comes before the answers; leave `columns.question` out"
        )
    return before or asked, chosen["content"], rejected["content"]


def delta_score(row: Pair, score: str | list[str]) -> float:
    """How much better the chosen answer is.

    Raises:
        Misfit: a score is not a number.
    """
    values = [row[name] for name in ([score] if isinstance(score, str) else score)]
    if not all(isinstance(value, int | float) for value in values):
        raise Misfit("no_score", f"{score} is {values}; expected numbers")
    try:
        return float(values[0] - values[1] if len(values) == 2 else values[0])
    except OverflowError:
        raise Misfit("no_score", f"{score} is larger than any number that a column of scores can hold") from None


def standard_pair(row: Pair, layout: Format, columns: Columns) -> Pair:
    """One row with the names and texts that the stages read.

    Raises:
        Misfit: the row is not of this layout; says why.
    """
    if missing := [name for name in columns.used() if row[name] is None and name != columns.system]:
        raise Misfit("missing_value", f"`{missing[0]}` is empty")
    is_text = layout != "messages"
    turns, chosen, rejected = read_texts(row, columns, layout) if is_text else read_messages(row, columns)
    if columns.system and row[columns.system]:
        turns = [{"role": "system", "content": text_of(row, columns.system)}, *turns]
    if not turns or turns[-1]["role"] != "user":
        raise Misfit("no_question", "what comes before the answers does not end with a user's message")
    if any(turn["role"] == "system" for turn in turns[1:]):
        raise Misfit("late_system_prompt", "a system prompt stands behind other messages")
    try:
        "".join([chosen, rejected, *(turn["content"] for turn in turns)]).encode()
    except UnicodeEncodeError as error:
        raise Misfit("not_text", f"a text holds half a character ({error.reason})") from None
    pair = {"context": turns[:-1], "question": turns[-1]["content"], "chosen": chosen, "rejected": rejected}
    return pair if columns.score is None else pair | {"delta_score": delta_score(row, columns.score)}


def standard_schema(source: pa.Schema, layout: Format, columns: Columns, where: str) -> pa.Schema:
    """The columns of a table in the standard layout: the parts, then what is carried along.

    Raises:
        UserError: a named column is missing, or two have one name; gives those found.
    """
    if twice := [name for name, count in Counter(source.names).items() if count > 1]:
        raise UserError(f"{where}: two columns are named `{twice[0]}`; rename one")
    if missing := [name for name in columns.used() if name not in source.names]:
        raise UserError(
            f"{where}: column `{missing[0]}` is missing; found {', '.join(source.names)}; see `data.columns` in params.yaml"
        )
    left_out = {"context": layout == "plain" and columns.system is None, "delta_score": columns.score is None}
    parts = [(name, kind) for name, kind in PARTS.items() if not left_out.get(name)]
    carried = [source.field(name) for name in source.names if name not in {*columns.used(), *PARTS}]
    return pa.schema([*parts, *carried])


def standard_batches(
    batches: Iterable[list[Pair]], schema: pa.Schema, layout: Format, columns: Columns
) -> Iterator[tuple[pa.RecordBatch, dict[int, Misfit]]]:
    """The rows of a table in the standard layout, batch by batch, and the rows that are not of it by their numbers in the batch.

    All parts of such a row are null.
    """
    for batch in batches:
        rows: list[Pair] = []
        misfits: dict[int, Misfit] = {}
        for row in batch:
            try:
                rows.append(row | standard_pair(row, layout, columns))
            except Misfit as error:
                misfits[len(rows)] = error
                rows.append(row | dict.fromkeys(PARTS))
        yield record_batch(rows, schema, misfits), misfits


def record_batch(rows: list[Pair], schema: pa.Schema, misfits: dict[int, Misfit]) -> pa.RecordBatch:
    """Rows as a batch. One that Arrow cannot hold, say for half a character in a column carried along, is all null and a misfit."""

    def convert(rows: list[Pair]) -> pa.RecordBatch:
        return pa.RecordBatch.from_pylist(rows, schema=schema)

    try:
        return convert(rows)
    except UNSTORABLE:
        for number, row in enumerate(rows):
            try:
                convert([row])
            except UNSTORABLE as error:
                misfits[number] = Misfit("not_storable", f"a value that no column can hold ({error})")
                rows[number] = {}
        return convert(rows)
