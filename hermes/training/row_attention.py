"""Attention of a packed row (packing.py), behind Transformers' attention and mask interfaces.

Its forward is torch's scaled_dot_product_attention, on CUDA under the causal bias that keeps the flash kernel. On the CPU its backward is a
few matrix products a block. torch's own takes six times as long as its forward there (measured once: 8 pairs of 111 tokens, bfloat16,
2 threads).

What a layer may see besides is the model's own rule: its mask function of Transformers (a window, a chunk) is asked about positions, which
are those of separate sequences. Soft caps and attention sinks come as arguments of the attention.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from hermes.training.packing import Block, Blocks, PackedPairs

ATTENTION = "shared_prefix"
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
