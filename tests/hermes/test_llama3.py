"""Llama-3 text: the ids of both A40 profiles are what Llama-3's own tokenizer and the published notebook's rules give."""

import re
import string
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llama_models.llama3.tokenizer import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hermes.data.chat_text import answer_ids, end_of_answer, prompt_ids
from hermes.model import llama3
from hermes.params import read_yaml
from hermes.settings.tokenize import TokenizeSettings
from stages.fetch_model import write_template
from stages.tokenize import conversation_ids, tokenize_split

PROFILES = read_yaml(Path(__file__).parents[2] / "params.yaml")["profiles"]
PUBLISHED, METAS = llama3.tokenizer(), Tokenizer.get_instance()
BOS, END, HEADER, END_HEADER, EOT = 128000, 128001, 128006, 128007, 128009
USER, ASSISTANT, SYSTEM, BREAK, TWO_BREAKS = 882, 78191, 9125, 198, 271


def repaired() -> PreTrainedTokenizerBase:
    """The base's tokenizer as fetch_model leaves it for the profile a40."""
    with tempfile.TemporaryDirectory() as folder:
        PUBLISHED.save_pretrained(folder)
        write_template(Path(folder), PROFILES["a40"]["model"]["chat_template"], "x")
        return AutoTokenizer.from_pretrained(folder)


OURS = repaired()


def settings_of(profile: str) -> TokenizeSettings:
    return TokenizeSettings.model_validate(PROFILES[profile]["tokenize"])


def plain(text: str) -> list[int]:
    """Meta's own ids of a text without special tokens."""
    return METAS.encode(text, bos=False, eos=False)


@settings(max_examples=200, deadline=None)
@given((st.text(max_size=80) | st.text(string.printable, max_size=80)).filter(lambda text: "<|" not in text))
@example("2024-09-24: it's 12345.678 €\n\n\n  \t x\r\n")
def test_any_text_has_the_ids_of_metas_tokenizer(text: str) -> None:
    assert OURS(text, add_special_tokens=False)["input_ids"] == plain(text)


def test_special_tokens_have_metas_ids() -> None:
    assert len(OURS) == METAS.n_words == 128_256
    for token in set(llama3.NAMED.values()) & METAS.special_tokens.keys():
        assert OURS.convert_tokens_to_ids(token) == METAS.special_tokens[token]
    assert (OURS.bos_token_id, OURS.eos_token_id) == (METAS.bos_id, METAS.eos_id) == (BOS, END)


ROW = {"question": "What is tea?", "chosen": "A hot drink.", "rejected": "No idea!"}
TEA = [3923, 374, 15600, 30]  # "What is tea?"
DRINK = [32, 4106, 7172, 13]  # "A hot drink."


def test_golden_ids_of_the_repaired_profile() -> None:
    prompt, answers = conversation_ids(OURS, ROW, settings_of("a40").template)
    assert prompt == [BOS, HEADER, USER, END_HEADER, TWO_BREAKS, *TEA, EOT, HEADER, ASSISTANT, END_HEADER, TWO_BREAKS]
    assert answers["chosen"] == [*DRINK, EOT]
    assert answers["rejected"] == [*plain("No idea!"), EOT]
    assert end_of_answer(OURS) == EOT  # what the template writes behind an answer, not the end of the sequence


def test_the_published_template_is_the_text_that_the_base_brings() -> None:
    """The notebook let the base's own chat template write the prompt, and only the end of the answers by hand."""
    assert PROFILES["a40_published"]["model"]["chat_template"] is None
    template = settings_of("a40_published").template
    assert template is not None
    messages = [{"role": "user", "content": "What is tea?"}]
    text = PUBLISHED.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == template.prompt.replace("{question}", "What is tea?")
    messages.append({"role": "assistant", "content": "A hot drink."})
    whole = PUBLISHED.apply_chat_template(messages, tokenize=False)
    assert whole == text + template.answer.replace("{answer}", "A hot drink.")


def test_the_tokenizer_of_the_base_adds_a_beginning_that_no_conversation_gets_twice() -> None:
    for tokenizer in (OURS, PUBLISHED):
        assert tokenizer("tea")["input_ids"][0] == BOS
        assert prompt_ids(tokenizer, "What is tea?")[:2] != [BOS, BOS]


