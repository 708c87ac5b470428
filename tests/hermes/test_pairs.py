"""Every layout of a preference table becomes the same rows; a row that does not fit is named."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from hermes.console import UserError
from hermes.data.misfits import Misfit
from hermes.data.pairs import standard_batches, standard_pair, standard_pairs, standard_schema
from hermes.settings.data import Choice, Columns, Format, Layout

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


def layout_of(kind: Format, named: Columns) -> Layout:
    return Layout(format=kind, columns=named, choice=None)


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


def test_messages_in_a_column_context_come_before_a_plain_question() -> None:
    row = {"question": "What is tea?", **ANSWERS, "delta_score": 1.5, "context": TURNS, "system": "Be kind."}
    (pair,) = standard_pairs(row, layout_of("plain", columns()))
    assert pair["context"] == TURNS
    (pair,) = standard_pairs(row, layout_of("plain", columns(system="system")))
    assert pair == WANTED
    absent: list[Any] = [None, []]
    for nothing in absent:
        (pair,) = standard_pairs({**row, "context": nothing}, layout_of("plain", columns()))
        assert pair["context"] == []
    with pytest.raises(Misfit, match="`context` is 'a passage'; expected a list of messages"):
        standard_pairs({**row, "context": "a passage"}, layout_of("plain", columns()))
    choice = Choice(candidates=["rejected", "chosen"], by="strength", value="delta_score")
    named = Columns(**NONE | {"question": "question"})
    (pair,) = standard_pairs(row, Layout(format="plain", columns=named, choice=choice))
    assert pair == WANTED | {"context": TURNS}


@pytest.mark.parametrize(
    ("turn", "kind"),
    [
        ({"role": "robot", "content": "Beep."}, "other_role"),
        ({"role": None, "content": "Hi"}, "no_messages"),
        ({"role": "user", "content": 3}, "no_messages"),
        (None, "no_messages"),
        (SYSTEM, "late_system_prompt"),
    ],
)
def test_a_turn_before_the_question_that_no_template_writes_is_a_misfit(turn: Any, kind: str) -> None:
    row = {"question": "What is tea?", **ANSWERS, "delta_score": 1.5, "context": [*TURNS, turn]}
    with pytest.raises(Misfit) as found:
        standard_pairs(row, layout_of("plain", columns()))
    assert found.value.kind == kind


def test_without_a_score_there_is_none() -> None:
    row = {"question": "Q", "chosen": "A", "rejected": "B"}
    assert "delta_score" not in standard_pair(row, "plain", columns(score=None))
    source = pa.schema([(name, pa.string()) for name in (*row, "id")])
    assert standard_schema(source, layout_of("plain", columns(score=None)), "here").names == [
        "question",
        "chosen",
        "rejected",
        "id",
    ]


@pytest.mark.parametrize(
    ("good", "bad"), [(Decimal("2.5"), 1.0), (2.0, Decimal("0.5")), (Decimal(3), Decimal("1.5")), (2, 0.5)]
)
def test_two_scores_of_different_types_have_a_difference(good: Any, bad: Any) -> None:
    row = {"question": "Q", "chosen": "A", "rejected": "B", "good": good, "bad": bad}
    assert standard_pair(row, "plain", columns(score=["good", "bad"]))["delta_score"] == 1.5


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
        ("plain", {"delta_score": True}, "delta_score is \\[True\\]; expected numbers"),
        ("plain", {"delta_score": 10**400}, "delta_score is larger than any number that a column of scores can hold"),
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
    schema = standard_schema(pa.Table.from_pylist(rows).schema, layout_of("chatml", columns()), "mine")
    (first, none), (second, odd), _ = standard_batches(
        [rows[:2], rows[2:4], rows[4:]], schema, layout_of("chatml", columns())
    )
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
    schema = standard_schema(table.schema, layout_of("messages", columns(question="prompt")), "mine")
    ((batch, _),) = standard_batches([rows], schema, layout_of("messages", columns(question="prompt")))
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
        standard_schema(table.schema, layout_of("plain", columns()), "mine")


def test_the_standard_layout_is_known_as_such() -> None:
    assert layout_of("plain", columns()).is_standard()
    assert not layout_of("chatml", columns()).is_standard()
    assert not layout_of("plain", columns(system="system")).is_standard()
    assert json.loads(columns().model_dump_json()) == STANDARD


NONE: dict[str, Any] = dict.fromkeys(("question", "chosen", "rejected", "score", "system"))
TEA = [{"role": "user", "content": "What is tea?"}]
MORE = [*TEA, answer("A drink."), {"role": "user", "content": "Hot?"}]
Turns = list[dict[str, str]]
Expected = list[tuple[Turns, str, str, float | None]]  # turns before the answers, chosen, rejected, score


def talk(text: str) -> Turns:
    return [*TEA, answer(text)]


# Rows written anew in the layouts of these data sets, as their cards describe them, and what they mean.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any], Expected]] = {
    "Anthropic/hh-rlhf": (
        {"format": "transcripts", "columns": NONE | {"chosen": "chosen", "rejected": "rejected"}},
        {
            "chosen": "\n\nHuman: What is tea?\n\nAssistant: A drink.\n\nHuman: Hot?\n\nAssistant: Often.\n\nSome drink it cold.",
            "rejected": "\n\nHuman: What is tea?\n\nAssistant: A drink.\n\nHuman: Hot?\n\nAssistant: Go away.",
        },
        [(MORE, "Often.\n\nSome drink it cold.", "Go away.", None)],
    ),
    "PKU-Alignment/PKU-SafeRLHF": (
        {
            "format": "plain",
            "columns": NONE | {"question": "prompt"},
            "choice": {
                "candidates": ["response_0", "response_1"],
                "by": "label",
                "value": "better_response_id",
                "first": [0],
                "second": [1],
            },
        },
        {
            "prompt": "What is tea?",
            "response_0": "No.",
            "response_1": "A drink.",
            "better_response_id": 1,
            "safer_response_id": 0,
        },
        [(TEA, "A drink.", "No.", None)],
    ),
    "nvidia/HelpSteer2 (preference)": (
        {
            "format": "plain",
            "columns": NONE | {"question": "prompt"},
            "choice": {"candidates": ["response_1", "response_2"], "by": "strength", "value": "preference_strength"},
        },
        {"prompt": "What is tea?", "response_1": "A drink.", "response_2": "No.", "preference_strength": -2},
        [(TEA, "A drink.", "No.", 2.0)],
    ),
    "nvidia/HelpSteer3": (
        {
            "format": "messages",
            "columns": NONE | {"question": "context"},
            "choice": {"candidates": ["response1", "response2"], "by": "strength", "value": "overall_preference"},
        },
        {"context": MORE, "response1": "No.", "response2": "Often.", "overall_preference": 3},
        [(MORE, "Often.", "No.", 3.0)],
    ),
    "stanfordnlp/SHP": (
        {
            "format": "plain",
            "columns": NONE | {"question": "history"},
            "choice": {"candidates": ["human_ref_A", "human_ref_B"], "by": "score", "value": ["score_A", "score_B"]},
        },
        {
            "history": "What is tea?",
            "human_ref_A": "No.",
            "human_ref_B": "A drink.",
            "labels": 0,
            "score_A": 3,
            "score_B": 10,
        },
        [(TEA, "A drink.", "No.", 7.0)],
    ),
    "lmsys/chatbot_arena_conversations": (
        {
            "format": "messages",
            "columns": NONE,
            "choice": {
                "candidates": ["conversation_a", "conversation_b"],
                "by": "label",
                "value": "winner",
                "first": ["model_a"],
                "second": ["model_b"],
            },
        },
        {
            "conversation_a": talk("No."),
            "conversation_b": talk("A drink."),
            "winner": "model_b",
            "model_a": "x",
            "model_b": "y",
        },
        [(TEA, "A drink.", "No.", None)],
    ),
    "openai/webgpt_comparisons": (
        {
            "format": "plain",
            "columns": NONE | {"question": "question.full_text"},
            "choice": {"candidates": ["answer_0", "answer_1"], "by": "score", "value": ["score_0", "score_1"]},
        },
        {
            "question": {"id": "1", "full_text": "What is tea?"},
            "answer_0": "A drink.",
            "answer_1": "No.",
            "score_0": 0.5,
            "score_1": -0.5,
        },
        [(TEA, "A drink.", "No.", 1.0)],
    ),
    "openbmb/UltraFeedback": (
        {
            "format": "plain",
            "columns": NONE | {"question": "instruction"},
            "choice": {"candidates": "completions", "text": "response", "by": "score", "value": "overall_score"},
        },
        {
            "instruction": "What is tea?",
            "completions": [
                {"response": "Hm.", "overall_score": 5.0},
                {"response": "A drink.", "overall_score": 8.5},
                {"response": "No.", "overall_score": 1.0},
                {"response": "?", "overall_score": None},
            ],
        },
        [(TEA, "A drink.", "No.", 7.5)],
    ),
    "berkeley-nest/Nectar, all pairs": (
        {
            "format": "transcripts",
            "columns": NONE | {"question": "prompt"},
            "choice": {"candidates": "answers", "text": "answer", "by": "rank", "value": "rank", "pairs": "all"},
        },
        {
            "prompt": "\n\nHuman: What is tea?\n\nAssistant: ",
            "answers": [
                {"answer": "Hm.", "rank": 2.0},
                {"answer": "A drink.", "rank": 1.0},
                {"answer": "No.", "rank": 3.0},
            ],
        },
        [(TEA, "A drink.", "Hm.", 1.0), (TEA, "A drink.", "No.", 2.0), (TEA, "Hm.", "No.", 1.0)],
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        {
            "format": "messages",
            "columns": {
                "question": "prompt",
                "chosen": "chosen",
                "rejected": "rejected",
                "score": ["score_chosen", "score_rejected"],
                "system": None,
            },
        },
        {
            "prompt": "What is tea?",
            "chosen": talk("A drink."),
            "rejected": talk("No."),
            "score_chosen": 8.5,
            "score_rejected": 1.0,
        },
        [(TEA, "A drink.", "No.", 7.5)],
    ),
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": (
        {"format": "messages", "columns": NONE | {"chosen": "chosen", "rejected": "rejected"}},
        {"prompt": "What is tea?", "chosen": talk("A drink."), "rejected": talk("No."), "chosen_rating": None},
        [(TEA, "A drink.", "No.", None)],
    ),
    "Skywork/Skywork-Reward-Preference-80K-v0.2": (
        {"format": "messages", "columns": NONE | {"chosen": "chosen", "rejected": "rejected"}},
        {"chosen": talk("A drink."), "rejected": talk("No."), "source": "x"},
        [(TEA, "A drink.", "No.", None)],
    ),
    "Intel/orca_dpo_pairs": (
        {
            "format": "plain",
            "columns": NONE | {"question": "question", "chosen": "chosen", "rejected": "rejected", "system": "system"},
        },
        {"system": "Be kind.", "question": "What is tea?", "chosen": "A drink.", "rejected": "No."},
        [([SYSTEM, *TEA], "A drink.", "No.", None)],
    ),
    "argilla/distilabel-capybara-dpo-7k-binarized": (
        {
            "format": "messages",
            "columns": {
                "question": None,
                "chosen": "chosen",
                "rejected": "rejected",
                "score": ["rating_chosen", "rating_rejected"],
                "system": None,
            },
        },
        {
            "chosen": [*MORE, answer("Often.")],
            "rejected": [*MORE, answer("No.")],
            "rating_chosen": 5,
            "rating_rejected": 3,
        },
        [(MORE, "Often.", "No.", 2.0)],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layouts_are_read_turn_by_turn(name: str) -> None:
    settings, row, expected = PUBLISHED[name]
    found = standard_pairs(row, Layout(**{"choice": None} | settings))
    assert [
        (
            [*pair["context"], {"role": "user", "content": pair["question"]}],
            pair["chosen"],
            pair["rejected"],
            pair.get("delta_score"),
        )
        for pair in found
    ] == expected


@pytest.mark.parametrize(
    ("name", "change", "kind"),
    [
        ("PKU-Alignment/PKU-SafeRLHF", {"better_response_id": None}, "unlabelled"),
        ("PKU-Alignment/PKU-SafeRLHF", {"better_response_id": 2}, "tie"),
        ("nvidia/HelpSteer3", {"overall_preference": 0}, "tie"),
        ("nvidia/HelpSteer3", {"overall_preference": float("nan")}, "unlabelled"),
        ("lmsys/chatbot_arena_conversations", {"winner": "tie (bothbad)"}, "tie"),
        ("openai/webgpt_comparisons", {"score_0": 0.0, "score_1": 0.0}, "tie"),
        ("openbmb/UltraFeedback", {"completions": [{"response": "Hm.", "overall_score": 5.0}]}, "unlabelled"),
        ("openai/webgpt_comparisons", {"score_0": 10**400}, "unlabelled"),
        ("openai/webgpt_comparisons", {"score_0": True}, "unlabelled"),
        ("nvidia/HelpSteer3", {"overall_preference": 10**400}, "unlabelled"),
        ("openbmb/UltraFeedback", {"completions": "none"}, "no_candidates"),
        ("Anthropic/hh-rlhf", {"rejected": "\n\nHuman: Other?\n\nAssistant: Hm."}, "different_turns"),
        ("Anthropic/hh-rlhf", {"chosen": "Well\n\nHuman: Hi\n\nAssistant: Hm."}, "no_transcript"),
    ],
)
def test_a_row_without_a_verdict_is_a_misfit_of_its_kind(name: str, change: dict[str, Any], kind: str) -> None:
    settings, row, _ = PUBLISHED[name]
    with pytest.raises(Misfit) as found:
        standard_pairs(row | change, Layout(**{"choice": None} | settings))
    assert found.value.kind == kind


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "answer"}, r"^no candidate has `answer` \(`data\.choice\.text`\): .{1,60}$"),
        ({"value": "stars"}, r"^fewer than two candidates have a score \(`data\.choice\.value`: stars\)$"),
    ],
)
def test_a_field_that_no_candidate_has_is_told_by_its_key(changes: dict[str, Any], message: str) -> None:
    settings, row, _ = PUBLISHED["openbmb/UltraFeedback"]
    with pytest.raises(Misfit, match=message):
        standard_pairs(row, Layout(**settings | {"choice": settings["choice"] | changes}))


@pytest.mark.parametrize(
    ("changes", "missing"), [({"candidates": ["human_ref_A", "B"]}, "B"), ({"value": ["score_A", "b.c"]}, "b.c")]
)
def test_a_column_of_a_choice_that_is_missing_is_told_by_its_key(changes: dict[str, Any], missing: str) -> None:
    settings, row, _ = PUBLISHED["stanfordnlp/SHP"]
    layout, found = Layout(**settings | {"choice": settings["choice"] | changes}), pa.Table.from_pylist([row]).schema
    message = rf"^mine: column `{missing}` is missing; found {', '.join(row)}; see `data\.choice` in params\.yaml$"
    with pytest.raises(UserError, match=message):
        standard_schema(found, layout, "mine")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": STANDARD}, "`choice` says which answer is better"),
        ({"choice": None}, "`columns` names no `chosen`"),
        ({"choice": {"candidates": ["a", "b", "c"], "by": "strength", "value": "s"}}, "decides between two"),
        ({"choice": {"candidates": ["a", "b"], "by": "label", "value": "s"}}, "needs the labels of both"),
        ({"choice": {"candidates": ["a", "b"], "by": "score", "value": ["s"]}}, "one for each column"),
        ({"choice": {"candidates": ["a", "b"], "by": "label", "value": "s", "first": [0], "second": [1, 0]}}, "0 is in it twice"),
        ({"choice": {"candidates": ["a", "b"], "by": "label", "value": "s", "first": [""], "second": [""]}}, "is in it twice"),
    ],
)  # fmt: skip
def test_a_layout_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    settings, _, _ = PUBLISHED["stanfordnlp/SHP"]
    with pytest.raises(ValueError, match=message):
        Layout(**settings | changes)
