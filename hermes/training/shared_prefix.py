"""The forward of a preference batch with every prompt computed once, no padding, and logits only where an answer is predicted.

TRL hands the model a padded batch, chosen rows over rejected rows, and wants per-token log-probabilities of the same shape. Here the pairs
are one row (packing.py), under an attention of their own (row_attention.py), and only what predicts an answer reaches the output matrix
(answer_scores.py). What a model does to its logits is found by trying; exactness.py compares all of it with the model's own forward before
it is used.

`share_prefix(model)` puts this behind the seam that TRL's `add_fused_lm_head` patches in (`model(..., fused_lm_head=True)`), so that
all losses, metrics and the trainer stay TRL's. The idea is that of prefix sharing for DPO (arXiv 2410.20305).
"""

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from hermes.training.answer_scores import AnswerLogProbs, Head
from hermes.training.packing import IGNORED, PackedPairs, Sequences, pack_pairs, padded_batch
from hermes.training.row_attention import ATTENTION, ROW


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
