"""Log-likelihoods of the choices of a suite's questions: every prompt is read once, and what most of them begin with once for all.

A batch has a question a row: the rest of its prompt, and behind it all its choices, side by side. A mask lets every choice see the
beginning, its own question and itself; its positions go on from the question. The keys and values of the beginning, for example five worked
examples that a whole subject shares, are computed once and kept.

Not every model takes such a mask. `is_exact` compares both ways before the first is used, on a copy of the model's first layers in float32.
The other way, a prompt for every two choices, is that of hermes/training/shared_prefix.py.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

from hermes.data.prefixes import common_length
from hermes.evaluation.oracle import agrees
from hermes.training.answer_scores import AnswerLogProbs
from hermes.training.shared_prefix import Forward, body, logits_alone

Ids = list[int]
WORTH = 32  # tokens; a shorter beginning is read again with every prompt
# Of a GPU's memory beside the weights: for what the tokens of a batch need, and as much for the keys and values that its rows see.
SHARE = 0.25


class Room(NamedTuple):
    """The size of a batch: tokens that are read, padding among them, and tokens that its rows see, each row's beginning among them."""

    read: int
    seen: int


CPU_ROOM = Room(1024, 16 * 1024)  # more at once is no faster


class Part(NamedTuple):
    """Prompts that begin with the same tokens: how many, and which prompts, by length."""

    beginning: int
    members: list[int]


class Size(NamedTuple):
    """How large a task is in what a model may not take: verdicts are remembered by it.

    Attributes:
        question: tokens of the longest prompt with its longest choice.
        beginning: tokens of the longest beginning that is kept.
        row: tokens that a row holds at most, its beginning among them.
        several: whether a choice has more than one token, so that choices lie behind their question.
    """

    question: int
    beginning: int
    row: int
    several: int


