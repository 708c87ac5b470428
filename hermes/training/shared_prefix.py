"""The forward of a preference batch with every prompt computed once, no padding, and logits only where an answer is predicted.

TRL hands the model a padded batch, chosen rows over rejected rows, and wants per-token log-probabilities of the same shape. Here
the pairs of the batch are laid end to end in one row,

    common | rest of prompt | chosen without its last token | rejected without its last token | rest of next prompt | ...

`common` is how all prompts of the batch begin, a chat template's system turn for example. Both branches of a pair take the positions
that follow its prompt. A branch attends to its prompt and itself, the rejected never to the chosen. The last token of
an answer predicts nothing, so it is no input; the last of the prompt predicts the first token of both answers. Attention runs
in blocks of queries that name their keys, so that no pair can see another and few masked products are computed. Its forward is
torch's scaled_dot_product_attention, on CUDA under the causal bias that keeps the flash kernel. On the CPU its backward is a few matrix
products a block. torch's own takes six times as long as its forward there (measured once: 8 pairs of 111 tokens, bfloat16, 2 threads).

What a layer may see besides is the model's own rule: its mask function of Transformers (a window, a chunk) is asked about positions, which
are those of separate sequences. Soft caps and attention sinks come as arguments of the attention. What a model does to its logits is found
by trying. hermes/training/exactness.py compares all of it with the model's own forward before it is used.

`share_prefix(model)` puts this behind the seam that TRL's `add_fused_lm_head` patches in (`model(..., fused_lm_head=True)`), so that
all losses, metrics and the trainer stay TRL's. The idea is that of prefix sharing for DPO (arXiv 2410.20305).
"""

import inspect
import types
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function
from trl.trainer.utils import FusedCausalLMOutput

from hermes.data.prefixes import common_length

ATTENTION = "shared_prefix"
IGNORED = -100
CHUNK = 128
CACHED = 8  # rows of logits that stay in a CPU's cache from one operation to the next
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


ROW: ContextVar[PackedPairs] = ContextVar("the row that a model is reading")


def row_mask(mask_function: Callable[..., Any] = causal_mask_function, **kwargs: Any) -> Blocks:
    """The mask of a kind of layer; Transformers' mask interface, whose other arguments are the same for every row."""
    row = ROW.get()
    if mask_function is causal_mask_function:
        return Blocks(row.blocks)
    return Blocks(block.under(mask_function, row.position_ids[0]) for block in row.blocks)


@dataclass(frozen=True)
class Scores:
    """What becomes of the products of queries and keys.

    Attributes:
        scaling: their factor.
        dropout: of the attention weights.
        softcap: c, where they become `c * tanh(score / c)`.
        sinks: (heads,) the score of a key that every query of a head has besides, and that has no value.
    """

    scaling: float
    dropout: float = 0.0
    softcap: float | None = None
    sinks: torch.Tensor | None = None


def join(states: torch.Tensor, parts: tuple[slice, ...]) -> torch.Tensor:
    """Parts of (1, heads, tokens, head size), one after another."""
    return torch.cat([states[:, :, part] for part in parts], dim=2)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, how: Scores) -> torch.Tensor:
    """The attention of a block's queries to its keys (`Block.mask`), (1, heads, queries, head size of the values)."""
    groups = q.size(1) // k.size(1)
    if how.softcap is None and how.sinks is None:
        bias = causal_lower_right(q.size(2), k.size(2)) if mask is None else mask
        return scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=how.dropout, scale=how.scaling, enable_gqa=groups > 1
        )
    if mask is None:
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril(k.size(2) - q.size(2))
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * how.scaling
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    if how.sinks is not None:
        sinks = how.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(1, -1, q.size(2), 1)
        scores = torch.cat([scores, sinks], dim=3)
    weights = scores.softmax(dim=-1, dtype=torch.float32)[..., : k.size(2)].to(q.dtype)
    return torch.nn.functional.dropout(weights, how.dropout) @ v


def attend_in_parts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: tuple[Block, ...], how: Scores
) -> torch.Tensor:
    """The attention of all blocks with torch's own backward, (1, heads, tokens, head size of the values).

    Each tensor is split once where any block begins or ends: the backward of a split is one concatenation, that of a slice a whole
    row of zeros.
    """
    slices = [part for block in blocks for part in (block.queries, *block.keys)]
    edges = sorted({edge for part in slices for edge in (part.start, part.stop)})
    place = {edge: i for i, edge in enumerate(edges)}
    q, k, v = (x.split([end - start for start, end in pairwise(edges)], dim=2) for x in (query, key, value))

    def joined(parts: tuple[torch.Tensor, ...], places: tuple[slice, ...]) -> torch.Tensor:
        return torch.cat([part for p in places for part in parts[place[p.start] : place[p.stop]]], dim=2)

    outputs = [
        attend(joined(q, (block.queries,)), joined(k, block.keys), joined(v, block.keys), block.mask, how)
        for block in blocks
    ]
    return torch.cat(outputs, dim=2)


