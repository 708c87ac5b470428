r"""Preference tables of any layout, as the one that the stages read: question, chosen, rejected, delta_score, and context.

Columns say where the parts are, and the format how their texts are written:

    plain     strings
    chatml    strings with ChatML marks; the question holds all turns before the answers, which hold one end mark or none
    messages  lists of {role, content}, or of ShareGPT's {from, value}; an answer is the last message of a list, and what comes before
              it the same in both answers (argilla's and UltraFeedback's layout); a string counts as one message
    transcripts  texts of turns that begin with "\n\nHuman: " and "\n\nAssistant: " (hh-rlhf); one without such marks is one turn

A source that has candidates side by side says by a `Choice` which is the better one. Where neither is, the row is a `Misfit` of the kind
tie or unlabelled, which stops no run. Of more than two candidates a row may become several pairs.

`context` is what comes before the question, a list of {role, content}: a system prompt, earlier turns. It is a column only where the
format or a system column can bring one. Other columns are carried along.

A row that is not of the layout is a `Misfit`, of a kind under which such rows are counted; whether one stops a run is decided by
stages/subset.py.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from itertools import combinations
from typing import Any

import pyarrow as pa

from hermes.console import UserError
from hermes.data.misfits import Misfit, check_turns
from hermes.data.tables import MESSAGES
from hermes.settings.data import Choice, Columns, Format, Layout

Message = dict[str, str]
Pair = dict[str, Any]
UNSTORABLE = (pa.ArrowException, ValueError, OverflowError)

PARTS = {
    "context": MESSAGES,
    "question": pa.string(),
    "chosen": pa.string(),
    "rejected": pa.string(),
    "delta_score": pa.float64(),
}
TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>\n?|\Z)", re.DOTALL)
MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")
SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant|System):[ ]?")
CONTEXT = "context"
SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system", "assistant": "assistant"}


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
    if isinstance(value, str) and MESSAGES_AS_TEXT.match(value):
        raise Misfit("messages_as_text", f"{value[:60]!r} are messages as JSON text; store them as lists")
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
    if MESSAGES_AS_TEXT.match(value):
        raise Misfit("messages_as_text", f"`{column}` holds messages as JSON text, {value[:60]!r}; store them as lists")
    return value


def value_at(row: Any, name: str) -> Any:
    """What stands in a column, or in a field inside it (`a.b`); None where there is nothing."""
    if isinstance(row, dict) and name in row:
        return row[name]
    outer, _, inner = name.partition(".")
    found = row.get(outer) if inner and isinstance(row, dict) else None
    return None if found is None else value_at(found, inner)


def read_plain(row: Pair, columns: Columns) -> tuple[list[Message], str, str]:
    """The turns before the answers, those of a column `context` first, and the two answers."""
    question, chosen, rejected = (text_of(row, name) for name in (columns.question, columns.chosen, columns.rejected))
    before = row.get(CONTEXT) or []
    if not isinstance(before, list):
        raise Misfit("no_messages", f"`{CONTEXT}` is {str(before)[:60]!r}; expected a list of messages")
    return [*from_messages(before, "user"), {"role": "user", "content": question}], chosen, rejected


def read_chatml(row: Pair, columns: Columns) -> tuple[list[Message], str, str]:
    """The turns before the answers, and the two answers."""
    question, chosen, rejected = (text_of(row, name) for name in (columns.question, columns.chosen, columns.rejected))
    return from_chatml(question), chatml_answer(chosen), chatml_answer(rejected)


def from_transcript(text: str, role: str) -> list[Message]:
    """The turns of a transcript, without an opened turn of the assistant at its end; a text without marks is one message of this role."""
    first, *rest = SPEAKER.split(text)
    if not rest:
        return [{"role": role, "content": text}]
    if first.strip():
        raise Misfit("no_transcript", f"{first[:60]!r} stands before the first turn of a transcript")
    turns = [
        {"role": SHAREGPT[who.lower()], "content": said.strip()}
        for who, said in zip(rest[::2], rest[1::2], strict=True)
    ]
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def read_transcripts(row: Pair, columns: Columns) -> tuple[list[Message], str, str]:
    """The turns before the answers, and the two answers."""
    parts = {"question": columns.question, "chosen": columns.chosen, "rejected": columns.rejected}
    turns: dict[str, Any] = {
        name: from_transcript(text_of(row, column), "user" if name == "question" else "assistant")
        for name, column in parts.items()
        if column
    }
    return read_messages(
        turns, Columns(**{name: name if name in turns else None for name in parts}, score=None, system=None)
    )


def read_messages(row: Pair, columns: Columns) -> tuple[list[Message], str, str]:
    """The turns before the answers, and the two answers.

    Raises:
        Misfit: an answer is not the assistant's, or the two follow different turns.
    """
    asked = from_messages(row[columns.question], "user") if columns.question else []
    conversations = [from_messages(row[str(name)], "assistant") for name in (columns.chosen, columns.rejected)]
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


READERS: dict[Format, Callable[[Pair, Columns], tuple[list[Message], str, str]]] = {
    "plain": read_plain,
    "chatml": read_chatml,
    "messages": read_messages,
    "transcripts": read_transcripts,
}


def is_number(value: Any) -> bool:
    """Whether a value is a number that a column of scores can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def candidates_of(row: Pair, choice: Choice) -> tuple[list[Any], list[Any]]:
    """The candidates of a row, and where each has a number of its own, these.

    Raises:
        Misfit: there are none.
    """
    if isinstance(choice.candidates, list):
        found = [value_at(row, name) for name in choice.candidates]
        numbers = [value_at(row, name) for name in choice.value] if isinstance(choice.value, list) else []
    else:
        listed = value_at(row, choice.candidates)
        if not isinstance(listed, list):
            raise Misfit(
                "no_candidates", f"`{choice.candidates}` is {str(listed)[:60]!r}; expected a list of candidates"
            )
        found, numbers = listed, [value_at(entry, str(choice.value)) for entry in listed]
    answers = [value_at(entry, choice.text) if choice.text else entry for entry in found]
    if choice.text and found and all(answer is None for answer in answers):
        raise Misfit("no_candidates", f"no candidate has `{choice.text}` (`data.choice.text`): {str(found[0])[:60]!r}")
    return answers, numbers


