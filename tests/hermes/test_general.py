"""Prose and capitals that training should leave alone."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from hermes.evaluation import general
from hermes.evaluation.chat_models import HuggingFaceChat
from hermes.model.base import load
from hermes.training.shared_prefix import logits_alone


@pytest.fixture
def chat(tiny_model_folder: Path) -> HuggingFaceChat:
    return HuggingFaceChat(
        load(tiny_model_folder, torch.float32), AutoTokenizer.from_pretrained(tiny_model_folder), 8, 8
    )


def test_the_prose_is_the_locked_packages_and_long_enough(chat: HuggingFaceChat) -> None:
    found = general.prose(chat.tokenizer, 512)
    assert sum(len(ids) - 1 for _, ids in found) >= 20_000
    assert len({name for name, _ in found}) > 20
    texts = [text for _, text in general.paragraphs()]
    assert len(texts) == len(set(texts))
    assert not any("http" in text or "|" in text for text in texts)
    assert general.prose(chat.tokenizer, 512) == found


def test_every_capital_is_asked_with_three_others() -> None:
    names = list(general.CAPITALS.values())
    assert len(names) == len(set(names)) > 100
    for i in range(len(names)):
        assert len({names[(i + n) % len(names)] for n in (0, *general.OTHERS)}) == 4


def test_paragraphs_have_the_likelihood_that_the_model_gives_them(
    chat: HuggingFaceChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(general, "TOKENS", 400)
    found = general.predicted(chat, 60)
    texts = general.prose(chat.tokenizer, 60)
    assert len(found) == len(texts) > 3
    for (name, total, count), (theirs, ids) in zip(found, texts, strict=True):
        assert (name, count) == (theirs, len(ids) - 1)
        with torch.inference_mode():
            logits = logits_alone(chat.model.forward, torch.tensor(ids), count).log_softmax(dim=-1)
        assert total == pytest.approx(float(logits.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).sum()), abs=1e-3)


def test_a_model_that_knows_the_capitals_is_told_from_one_that_does_not(
    chat: HuggingFaceChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    def knowing(prompts: list[list[int]], answers: list[list[list[int]]]) -> list[list[tuple[float, bool]]]:
        return [[(-float(len(ids)) - (place > 0) * 50, False) for place, ids in enumerate(own)] for own in answers]

    few = dict(list(general.CAPITALS.items())[:70])
    monkeypatch.setattr(general, "CAPITALS", few)
    by_chance = general.known(chat)
    assert [country for country, _ in by_chance] == list(few)
    assert 0.05 < sum(hit for _, hit in by_chance) / len(few) < 0.6
    monkeypatch.setattr(chat, "scores_of", knowing)
    assert all(hit == 1.0 for _, hit in general.known(chat))


def test_the_change_is_paired_and_that_of_the_same_tokens() -> None:
    before = {
        "prose": [("a", -30.0, 10), ("a", -60.0, 20), ("b", -40.0, 10)],
        "capitals": [("X", 1.0), ("Y", 0.0), ("Z", 1.0)],
    }
    after = {
        "prose": [("a", -31.0, 10), ("a", -62.0, 20), ("b", -41.0, 10)],
        "capitals": [("X", 1.0), ("Y", 1.0), ("Z", 0.0)],
    }
    found = general.compare(before, after)
    assert found["prose"]["before"] == pytest.approx(2.718281828 ** (130 / 40))
    assert found["prose"]["change"] == pytest.approx(found["prose"]["after"] / found["prose"]["before"] - 1)
    assert found["prose"]["low"] <= found["prose"]["change"] <= found["prose"]["high"]
    assert (found["prose"]["tokens"], found["prose"]["paragraphs"]) == (40, 3)
    assert found["capitals"]["points"] == 0
    assert (found["capitals"]["before"], found["capitals"]["after"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