class RowAttention(torch.autograd.Function):
    """The attention of all blocks without dropout, for the CPU, with a backward of plain matrix products.

    The weights are computed again in the backward, a block at a time (Dao 2022, B.2); what is kept for it grows with tokens^2 only
    in the blocks' masks, a byte a pair of query and key for all layers together.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: tuple[Block, ...], scaling: float
    ) -> torch.Tensor:
        """The outputs of (1, heads, tokens, head size) queries; the last size is that of the values."""
        output = query.new_empty(*query.shape[:3], value.size(3))
        for block in blocks:
            q, k, v = query[:, :, block.queries], join(key, block.keys), join(value, block.keys)
            output[:, :, block.queries] = attend(q, k, v, block.mask, Scores(scaling))
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.scaling = blocks, scaling
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        """The gradient by query, key and value."""
        query, key, value = ctx.saved_tensors
        kv_heads = key.size(1)
        groups = query.size(1) // kv_heads
        scaled, by_query = query * ctx.scaling, torch.empty_like(query)
        by_key, by_value = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))
        for block in ctx.blocks:
            k, v = join(key, block.keys)[0], join(value, block.keys)[0]
            count = block.queries.stop - block.queries.start
            # the heads that share a key head, one over another
            q, wanted = (x[0, :, block.queries].reshape(kv_heads, groups * count, -1) for x in (scaled, gradients[0]))
            scores = torch.bmm(q, k.transpose(1, 2))
            scores.view(kv_heads, groups, count, -1).masked_fill_(~block.mask, -torch.inf)
            weights = scores.softmax(dim=-1)
            by_v = torch.bmm(weights.transpose(1, 2), wanted)
            by_weight = torch.bmm(wanted, v.transpose(1, 2))
            by_score = torch.ops.aten._softmax_backward_data(by_weight, weights, -1, weights.dtype)
            by_query[0, :, block.queries] = (torch.bmm(by_score, k) * ctx.scaling).view(-1, count, k.size(2))
            by_k = torch.bmm(by_score.transpose(1, 2), q)
            lengths = [part.stop - part.start for part in block.keys]
            for total, found in ((by_key, by_k), (by_value, by_v)):
                for part, share in zip(block.keys, found.split(lengths, dim=1), strict=True):
                    total[0, :, part] += share
        return by_query, by_key.to(key.dtype), by_value.to(value.dtype), None, None


def shared_prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Blocks,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention block by block, behind Transformers' attention interface: (1, tokens, heads, head size), and no weights.

    Args:
        module: the attention layer (unused; part of the interface).
        query: (1, heads, tokens, head size).
        key: (1, key-value heads, tokens, head size).
        value: like `key`; the head size may be another.
        attention_mask: who sees whom, by `row_mask`.
        scaling: factor of the scores; 1 / sqrt(head size) by default.
        dropout: of the attention weights.
        softcap: of the scores.
        s_aux: the scores of the attention sinks, (heads,).
        kwargs: other arguments of the interface, such as a window, which the mask has already.

    Returns:
        (1, tokens, heads, head size) and no weights.

    Raises:
        TypeError: the model makes its masks by itself.
    """
    if not isinstance(attention_mask, Blocks):
        raise TypeError(f"{type(module).__name__} makes its attention mask by itself")
    how = Scores(query.size(-1) ** -0.5 if scaling is None else scaling, dropout, softcap, s_aux)
    if query.is_cuda or how != Scores(how.scaling):
        output = attend_in_parts(query, key, value, attention_mask, how)
    else:
        output = RowAttention.apply(query, key, value, attention_mask, how.scaling)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, shared_prefix_attention)
AttentionMaskInterface.register(ATTENTION, row_mask)