def decided(row: Pair, choice: Choice) -> list[tuple[Any, Any, float | None]]:
    """The better answer, the worse one, and by how much, of every pair in a row.

    Raises:
        Misfit: nobody decided, or both are equal.
    """
    answers, numbers = candidates_of(row, choice)
    if choice.by in ("label", "strength"):
        verdict = value_at(row, str(choice.value))
        if verdict is None or (choice.by == "strength" and not is_number(verdict)):
            raise Misfit("unlabelled", f"`{choice.value}` is {verdict!r:.60}")
        second = verdict in choice.second if choice.by == "label" else verdict > 0
        if not second and not (verdict in choice.first if choice.by == "label" else verdict < 0):
            raise Misfit("tie", f"`{choice.value}` is {verdict!r:.60}, which is neither the first nor the second")
        return [(answers[second], answers[not second], None if choice.by == "label" else float(abs(verdict)))]
    if sum(map(is_number, numbers)) < 2:
        raise Misfit(
            "unlabelled", f"fewer than two candidates have a {choice.by} (`data.choice.value`: {choice.value})"
        )
    sign = -1.0 if choice.by == "rank" else 1.0
    rated = [
        (sign * float(number), answer) for number, answer in zip(numbers, answers, strict=True) if is_number(number)
    ]
    rated.sort(key=lambda one: -one[0])
    both = combinations(rated, 2) if choice.pairs == "all" else [(rated[0], rated[-1])]
    found: list[tuple[Any, Any, float | None]] = [
        (better, worse, high - low) for (high, better), (low, worse) in both if high > low
    ]
    if not found:
        raise Misfit("tie", f"all candidates have the same {choice.by}")
    return found


def delta_score(row: Pair, score: str | list[str]) -> float:
    """How much better the chosen answer is.

    Raises:
        Misfit: a score is not a number.
    """
    values = [row[name] for name in ([score] if isinstance(score, str) else score)]
    if not all(isinstance(value, int | float | Decimal) and not isinstance(value, bool) for value in values):
        raise Misfit("no_score", f"{score} is {str(values)[:60]}; expected numbers")
    values = [float(value) if isinstance(value, Decimal) else value for value in values]
    try:
        return float(values[0] - values[1] if len(values) == 2 else values[0])
    except OverflowError:
        raise Misfit("no_score", f"{score} is larger than any number that a column of scores can hold") from None


