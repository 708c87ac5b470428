"""The log-probabilities of answers, from the last hidden states and a frozen output matrix, without all logits at once."""

from dataclasses import dataclass
from typing import Any

import torch

CHUNK = 128
CACHED = 8  # rows of logits that stay in a CPU's cache from one operation to the next


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
