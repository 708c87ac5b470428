"""What training should leave alone: how well a model predicts prose, and what it knows, both unlike anything in the training rows.

The prose is that of the task descriptions in lm-eval's own package, most of them abstracts of papers: its version is locked, so every
machine has the same. The knowledge is the capitals of countries (capitals.yaml), each asked with four choices. Base and tuned model
meet the same tokens, so every change is paired.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
from transformers import PreTrainedTokenizerBase

from hermes.data.chat_text import rendered
from hermes.evaluation.chat_models import ChatModel
from hermes.evaluation.intervals import paired_gain, ratio_interval
from hermes.params import read_yaml

Ids = list[int]
Row = dict[str, Any]
SHORTEST = 300  # characters of a line that is a paragraph of prose
TOKENS = 24_000  # at least, where the package has as many
CAPITALS: dict[str, str] = read_yaml(Path(__file__).with_name("capitals.yaml"))
OTHERS = (17, 41, 67)  # places further in the list, where the wrong choices come from


def paragraphs() -> Iterator[tuple[str, str]]:
    """Prose, each paragraph behind its file's folder: long lines without links, tables and references; each once."""
    root, seen = Path(lm_eval.tasks.__file__).parent, set()
    for path in sorted(root.rglob("README.md")):
        for line in path.read_text(encoding="utf-8").splitlines():
            text = line.strip()
            if len(text) >= SHORTEST and not any(mark in text for mark in ("http", "@", "|", "`")) and text not in seen:
                seen.add(text)
                yield path.parent.relative_to(root).as_posix(), text


def prose(tokenizer: PreTrainedTokenizerBase, longest: int) -> list[tuple[str, Ids]]:
    """The ids of paragraphs, cut to so many tokens each: as many paragraphs as make `TOKENS`."""
    found: list[tuple[str, Ids]] = []
    for name, text in paragraphs():
        ids = tokenizer(text)["input_ids"][:longest]  # with what a tokenizer puts before any text
        if len(ids) > 1:
            found.append((name, ids))
        if sum(len(ids) - 1 for _, ids in found) >= TOKENS:
            break
    return found


def predicted(model: ChatModel, longest: int) -> list[tuple[str, float, int]]:
    """(folder, log-likelihood in nats, tokens) of every paragraph, its first token given."""
    texts = prose(model.tokenizer, longest)
    scores = model.scores_of([ids[:1] for _, ids in texts], [[ids[1:]] for _, ids in texts])
    return [(name, total, len(ids) - 1) for (name, ids), ((total, _),) in zip(texts, scores, strict=True)]


def known(model: ChatModel) -> list[tuple[str, float]]:
    """(country, 1.0 where its capital is the likeliest of the four choices by letter, else 0.0)."""
    names = list(CAPITALS.values())
    prompts, answers, letters = [], [], []
    for i, (country, capital) in enumerate(CAPITALS.items()):
        asked = [{"role": "user", "content": f"What is the capital of {country}?"}]
        texts = [
            f"The capital of {country} is {name}." for name in (capital, *(names[(i + n) % len(names)] for n in OTHERS))
        ]
        prompts.append(model.tok_encode(rendered(model.tokenizer, asked, True)))
        answers.append([[*model.tok_encode(text), model.eot_token_id] for text in texts])
        letters.append([len(text) for text in texts])
    found = []
    for country, scores, sizes in zip(CAPITALS, model.scores_of(prompts, answers), letters, strict=True):
        means = [total / size for (total, _), size in zip(scores, sizes, strict=True)]
        found.append((country, float(means[0] == max(means))))
    return found


def ask(model: ChatModel, longest: int) -> Row:
    """What one model is asked: `prose` and `capitals`, as `compare` takes them."""
    return {"prose": predicted(model, longest), "capitals": known(model)}


def perplexity(found: Sequence[tuple[str, float, int]]) -> float:
    """e to the mean surprise a token."""
    return math.exp(-sum(total for _, total, _ in found) / sum(count for *_, count in found))


def compare(before: Row, after: Row) -> Row:
    """Both before and after, and the paired change: of the surprise in nats a token by folder, of capitals in points by country."""
    rows = [
        (name, old - new, count)
        for (name, old, count), (_, new, _) in zip(before["prose"], after["prose"], strict=True)
    ]
    surprise = ratio_interval(rows)
    capitals = [
        ("capital", country, old, new)
        for (country, old), (_, new) in zip(before["capitals"], after["capitals"], strict=True)
    ]
    return {
        "prose": {
            "before": perplexity(before["prose"]),
            "after": perplexity(after["prose"]),
            "change": math.expm1(surprise["mean"]),
            "low": math.expm1(surprise["low"]),
            "high": math.expm1(surprise["high"]),
            "tokens": sum(count for *_, count in rows),
            "paragraphs": len(rows),
        },
        "capitals": {
            "before": sum(old for *_, old, _ in capitals) / len(capitals),
            "after": sum(new for *_, new in capitals) / len(capitals),
            **paired_gain(capitals),
        },
    }