def standard_pairs(row: Pair, layout: Layout) -> list[Pair]:
    """One row as the pairs that the stages read, with their names and texts; it is one pair, except of several candidates.

    Raises:
        Misfit: the row is not of this layout; says why.
    """
    columns, choice = layout.columns, layout.choice
    before = {CONTEXT: row[CONTEXT]} if layout.format == "plain" and row.get(CONTEXT) is not None else {}
    row = {name: value_at(row, name) for name in layout.used()} | before
    if choice is None:
        return [standard_pair(row, layout.format, columns)]
    named = columns.model_copy(update={"chosen": "chosen", "rejected": "rejected", "score": None})
    pairs = []
    for chosen, rejected, by in decided(row, choice):
        pair = standard_pair(row | {"chosen": chosen, "rejected": rejected}, layout.format, named)
        pairs.append(pair if by is None else pair | {"delta_score": by})
    return pairs


def standard_pair(row: Pair, layout: Format, columns: Columns) -> Pair:
    """One row with the names and texts that the stages read.

    Raises:
        Misfit: the row is not of this layout; says why.
    """
    if missing := [name for name in columns.used() if row[name] is None and name != columns.system]:
        raise Misfit("missing_value", f"`{missing[0]}` is empty")
    turns, chosen, rejected = READERS[layout](row, columns)
    if columns.system and row[columns.system]:
        turns = [{"role": "system", "content": text_of(row, columns.system)}, *turns]
    check_turns(turns)
    try:
        "".join([chosen, rejected, *(turn["content"] for turn in turns)]).encode()
    except UnicodeEncodeError as error:
        raise Misfit("not_text", f"a text holds half a character ({error.reason})") from None
    pair = {"context": turns[:-1], "question": turns[-1]["content"], "chosen": chosen, "rejected": rejected}
    return pair if columns.score is None else pair | {"delta_score": delta_score(row, columns.score)}


def holds_messages(kind: pa.DataType) -> bool:
    """Whether a column's type is a list of messages with role and content."""
    message = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else None
    return isinstance(message, pa.StructType) and {"role", "content"} <= {field.name for field in message}


def standard_schema(source: pa.Schema, layout: Layout, where: str) -> pa.Schema:
    """The columns of a table in the standard layout: the parts, then what is carried along.

    Raises:
        UserError: a named column is missing, or two have one name; gives those found.
    """
    if twice := [name for name, count in Counter(source.names).items() if count > 1]:
        raise UserError(f"{where}: two columns are named `{twice[0]}`; rename one")
    used = {name: name if name in source.names else name.partition(".")[0] for name in layout.used()}
    if missing := [name for name, column in used.items() if column not in source.names]:
        key = "data.columns" if missing[0] in layout.columns.used() else "data.choice"
        raise UserError(
            f"{where}: column `{missing[0]}` is missing; found {', '.join(source.names)}; see `{key}` in params.yaml"
        )
    scored = layout.columns.score is not None or (layout.choice is not None and layout.choice.by != "label")
    has_context = CONTEXT in source.names and holds_messages(source.field(CONTEXT).type)
    plain = layout.format == "plain" and layout.columns.system is None and not has_context
    left_out = {CONTEXT: plain, "delta_score": not scored}
    parts = [(name, kind) for name, kind in PARTS.items() if not left_out.get(name)]
    carried = [source.field(name) for name in source.names if name not in {*used.values(), *PARTS}]
    return pa.schema([*parts, *carried])


def standard_batches(
    batches: Iterable[list[Pair]], schema: pa.Schema, layout: Layout
) -> Iterator[tuple[pa.RecordBatch, dict[int, Misfit]]]:
    """The rows of a table in the standard layout, batch by batch, and the rows that are not of it by their numbers in the batch.

    All parts of such a row are null.
    """
    for batch in batches:
        rows: list[Pair] = []
        misfits: dict[int, Misfit] = {}
        for row in batch:
            try:
                rows += [row | pair for pair in standard_pairs(row, layout)]
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