def test_golden_ids_of_the_published_profile() -> None:
    """The notebook's marks: the beginning and end of a sequence as those of a turn; and two ends, the second by the trainer."""
    prompt, answers = conversation_ids(PUBLISHED, ROW, settings_of("a40_published").template)
    assert prompt == [BOS, USER, BREAK, *TEA, END, BREAK, BOS, ASSISTANT, BREAK]
    assert answers["chosen"] == [*DRINK, END, BREAK, END]
    assert answers["rejected"] == [*plain("No idea!"), END, BREAK, END]


WORDS = st.text(string.ascii_letters + " .,'?!\n", min_size=1, max_size=60).filter(lambda text: text.strip())


@settings(max_examples=60, deadline=None)
@given(question=WORDS, answer=WORDS)
def test_every_conversation_has_one_bos_and_one_end_at_the_right_places(question: str, answer: str) -> None:
    prompt, ids = prompt_ids(OURS, question), answer_ids(OURS, question, answer)
    assert (prompt.count(BOS), prompt[0], prompt.count(EOT)) == (1, BOS, 1)
    assert (ids.count(EOT), ids[-1], set(ids) & {BOS, END, HEADER}) == (1, EOT, set())
    whole = OURS.apply_chat_template(
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], tokenize=False
    )
    assert OURS.decode(prompt + ids) == whole
    assert prompt[-4:] == [HEADER, ASSISTANT, END_HEADER, TWO_BREAKS]


@settings(max_examples=60, deadline=None)
@given(question=WORDS, chosen=WORDS, rejected=WORDS)
def test_the_published_text_keeps_every_character(question: str, chosen: str, rejected: str) -> None:
    template = settings_of("a40_published").template
    row = {"question": question, "chosen": chosen, "rejected": rejected}
    prompt, answers = conversation_ids(PUBLISHED, row, template)
    assert template is not None
    for name in ("chosen", "rejected"):
        text, answer = template.fill(question, row[name])
        assert PUBLISHED.decode(prompt + answers[name]) == text + answer + "<|end_of_text|>"


def long_row(question: int, chosen: int, rejected: int) -> dict[str, Any]:
    """Texts of so many tokens each: " tea" is one."""
    return {"question": " tea" * question, "chosen": " tea" * chosen, "rejected": " tea" * rejected}


@pytest.mark.parametrize(
    ("words", "lengths"),
    [  # 8 marks around a question, 3 behind an answer
        ((100, 300, 20), (108, 303, 23)),
        ((201, 300, 20), (209, 303, 23)),  # 512 tokens fit
        ((202, 300, 20), (128, 303, 23)),
        ((400, 500, 450), (128, 384, 384)),
        ((60, 500, 20), (68, 384, 23)),
    ],
)
def test_the_published_profile_truncates_as_the_trainer_did(
    words: tuple[int, int, int], lengths: tuple[int, int, int]
) -> None:
    (row,), _ = tokenize_split([long_row(*words)], PUBLISHED, settings_of("a40_published"), "train")
    assert tuple(len(ids) for ids in row.values()) == lengths
    if lengths[0] == 128:
        assert row["prompt_ids"][0] == row["prompt_ids"][1]  # from the middle of the question
    assert (row["chosen_ids"][-1] == END) == (lengths[1] == words[1] + 3)


def test_the_repaired_profile_drops_the_longest_thousandth_and_cuts_nothing() -> None:
    rows = [long_row(10, 30, 20)] * 998 + [long_row(900, 300, 20), long_row(900, 300, 21)]
    kept, summary = tokenize_split(rows, OURS, settings_of("a40"), "train")
    assert len(kept) == 1000  # as long as each other
    kept, summary = tokenize_split([*rows[:-1], long_row(900, 301, 20)], OURS, settings_of("a40"), "train")
    limit = len(kept[-1]["prompt_ids"]) + len(kept[-1]["chosen_ids"])
    assert (len(kept), summary["max_length"], summary["dropped"]) == (999, limit, {f"pair_longer_than_{limit}": 1})
    assert set(summary["truncated"].values()) == {0}
    held_out, summary = tokenize_split([*rows[:3], rows[-1]], OURS, settings_of("a40"), "test", limit - 1)
    assert (len(held_out), summary["dropped"]) == (3, {f"pair_longer_than_{limit - 1}": 1})


def test_the_hand_made_marks_are_the_notebooks() -> None:
    template = settings_of("a40_published").template
    assert template is not None
    shown = re.sub(r"\s+", " ", template.prompt + template.answer)
    assert (
        shown == "<|begin_of_text|>user {question}<|end_of_text|> <|begin_of_text|>assistant {answer}<|end_of_text|> "
    )
