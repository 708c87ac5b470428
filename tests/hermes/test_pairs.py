"""Every layout of a preference table becomes the same rows; a row that does not fit is named."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from hermes.console import UserError
from hermes.data.pairs import Misfit, standard_batches, standard_pair, standard_schema
from hermes.settings.data import Columns, Format

STANDARD: dict[str, Any] = {
    "question": "question",
    "chosen": "chosen",
    "rejected": "rejected",
    "score": "delta_score",
    "system": None,
}
SYSTEM = {"role": "system", "content": "Be kind."}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
ASKED = {"role": "user", "content": "What is tea?"}
ANSWERS = {"chosen": "A drink.", "rejected": "No\nidea."}
WANTED = {"context": [SYSTEM, *TURNS], "question": "What is tea?", **ANSWERS, "delta_score": 1.5}


def columns(**changes: Any) -> Columns:
    return Columns(**STANDARD | changes)


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def chatml(*messages: dict[str, str]) -> str:
    return "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)


BEFORE = [SYSTEM, *TURNS, ASKED]
LAYOUTS: list[tuple[Format, Columns, dict[str, Any]]] = [
    (  # the older revisions of the Hermes pairs
        "chatml",
        columns(),
        {
            "question": chatml(*BEFORE) + "<|im_start|>assistant\n",
            "chosen": "A drink.<|im_end|>\n",
            "rejected": "No\nidea.<|im_end|>",
            "delta_score": 1.5,
        },
    ),
    (
        "chatml",
        columns(score=["good", "bad"]),
        {
            "question": chatml(*BEFORE),
            "chosen": chatml(answer("A drink.")),
            "rejected": "No\nidea.",
            "good": 4.0,
            "bad": 2.5,
        },
    ),
    (  # argilla's: whole conversations
        "messages",
        columns(question=None, score=["chosen_score", "rejected_score"]),
        {
            "chosen": [*BEFORE, answer("A drink.")],
            "rejected": [*BEFORE, answer("No\nidea.")],
            "chosen_score": 5,
            "rejected_score": 3.5,
        },
    ),
    (  # UltraFeedback's: the prompt beside whole conversations
        "messages",
        columns(question="prompt"),
        {
            "prompt": "What is tea?",
            "chosen": [*BEFORE, answer("A drink.")],
            "rejected": [*BEFORE, answer("No\nidea.")],
            "delta_score": 1.5,
        },
    ),
    (  # TRL's explicit prompt
        "messages",
        columns(question="prompt"),
        {"prompt": BEFORE, "chosen": [answer("A drink.")], "rejected": [answer("No\nidea.")], "delta_score": 1.5},
    ),
    (  # ShareGPT's keys, a system column, answers as strings
        "messages",
        columns(question="conversations", system="system"),
        {
            "system": "Be kind.",
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello!"},
                {"from": "human", "value": "What is tea?"},
            ],
            **ANSWERS,
            "delta_score": 1.5,
        },
    ),
]


@pytest.mark.parametrize(("layout", "named", "row"), LAYOUTS)
def test_every_layout_becomes_the_same_row(layout: Format, named: Columns, row: dict[str, Any]) -> None:
    assert standard_pair(row, layout, named) == WANTED


def test_plain_strings_stay_as_they_are_and_a_system_prompt_comes_first() -> None:
    row = {"question": " Q\n", "chosen": "A ", "rejected": "<|im_end|>", "delta_score": 2, "system": "S"}
    plain = {"question": " Q\n", "chosen": "A ", "rejected": "<|im_end|>", "delta_score": 2.0}
    assert standard_pair(row, "plain", columns()) == plain | {"context": []}
    with_system = standard_pair(row, "plain", columns(system="system"))
    assert with_system == plain | {"context": [{"role": "system", "content": "S"}]}
    assert standard_pair(row | {"system": None}, "plain", columns(system="system"))["context"] == []


def test_without_a_score_there_is_none() -> None:
    row = {"question": "Q", "chosen": "A", "rejected": "B"}
    assert "delta_score" not in standard_pair(row, "plain", columns(score=None))
    source = pa.schema([(name, pa.string()) for name in (*row, "id")])
    assert standard_schema(source, "plain", columns(score=None), "here").names == [
        "question",
        "chosen",
        "rejected",
        "id",
    ]


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("plain", {"question": None}, "`question` is empty"),
        ("plain", {"question": 3}, "`question` is '3' \\(int\\); expected text"),
        ("plain", {"chosen": "half \ud83d"}, "a text holds half a character"),
        ("plain", {"rejected": [ASKED]}, "`rejected` is .* \\(list\\); expected text"),
        ("chatml", {"question": 3}, "`question` is '3' \\(int\\); expected text"),
        ("messages", {"chosen": 3}, "'3' is neither text nor a list of messages"),
        ("messages", {"chosen": ["Hi"]}, "'Hi' is not a message with role and content"),
        ("plain", {"delta_score": "much"}, "delta_score is \\['much'\\]; expected numbers"),
        ("chatml", {}, "is not made of ChatML turns"),
        ("chatml", {"question": chatml(ASKED) + "more"}, "is not made of ChatML turns"),
        ("chatml", {"question": chatml(ASKED), "chosen": chatml(answer("a"), ASKED)}, "holds more than one turn"),
        ("chatml", {"question": chatml(*TURNS)}, "does not end with a user's message"),
        ("chatml", {"question": chatml(ASKED, SYSTEM, ASKED)}, "a system prompt stands behind other messages"),
        ("messages", {"chosen": [ASKED]}, "the last message of `chosen` is not the assistant's"),
        ("messages", {"chosen": []}, "the last message of `chosen` is not the assistant's"),
        ("messages", {"chosen": [{"text": "a"}]}, "is not a message with role and content"),
        ("messages", {"chosen": [ASKED, answer("a")]}, "chosen and rejected follow different turns"),
        (
            "messages",
            {"question": "Else?", "chosen": [ASKED, answer("a")], "rejected": [ASKED, answer("b")]},
            "the question is not what comes before the answers",
        ),
    ],
)
def test_a_row_of_another_layout_is_named(layout: Format, change: dict[str, Any], message: str) -> None:
    row = {"question": "Q", "chosen": "A", "rejected": "B", "delta_score": 1.0} | change
    with pytest.raises(Misfit, match=message):
        standard_pair(row, layout, columns())


def test_a_misfit_keeps_its_place_without_its_parts_and_says_why() -> None:
    rows = [{"question": chatml(ASKED), "chosen": "A", "rejected": "B", "delta_score": 1.0, "id": i} for i in range(5)]
    rows[3] = rows[3] | {"question": "plain"}
    schema = standard_schema(pa.Table.from_pylist(rows).schema, "chatml", columns(), "mine")
    (first, none), (second, odd), _ = standard_batches([rows[:2], rows[2:4], rows[4:]], schema, "chatml", columns())
    assert [row["question"] for row in first.to_pylist()] == ["What is tea?"] * 2
    assert none == {}
    parts = dict.fromkeys(("context", "question", "chosen", "rejected", "delta_score"))
    assert second.to_pylist()[1] == parts | {"id": 3}
    assert {number: (misfit.kind, str(misfit)) for number, misfit in odd.items()} == {
        1: ("not_chatml", "'plain' is not made of ChatML turns")
    }


def test_other_columns_come_along_and_a_missing_one_is_named(tmp_path: Path) -> None:
    rows = [{"prompt": "Q", "chosen": "A", "rejected": "B", "delta_score": 1, "id": 7, "tags": ["x"]}]
    table = pa.Table.from_pylist(rows)
    schema = standard_schema(table.schema, "messages", columns(question="prompt"), "mine")
    ((batch, _),) = standard_batches([rows], schema, "messages", columns(question="prompt"))
    expected = {
        "context": [],
        "question": "Q",
        "chosen": "A",
        "rejected": "B",
        "delta_score": 1.0,
        "id": 7,
        "tags": ["x"],
    }
    assert batch.to_pylist() == [expected]
    assert batch.schema.names == list(expected)
    with pytest.raises(
        UserError, match=r"^mine: column `question` is missing; found prompt, chosen, .*see `data\.columns`"
    ):
        standard_schema(table.schema, "plain", columns(), "mine")


def test_the_standard_layout_is_known_as_such() -> None:
    assert columns().are_standard("plain")
    assert not columns().are_standard("chatml")
    assert not columns(system="system").are_standard("plain")
    assert json.loads(columns().model_dump_json()) == STANDARD
