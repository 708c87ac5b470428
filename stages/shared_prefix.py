"""The forward of a preference batch with every prompt computed once, no padding, and logits only where an answer is predicted.

TRL hands the model a padded batch, chosen rows over rejected rows, and wants per-token log-probabilities of the same shape. Here
the pairs of the batch are laid end to end in one row,

    prompt | chosen without its last token | rejected without its last token | next prompt | ...

where both branches take the positions that follow the prompt, and the rejected branch attends to the prompt and itself but not
to the chosen. The last token of an answer predicts nothing, so it is no input; the last of the prompt predicts the first
token of both answers. Attention runs pair by pair, so that no pair can see another and no masked block is computed. Its forward
is torch's scaled_dot_product_attention; on the CPU its backward is a few matrix products a pair, because torch's
own takes six times as long as its forward there (measured once: 8 pairs of 111 tokens, bfloat16, 2 threads).

`share_prefix(model)` puts this behind the seam that TRL's `add_fused_lm_head` patches in (`model(..., fused_lm_head=True)`), so that
all losses, metrics and the trainer stay TRL's. The idea is that of prefix sharing for DPO (arXiv 2410.20305).
"""

import types
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

ATTENTION = "shared_prefix"
IGNORED = -100
CHUNK = 128
QUERIES = 512
Sequences = list[tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Segment:
    """One pair's place in the row: where it starts, and how many input tokens its parts have."""

    start: int
    prompt: int
    chosen: int
    rejected: int
    mask: torch.Tensor  # (tokens, tokens) bool, over all parts: which keys each query attends to

    @property
    def tokens(self) -> int:
        """How many input tokens the pair has."""
        return self.prompt + self.chosen + self.rejected


@dataclass(frozen=True)
class PackedPairs:
    """A batch of pairs as one row.

    Attributes:
        input_ids: (1, tokens).
        position_ids: (1, tokens); both answers of a pair count on from its prompt.
        segments: the pairs, in row order.
        predictors: (answers,) index of the input token that predicts each scored token.
        labels: (answers,) the scored tokens, all chosen answers first, in batch order.
        scored: (2 * pairs, length - 1) bool: where the scored tokens stand in TRL's padded, shifted batch.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: tuple[Segment, ...]
    predictors: torch.Tensor
    labels: torch.Tensor
    scored: torch.Tensor


def pack_pairs(input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> PackedPairs:
    """Lays a padded preference batch end to end.

    Args:
        input_ids: (2 * pairs, length), chosen rows over rejected rows, padded on the right.
        attention_mask: same shape, 0 on padding.
        labels: same shape, -100 outside the answers.

    Raises:
        ValueError: an odd number of rows, labels that are not one run at the end of a row, or a pair with two prompts.
    """
    rows, _ = input_ids.shape
    if rows % 2:
        raise ValueError(f"a preference batch has chosen and rejected rows; got {rows} rows")
    pairs = rows // 2
    is_answer = labels != IGNORED
    lengths = attention_mask.sum(dim=1).tolist()
    answers = is_answer.sum(dim=1).tolist()
    ids, positions, segments = [], [], []
    predictors: list[list[int]] = [[] for _ in range(rows)]
    start = 0
    for pair in range(pairs):
        chosen, rejected = input_ids[pair, : lengths[pair]], input_ids[pair + pairs, : lengths[pair + pairs]]
        prompt = lengths[pair] - answers[pair]
        if not (
            is_answer[pair, prompt : lengths[pair]].all()
            and is_answer[pair + pairs, prompt : lengths[pair + pairs]].all()
        ):
            raise ValueError(f"pair {pair}: the answers are not the end of their rows")
        if lengths[pair + pairs] - answers[pair + pairs] != prompt or not torch.equal(
            chosen[:prompt], rejected[:prompt]
        ):
            raise ValueError(f"pair {pair}: chosen and rejected do not follow the same prompt")
        predicted = max(answers[pair] - 1, 0)
        c, r = max(predicted, int(prompt == 0)), max(answers[pair + pairs] - 1, 0)  # a row is never empty
        ids += [chosen[: prompt + c], rejected[prompt : prompt + r]]
        branch = torch.arange(prompt, prompt + max(c, r), device=input_ids.device)
        positions += [torch.arange(prompt, device=input_ids.device), branch[:c], branch[:r]]
        mask = torch.ones(prompt + c + r, prompt + c + r, dtype=torch.bool, device=input_ids.device).tril()
        mask[prompt + c :, prompt : prompt + c] = False
        segments.append(Segment(start, prompt, c, r, mask))
        last = [start + prompt - 1] if prompt else []
        predictors[pair] = last * (answers[pair] > 0) + list(range(start + prompt, start + prompt + predicted))
        first = start + prompt + c
        predictors[pair + pairs] = last * (answers[pair + pairs] > 0) + list(range(first, first + r))
        start += prompt + c + r
    scored = is_answer[:, 1:]
    flat = [index for row in predictors for index in row]
    return PackedPairs(
        input_ids=torch.cat(ids).unsqueeze(0),
        position_ids=torch.cat(positions).unsqueeze(0),
        segments=tuple(segments),
        predictors=torch.tensor(flat, dtype=torch.long, device=input_ids.device),
        labels=labels[:, 1:][scored],
        scored=scored,
    )


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segment: Segment, scaling: float, dropout: float
) -> torch.Tensor:
    """Attention within one pair, (1, heads, tokens, head size): the first branch causal, the second blind to the first."""
    shared, end = segment.prompt, segment.prompt + segment.chosen
    options: dict[str, Any] = {"scale": scaling, "dropout_p": dropout, "enable_gqa": query.size(1) != key.size(1)}
    first, second = query[:, :, :end], query[:, :, end:]
    outputs = [scaled_dot_product_attention(first, key[:, :, :end], value[:, :, :end], is_causal=True, **options)]
    if segment.rejected:
        seen_key, seen_value = (torch.cat([x[:, :, :shared], x[:, :, end:]], dim=2) for x in (key, value))
        mask = torch.cat([segment.mask[end:, :shared], segment.mask[end:, end:]], dim=1)
        outputs.append(scaled_dot_product_attention(second, seen_key, seen_value, attn_mask=mask, **options))
    return torch.cat(outputs, dim=2)


class PairAttention(torch.autograd.Function):
    """`attend` without dropout, with a backward of plain matrix products for the CPU; nothing of size tokens^2 is kept for it."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segment: Segment, scaling: float
    ) -> torch.Tensor:
        """See `attend`."""
        output = attend(query, key, value, segment, scaling, dropout=0.0)
        ctx.save_for_backward(query, key, value, output)
        ctx.segment, ctx.scaling = segment, scaling
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        """The gradient by query, key and value; the weights are computed again, `QUERIES` rows at a time (Dao 2022, B.2)."""
        query, key, value, output = ctx.saved_tensors
        kv_heads, tokens, size = key.shape[1:]
        groups = query.size(1) // kv_heads
        key, value = key[0], value[0]
        by_query = torch.empty_like(query)
        by_key, by_value = (x.new_zeros(x.shape, dtype=torch.float32) for x in (key, value))
        for first in range(0, tokens, QUERIES):
            last = min(first + QUERIES, tokens)  # causal: no later key is attended to
            rows = (kv_heads, groups * (last - first), size)  # the heads that share a key head, one over another
            q, wanted, reached = (x[0, :, first:last].reshape(rows) for x in (query, gradients[0], output))
            scores = torch.bmm(q * ctx.scaling, key[:, :last].transpose(1, 2)).float()
            hidden = ~ctx.segment.mask[first:last, :last]
            scores.view(kv_heads, groups, last - first, last).masked_fill_(hidden, -torch.inf)
            weights = scores.softmax(dim=-1)
            by_value[:, :last] += torch.bmm(weights.to(q.dtype).transpose(1, 2), wanted)
            by_weight = torch.bmm(wanted, value[:, :last].transpose(1, 2)).float()
            mean = torch.linalg.vecdot(wanted.float(), reached.float()).unsqueeze(-1)
            by_score = by_weight.sub_(mean).mul_(weights).mul_(ctx.scaling).to(q.dtype)
            by_query[0, :, first:last] = torch.bmm(by_score, key[:, :last]).view(-1, last - first, size)
            by_key[:, :last] += torch.bmm(by_score.transpose(1, 2), q)
        return by_query, by_key.to(key.dtype).unsqueeze(0), by_value.to(value.dtype).unsqueeze(0), None, None


