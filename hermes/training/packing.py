"""A batch of preference pairs as one row without padding, in which every prompt stands once.

The pairs of a batch are laid end to end,

    common | rest of prompt | chosen without its last token | rejected without its last token | rest of next prompt | ...

`common` is how all prompts of the batch begin, a chat template's system turn for example. Both branches of a pair take the positions
that follow its prompt. A branch attends to its prompt and itself, the rejected never to the chosen. The last token of an answer predicts
nothing, so it is no input; the last of the prompt predicts the first token of both answers. Attention runs in blocks of queries that name
their keys, so that no pair can see another and few masked products are computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hermes.data.prefixes import common_length

IGNORED = -100
QUERIES = 256
Sequences = Sequence[tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Block:
    """Queries that stand together in the row, and the keys they attend to.

    Attributes:
        queries: their place in the row.
        keys: places in the row, in order; the last ends where the queries do.
        mask: (queries, keys) bool, which keys each query attends to; None, for CUDA: the block is causal from the lower right.
    """

    queries: slice
    keys: tuple[slice, ...]
    mask: torch.Tensor | None

    def under(self, rule: Callable[..., Any], positions: torch.Tensor) -> "Block":
        """This block where a mask function of Transformers has a say, too: of a query's and a key's position (tokens,) in its sequence."""
        q, k = positions[self.queries], torch.cat([positions[part] for part in self.keys])
        mask = self.mask
        if mask is None:
            mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
        first = positions.new_zeros(1, 1)  # the only row of the batch, and any head
        allowed = mask & rule(first, first, q.unsqueeze(1), k.unsqueeze(0))
        return self if torch.equal(allowed, mask) else replace(self, mask=allowed)


class Blocks(tuple[Block, ...]):
    """The blocks of a row, as the layers of one kind are to see it; they pass it on as their attention mask."""


@dataclass(frozen=True)
class PackedPairs:
    """A batch of pairs as one row.

    Attributes:
        input_ids: (1, tokens).
        position_ids: (1, tokens); both answers of a pair count on from its prompt.
        blocks: of attention, in row order; every token is a query of one of them.
        predictors: (answers,) index of the input token that predicts each scored token.
        labels: (answers,) the scored tokens, all chosen answers first, in batch order.
        scored: (2 * pairs, length - 1) bool: where the scored tokens stand in TRL's padded, shifted batch.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    blocks: tuple[Block, ...]
    predictors: torch.Tensor
    labels: torch.Tensor
    scored: torch.Tensor


def causal_blocks(before: tuple[slice, ...], branch: slice, device: torch.device) -> list[Block]:
    """The attention of a branch of the row to what comes `before` it and to itself, on the CPU in strips of `QUERIES`."""
    blocks = []
    step = QUERIES if device.type == "cpu" else max(1, branch.stop - branch.start)
    for start in range(branch.start, branch.stop, step):
        stop = min(start + step, branch.stop)
        keys = (*before, slice(branch.start, stop))
        count = sum(part.stop - part.start for part in keys)
        mask = (
            torch.ones(stop - start, count, dtype=torch.bool).tril(count - stop + start)
            if device.type == "cpu"
            else None
        )
        blocks.append(Block(slice(start, stop), keys, mask))
    return blocks


def pair_blocks(common: int, start: int, prompt: int, chosen: int, rejected: int, device: torch.device) -> list[Block]:
    """The attention of a pair whose tokens (the rest of its prompt, two branches) stand from `start` on in the row."""
    first, second, stop = start + prompt, start + prompt + chosen, start + prompt + chosen + rejected
    beginning = slice(0, common)
    if device.type == "cpu" and 0 < stop - start <= QUERIES:  # both branches at once: fewer and larger products
        mask = torch.ones(stop - start, common + stop - start, dtype=torch.bool).tril(common)
        mask[prompt + chosen :, common + prompt : common + prompt + chosen] = False
        return [Block(slice(start, stop), (beginning, slice(start, stop)), mask)]
    return [
        *causal_blocks((beginning,), slice(start, second), device),
        *causal_blocks((beginning, slice(start, first)), slice(second, stop), device),
    ]


def pack_pairs(input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> PackedPairs:
    """Lays a padded preference batch end to end.

    Args:
        input_ids: (2 * pairs, length), chosen rows over rejected rows, padded on the right.
        attention_mask: same shape, 0 on padding.
        labels: same shape, -100 outside the answers.

    Raises:
        ValueError: an odd number of rows, labels that are not one run at the end of a row, or a pair with two prompts.
    """
    rows, device = len(input_ids), input_ids.device
    if rows % 2:
        raise ValueError(f"a preference batch has chosen and rejected rows; got {rows} rows")
    pairs = rows // 2
    is_answer = labels != IGNORED
    lengths = attention_mask.sum(dim=1).tolist()
    answers = is_answer.sum(dim=1).tolist()
    prompts = [input_ids[row, : lengths[row] - answers[row]] for row in range(rows)]
    for pair in range(pairs):
        for row in (pair, pair + pairs):
            if not is_answer[row, len(prompts[row]) : lengths[row]].all():
                raise ValueError(f"pair {pair}: the answers are not the end of their rows")
        if not torch.equal(prompts[pair], prompts[pair + pairs]):
            raise ValueError(f"pair {pair}: chosen and rejected do not follow the same prompt")
    start = common = common_length([prompt.tolist() for prompt in prompts])
    ids, positions = [prompts[0][:common]], [torch.arange(common, device=device)]
    blocks = causal_blocks((), slice(0, common), device)
    predictors: list[list[int]] = [[] for _ in range(rows)]
    for pair in range(pairs):
        chosen, rejected = input_ids[pair], input_ids[pair + pairs]
        prompt, rest = len(prompts[pair]), len(prompts[pair]) - common
        predicted = max(answers[pair] - 1, 0)
        c, r = max(predicted, int(prompt == 0)), max(answers[pair + pairs] - 1, 0)  # a row is never empty
        ids += [chosen[common : prompt + c], rejected[prompt : prompt + r]]
        branch = torch.arange(common, prompt + max(c, r), device=device)
        positions += [branch[: rest + c], branch[rest : rest + r]]
        blocks += pair_blocks(common, start, rest, c, r, device)
        last = [start + rest - 1 if rest else common - 1] if prompt else []
        first, second = start + rest, start + rest + c
        predictors[pair] = last * (answers[pair] > 0) + list(range(first, first + predicted))
        predictors[pair + pairs] = last * (answers[pair + pairs] > 0) + list(range(second, second + r))
        start = second + r
    scored = is_answer[:, 1:]
    flat = [index for row in predictors for index in row]
    return PackedPairs(
        input_ids=torch.cat(ids).unsqueeze(0),
        position_ids=torch.cat(positions).unsqueeze(0),
        blocks=tuple(blocks),
        predictors=torch.tensor(flat, dtype=torch.long, device=device),
        labels=labels[:, 1:][scored],
        scored=scored,
    )


def padded_batch(sequences: Sequences, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompts and answers as rows (ids, attention mask, labels), padded on the right with zeros."""
    rows = [[*prompt, *answer] for prompt, answer in sequences]
    labels = [[IGNORED] * len(prompt) + answer for prompt, answer in sequences]
    length = max(map(len, rows))
    ids, mask, wanted = (
        torch.tensor([row + [fill] * (length - len(row)) for row in values], device=device)
        for values, fill in ((rows, 0), ([[1] * len(row) for row in rows], 0), (labels, IGNORED))
    )
    return ids, mask, wanted