def parts(prompts: Sequence[Ids]) -> list[Part]:
    """Prompts by their beginnings, the one that saves most first. The last token of a prompt belongs to no beginning, as it predicts."""
    rest = sorted(range(len(prompts)), key=lambda i: (prompts[i], i))
    found = []
    while rest:
        middle = prompts[rest[len(rest) // 2]][:-1]
        shared = [common_length([middle, prompts[i][:-1]]) for i in rest]
        others = enumerate(sorted(shared, reverse=True))
        worth = [(length * count, length) for count, length in others if count and length >= WORTH]
        _, length = max(worth, default=(0, 0))
        members = [i for i, own in zip(rest, shared, strict=True) if own >= length]
        found.append(Part(length, sorted(members, key=lambda i: (len(prompts[i]), i))))
        rest = [i for i, own in zip(rest, shared, strict=True) if own < length]
    return found


def width(prompt: Ids, answers: list[Ids], beginning: int) -> int:
    """Tokens of a question's row. The last one of a choice predicts nothing, and is not read."""
    return len(prompt) - beginning + sum(len(answer) - 1 for answer in answers)


def room(model: PreTrainedModel) -> Room:
    """What a batch has room for: powers of two by a GPU's memory and the model's widths, so that one kind of GPU has one answer."""
    if model.device.type != "cuda":
        return CPU_ROOM
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    one_read = model.dtype.itemsize * (8 * config.hidden_size + 4 * inner)  # what is alive in a layer
    one_seen = model.dtype.itemsize * 2 * heads * size * config.num_hidden_layers
    weights = sum(part.numel() * part.element_size() for part in model.parameters())
    free = SHARE * (torch.cuda.get_device_properties(model.device).total_memory - weights)
    read, seen = (1 << max(1, int(free / one)).bit_length() - 1 for one in (one_read, one_seen))
    return Room(min(read, 2**15), seen)  # a GPU is busy with so many


def batches(prompts: Sequence[Ids], answers: Sequence[list[Ids]], part: Part, limit: Room) -> Iterator[list[int]]:
    """The questions of a part, those of similar length in one batch; one at least, however long it is."""
    widths = {i: width(prompts[i], answers[i], part.beginning) for i in part.members}
    batch: list[int] = []
    for i in sorted(part.members, key=lambda i: (widths[i], i)):
        rows = len(batch) + 1
        if batch and (rows * widths[i] > limit.read or rows * (part.beginning + widths[i]) > limit.seen):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


class Rows(NamedTuple):
    """A batch of questions for one forward.

    Attributes:
        ids: (questions, width), padded on the right.
        positions: of the same shape.
        mask: (questions, 1, width, beginning + width), which tokens see which.
        predictors: for each token of each choice the flat index of the token of `ids` that predicts it, (answer tokens,).
        labels: those tokens, (answer tokens,).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    predictors: torch.Tensor
    labels: torch.Tensor


def rows_of(prompts: Sequence[Ids], answers: Sequence[list[Ids]], beginning: int) -> Rows:
    """The rows of questions whose prompts begin with so many tokens that are kept."""
    count = len(prompts)
    wide = max(width(prompt, choices, beginning) for prompt, choices in zip(prompts, answers, strict=True))
    ids, positions = torch.zeros(count, wide, dtype=torch.long), torch.zeros(count, wide, dtype=torch.long)
    sees = torch.eye(wide, dtype=torch.bool).repeat(
        count, 1, 1
    )  # padding sees itself, as a row without any is no number
    predictors, labels = [], []
    for row, (prompt, choices) in enumerate(zip(prompts, answers, strict=True)):
        asked = len(prompt) - beginning
        tokens, places = prompt[beginning:], list(range(beginning, len(prompt)))
        sees[row, :asked, :asked] = torch.ones(asked, asked, dtype=torch.bool).tril()
        for answer in choices:
            start, read = len(tokens), len(answer) - 1
            tokens = tokens + answer[:-1]
            places += range(len(prompt), len(prompt) + read)
            sees[row, start : start + read, :asked] = True
            sees[row, start : start + read, start : start + read] = torch.ones(read, read, dtype=torch.bool).tril()
            predictors += [row * wide + asked - 1, *range(row * wide + start, row * wide + start + read)]
            labels += answer
        ids[row, : len(tokens)] = torch.tensor(tokens)
        positions[row, : len(tokens)] = torch.tensor(places)
    mask = torch.cat([torch.ones(count, wide, beginning, dtype=torch.bool), sees], dim=2).unsqueeze(1)
    return Rows(ids, positions, mask, torch.tensor(predictors), torch.tensor(labels))


def read_beginning(model: PreTrainedModel, ids: Ids) -> DynamicCache | None:
    """The keys and values of a beginning; None of nothing."""
    if not ids:
        return None
    cache = DynamicCache(config=model.config)
    body(model)(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
    return cache


def log_probs(model: PreTrainedModel, how: Forward, kept: DynamicCache | None, rows: Rows) -> torch.Tensor:
    """The log-probability of each label in nats, and whether it is the likeliest token: (answer tokens, 2), on the model's device."""
    device, cache = model.device, copy.deepcopy(kept)
    if cache is not None:
        cache.batch_repeat_interleave(len(rows.ids))
    lowest = torch.finfo(model.dtype).min
    mask = torch.zeros(rows.mask.shape, dtype=model.dtype).masked_fill_(~rows.mask, lowest)
    states = body(model)(
        input_ids=rows.ids.to(device),
        position_ids=rows.positions.to(device),
        attention_mask=mask.to(device),
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state
    hidden = states.flatten(0, 1)[rows.predictors.to(device)]
    found, _, _, likeliest = AnswerLogProbs.apply(hidden, how.head(model), rows.labels.to(device))
    return torch.stack([found.double(), likeliest.double()], dim=1)


def size(prompts: Sequence[Ids], answers: Sequence[list[Ids]], asked: Sequence[Part]) -> Size:
    """The size of a task of one question or more, whose parts are `asked`."""
    return Size(
        max(len(prompt) + max(map(len, choices)) for prompt, choices in zip(prompts, answers, strict=True)),
        max(part.beginning for part in asked),
        max(width(prompt, choices, 0) for prompt, choices in zip(prompts, answers, strict=True)),
        any(len(answer) > 1 for choices in answers for answer in choices),
    )


@torch.inference_mode()
def scores(
    model: PreTrainedModel,
    how: Forward,
    prompts: Sequence[Ids],
    answers: Sequence[list[Ids]],
    asked: Sequence[Part],
) -> Iterator[tuple[int, list[tuple[float, bool]]]]:
    """For each question, by number, the log-probability of each choice in nats, and whether it is the greedy one.

    A batch is read back when the next one has been started, so that a GPU does not wait for Python.

    Args:
        model: a causal language model for which this is exact (`is_exact`).
        how: how it makes logits (hermes/training/exactness.py).
        prompts: ids, none empty.
        answers: the choices of each, none empty.
        asked: the questions that are asked, by their beginnings: `parts` gives all.
    """

    def read(batch: list[int], found: torch.Tensor) -> Iterator[tuple[int, list[tuple[float, bool]]]]:
        values = iter(found.cpu().split([len(answer) for i in batch for answer in answers[i]]))
        for i in batch:
            own = [next(values) for _ in answers[i]]
            yield i, [(float(part[:, 0].sum()), bool(part[:, 1].all())) for part in own]

    limit = room(model)
    waiting: tuple[list[int], torch.Tensor] | None = None
    for part in asked:
        kept = read_beginning(model, prompts[part.members[0]][: part.beginning])
        for batch in batches(prompts, answers, part, limit):
            rows = rows_of([prompts[i] for i in batch], [answers[i] for i in batch], part.beginning)
            found = log_probs(model, how, kept, rows)
            if waiting:
                yield from read(*waiting)
            waiting = batch, found
    if waiting:
        yield from read(*waiting)


def few(prompts: Sequence[Ids], answers: Sequence[list[Ids]], asked: Sequence[Part]) -> list[Part]:
    """The questions of a task that both ways are tried on. Together they have its size.

    These are the longest, the one with the longest choice and the widest row, each behind the beginning of its part. Of the largest part,
    and of that with the longest beginning, the longest, shortest and middle one are tried, too.
    """
    numbers = range(len(prompts))
    largest = [
        max(numbers, key=lambda i: len(prompts[i]) + max(map(len, answers[i]))),
        max(numbers, key=lambda i: max(map(len, answers[i]))),
        max(numbers, key=lambda i: width(prompts[i], answers[i], 0)),
    ]
    for part in (max(asked, key=lambda part: len(part.members)), max(asked, key=lambda part: part.beginning)):
        largest += [part.members[-1], part.members[0], part.members[len(part.members) // 2]]
    chosen = (Part(beginning, [i for i in members if i in largest]) for beginning, members in asked)
    return [part for part in chosen if part.members]


@torch.inference_mode()
def difference(
    model: PreTrainedModel,
    how: Forward,
    prompts: Sequence[Ids],
    answers: Sequence[list[Ids]],
    asked: Sequence[Part],
) -> float:
    """How far the two ways are apart on questions, in nats a token at most; arguments as of `scores`."""
    far = 0.0
    for i, found in scores(model, how, prompts, answers, asked):
        for answer, (ours, _) in zip(answers[i], found, strict=True):
            ids = torch.tensor([*prompts[i], *answer], device=model.device)
            logits = logits_alone(model.forward, ids, len(answer)).float()
            theirs = logits.log_softmax(dim=-1).gather(1, ids[len(prompts[i]) :].unsqueeze(1)).double().sum()
            apart = abs(ours - float(theirs)) / len(answer)
            far = max(far, apart if math.isfinite(apart) else math.inf)
    return far


def is_exact(
    folder: Path, how: Forward, prompts: Sequence[Ids], answers: Sequence[list[Ids]], asked: Sequence[Part]
) -> bool:
    """Whether a model of this folder gives the choices of a few questions what its own forward gives them; says so on stderr where not."""
    tried = few(prompts, answers, asked)
    return agrees(
        folder,
        lambda model: difference(model, how, prompts, answers, tried),
        "the choices of a question are not read side by side but two at a time",
    )