def shared_prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    segments: tuple[Segment, ...],
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each pair, its rejected answer blind to its chosen one; Transformers' attention interface.

    Args:
        module: the attention layer (unused; part of the interface).
        query: (1, heads, tokens, head size).
        key: (1, key-value heads, tokens, head size).
        value: like `key`.
        attention_mask: unused; the segments say who sees whom.
        segments: the pairs of the row.
        scaling: factor of the scores; 1 / sqrt(head size) by default.
        dropout: of the attention weights.
        kwargs: other arguments of the interface.

    Returns:
        (1, tokens, heads, head size) and no weights.
    """
    scaling = query.size(-1) ** -0.5 if scaling is None else scaling
    outputs = []
    for s in segments:
        q, k, v = (x[:, :, s.start : s.start + s.tokens] for x in (query, key, value))
        if query.is_cuda or dropout:
            outputs.append(attend(q, k, v, s, scaling, dropout))
        else:
            outputs.append(PairAttention.apply(q, k, v, s, scaling))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(ATTENTION, shared_prefix_attention)


class AnswerLogProbs(torch.autograd.Function):
    """Log-probabilities of labels from hidden states and a frozen output matrix, chunk by chunk.

    The gradient of `log p(label)` by the hidden state, `W[label] - sum_v p_v W_v`, is taken while a chunk's logits exist, so
    that none of them outlives its chunk and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Scores `labels` (answers,) given `hidden` (answers, size) and `weight` (vocabulary, size).

        Returns:
            log_probs, entropy, mean_logits (answers,) float32 and is_top1 (answers,) bool; only log_probs has a gradient.
        """
        needs_gradient = ctx.needs_input_grad[0]
        directions, results = [], []
        for rows, wanted in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
            logits = (rows @ weight.T).float()
            normalizer = logits.logsumexp(dim=-1, keepdim=True)
            label_logits = logits.gather(1, wanted.unsqueeze(1))
            top1 = logits.argmax(dim=-1) == wanted
            mean = logits.mean(dim=-1)
            probabilities = (logits - normalizer).exp_()
            entropy = normalizer.squeeze(1) - torch.linalg.vecdot(probabilities, logits)
            results.append(((label_logits - normalizer).squeeze(1), entropy, mean, top1))
            if needs_gradient:
                directions.append(weight[wanted] - probabilities.to(weight.dtype) @ weight)
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


def share_prefix(model: PreTrainedModel) -> None:
    """Gives a causal language model the shared-prefix forward for `model(..., fused_lm_head=True)`.

    The call takes TRL's padded batch (`input_ids`, `attention_mask`, `labels`) and returns a `FusedCausalLMOutput` whose per-token
    fields have the shape (2 * pairs, length - 1), zero where nothing is scored. Without the flag the forward is the original.
    Call it before wrapping the model with PEFT, or on the model inside.

    Raises:
        ValueError: the output matrix has a bias or is trained, which the fused gradient does not cover.
    """
    head = model.get_output_embeddings()
    if head.bias is not None or head.weight.requires_grad:
        raise ValueError("the shared-prefix forward needs a frozen output matrix without bias")
    original = model.forward

    def forward(
        self: PreTrainedModel,
        *args: Any,
        fused_lm_head: bool = False,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if fused_lm_head and labels is not None:
            return score_pairs(self, kwargs["input_ids"], kwargs["attention_mask"], labels)
        return original(*args, labels=labels, **kwargs) if labels is not None else original(*args, **kwargs)

    model.forward = types.MethodType(forward, model)
    model.set_attn_implementation(ATTENTION)


def score_pairs(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> FusedCausalLMOutput:
    """Log-probabilities (and TRL's metrics) of a padded preference batch by one pass over the packed row."""
    packed = pack_pairs(input_ids, attention_mask, labels)
    hidden = predicting_states(model, packed)
    fields = AnswerLogProbs.apply(hidden, model.get_output_embeddings().weight, packed.labels)
    spread = [field.new_zeros(packed.scored.shape).masked_scatter(packed.scored, field) for field in fields]
    log_probs, entropy, mean_logits, is_top1 = spread
    return FusedCausalLMOutput(
        log_probs=log_probs, entropy=entropy, mean_logits=mean_logits, is_top1=is_top1, label_mask=packed.scored
    )


def predicting_states(model: PreTrainedModel, packed: PackedPairs) -> torch.Tensor:
    """The last hidden states that predict the answers' tokens, (answers, size); the model's attention must be `ATTENTION`."""
    states = model.base_model(
        input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, segments=packed.segments
    ).last_hidden_state
    return states[0, packed.predictors]


def pair_logits(model: PreTrainedModel, chosen: Sequences, rejected: Sequences) -> list[torch.Tensor]:
    """The whole logits of pairs' answers, for a model as it was loaded: all chosen, then all rejected, (answer tokens, vocabulary) each.

    Args:
        model: any causal language model; its attention is switched for this call alone.
        chosen: prompt and answer ids of each pair's first answer.
        rejected: the same of the second; the prompts are the same, and an answer may be empty.
    """
    rows = [[*prompt, *answer] for prompt, answer in (*chosen, *rejected)]
    labels = [[IGNORED] * len(prompt) + answer for prompt, answer in (*chosen, *rejected)]
    length = max(map(len, rows))
    padded, mask, wanted = (
        torch.tensor([row + [fill] * (length - len(row)) for row in values], device=model.device)
        for values, fill in ((rows, 0), ([[1] * len(row) for row in rows], 0), (labels, IGNORED))
    )
    attention = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        hidden = predicting_states(model, pack_pairs(padded, mask, wanted))
    finally:
        model.set_attn_implementation(attention)
    logits = model.get_output_embeddings()(hidden)
    return list(logits.split([len(answer) for _, answer in (*chosen, *rejected)]))