@dataclass(frozen=True)
class Head:
    """How a model makes logits of its last hidden states: `(hidden @ weight.T + bias) * scale`, and then a soft cap.

    Attributes:
        weight: (vocabulary, size).
        bias: (vocabulary,).
        scale: their factor.
        softcap: c, where they become `c * tanh(logits / c)`.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits of hidden states (tokens, size), (tokens, vocabulary)."""
        products = hidden @ self.weight.T
        return self.finish(products if self.bias is None else products + self.bias)

    def finish(self, products: torch.Tensor) -> torch.Tensor:
        """The logits of what the output matrix made."""
        if self.scale != 1:
            products = products * self.scale
        return products if self.softcap is None else torch.tanh(products / self.softcap) * self.softcap

    def direction(self, logits: torch.Tensor, probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The gradient of the labels' log-probabilities by the hidden states, (tokens, size); probabilities may be changed."""
        if self.scale == 1 and self.softcap is None:
            return self.weight[labels] - probabilities @ self.weight
        slope = probabilities.neg_()
        slope[torch.arange(len(labels), device=labels.device), labels] += 1
        if self.softcap is not None:
            slope *= 1 - (logits / self.softcap) ** 2
        return slope @ self.weight * self.scale


class AnswerLogProbs(torch.autograd.Function):
    """Log-probabilities of labels from hidden states and a frozen output matrix, chunk by chunk.

    The gradient of `log p(label)` by the hidden state is `W[label] - sum_v p_v W_v`. It is taken while a chunk's logits exist, so that none
    of them outlives its chunk and nothing is computed twice. On the CPU the softmax goes through a chunk a few rows at a time.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: Head, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Scores `labels` (answers,) given `hidden` (answers, size).

        Returns:
            log_probs, entropy, mean_logits (answers,) float32 and is_top1 (answers,) bool; only log_probs has a gradient.
        """
        needs_gradient = ctx.needs_input_grad[0]
        block = CHUNK if hidden.is_cuda else CACHED
        directions, results = [], []
        for rows, wanted in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
            products = head.logits(rows)
            made = products.clone() if needs_gradient and head.softcap is not None else products
            for part, labelled in zip(products.split(block), wanted.split(block), strict=True):
                logits = part.float()
                largest, top = logits.max(dim=-1, keepdim=True)
                logits -= largest
                label_logits = logits.gather(1, labelled.unsqueeze(1)).squeeze(1)
                mean = logits.mean(dim=-1) + largest.squeeze(1)
                exponentials = logits.exp()
                total = exponentials.sum(dim=-1)
                normalizer = total.log()
                entropy = normalizer - torch.linalg.vecdot(exponentials, logits) / total
                results.append((label_logits - normalizer, entropy, mean, top.squeeze(1) == labelled))
                if needs_gradient:
                    part.copy_(exponentials.div_(total.unsqueeze(1)))
            if needs_gradient:
                directions.append(head.direction(made, products, wanted))
        if needs_gradient:
            ctx.save_for_backward(torch.cat(directions) if directions else hidden)
        fields = [torch.cat(field) for field in zip(*results, strict=True)]
        ctx.mark_non_differentiable(*fields[1:])
        return tuple(fields)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The gradient by the hidden states, (answers, size)."""
        (directions,) = ctx.saved_tensors
        return (gradients[0].unsqueeze(1) * directions.float()).to(directions.dtype), None, None


@dataclass(frozen=True)
class Forward:
    """How the pairs of a model are computed (hermes/training/exactness.py finds it).

    Attributes:
        shared: by one row with every prompt once; otherwise each answer alone, by the model's own forward.
        scale: factor of the logits of a shared row.
        softcap: of the logits of a shared row.
    """

    shared: bool = True
    scale: float = 1.0
    softcap: float | None = None

    def head(self, model: PreTrainedModel) -> Head:
        """The model's head."""
        output = model.get_output_embeddings()
        return Head(output.weight, getattr(output, "bias", None), self.scale, self.softcap)


def share_prefix(model: PreTrainedModel, how: Forward = Forward()) -> None:
    """Gives a causal language model the forward of preference pairs for `model(..., fused_lm_head=True)`.

    The call takes TRL's padded batch (`input_ids`, `attention_mask`, `labels`) and returns a `FusedCausalLMOutput`. Its fields a token have
    the shape (2 * pairs, length - 1), zero where nothing is scored. Without the flag the forward is the original.
    Call it before wrapping the model with PEFT, or on the model inside.

    Raises:
        ValueError: the output matrix is trained, which the fused gradient does not cover.
    """
    if any(parameter.requires_grad for parameter in model.get_output_embeddings().parameters()):
        raise ValueError("the shared-prefix forward needs a frozen output matrix")
    original = model.forward

    def forward(
        self: PreTrainedModel,
        *args: Any,
        fused_lm_head: bool = False,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if fused_lm_head and labels is not None:
            if how.shared:
                return score_pairs(self, kwargs["input_ids"], kwargs["attention_mask"], labels, how)
            return score_alone(original, kwargs["input_ids"], kwargs["attention_mask"], labels)
        return original(*args, labels=labels, **kwargs) if labels is not None else original(*args, **kwargs)

    model.forward = types.MethodType(forward, model)
    if how.shared:
        model.set_attn_implementation(ATTENTION)


def spread(scored: torch.Tensor, fields: tuple[torch.Tensor, ...]) -> FusedCausalLMOutput:
    """What was found of every scored token, at its place in TRL's padded, shifted batch."""
    log_probs, entropy, mean_logits, is_top1 = (
        field.new_zeros(scored.shape).masked_scatter(scored, field) for field in fields
    )
    return FusedCausalLMOutput(
        log_probs=log_probs, entropy=entropy, mean_logits=mean_logits, is_top1=is_top1, label_mask=scored
    )


def score_pairs(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, how: Forward
) -> FusedCausalLMOutput:
    """Log-probabilities (and TRL's metrics) of a padded preference batch by one pass over the packed row."""
    packed = pack_pairs(input_ids, attention_mask, labels)
    hidden = predicting_states(model, packed)
    return spread(packed.scored, AnswerLogProbs.apply(hidden, how.head(model), packed.labels))


def score_alone(
    forward: Callable[..., Any], input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> FusedCausalLMOutput:
    """The same by the model's own `forward`, an answer at a time."""
    found = []
    for row, length, wanted in zip(input_ids, attention_mask.sum(dim=1).tolist(), labels, strict=True):
        targets = wanted[1:length][wanted[1:length] != IGNORED]
        logits = logits_alone(forward, row[:length], len(targets)).float()
        log_probs = logits.log_softmax(dim=-1)
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
        label = log_probs.gather(1, targets.unsqueeze(1)).squeeze(1)
        found.append((label, entropy.detach(), logits.detach().mean(dim=-1), logits.argmax(dim=-1) == targets))
    return spread(labels[:, 1:] != IGNORED, tuple(torch.cat(field) for field in zip(*found, strict=True)))


def logits_alone(forward: Callable[..., Any], ids: torch.Tensor, count: int) -> torch.Tensor:
    """The logits that predict the last `count` of a sequence's ids (tokens,), by the model's own `forward`: (count, vocabulary)."""
    kept = {"logits_to_keep": count + 1} if "logits_to_keep" in inspect.signature(forward).parameters else {}
    return forward(input_ids=ids.unsqueeze(0), use_cache=False, **kept).logits[0, -count - 1 : -1]


def body(model: PreTrainedModel) -> Any:
    """The part of a causal language model below its output matrix."""
    return model.model if model.base_model is model else model.base_model


def predicting_states(model: PreTrainedModel, packed: PackedPairs) -> torch.Tensor:
    """The last hidden states that predict the answers' tokens, (answers, size); the model's attention must be `ATTENTION`."""
    reading = ROW.set(packed)
    try:
        states = body(model)(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            attention_mask=torch.ones_like(packed.input_ids),
            use_cache=False,
        ).last_hidden_state
    finally:
        ROW.reset(reading)
    return states[0, packed.predictors]


def pair_logits(model: PreTrainedModel, chosen: Sequences, rejected: Sequences, how: Forward) -> list[torch.Tensor]:
    """The whole logits of pairs' answers, for a model as it was loaded: all chosen, then all rejected, (answer tokens, vocabulary) each.

    Args:
        model: any causal language model; its attention is switched for this call alone.
        chosen: prompt and answer ids of each pair's first answer.
        rejected: the same of the second; the prompts are the same, and an answer may be empty.
        how: the forward that is exact for this model.
    """
    both = (*chosen, *rejected)
    if not how.shared:
        rows = (torch.tensor([*prompt, *answer], device=model.device) for prompt, answer in both)
        return [logits_alone(model.forward, row, len(answer)) for row, (_, answer) in zip(rows, both, strict=True)]
    batch = padded_batch(both, model.device)
    attention = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        hidden = predicting_states(model, pack_pairs(*batch))
    finally:
        model.set_attn_implementation(attention)
    logits = how.head(model).finish(model.get_output_embeddings()(hidden))
    return list(logits.split([len(answer) for _, answer in both]))


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
