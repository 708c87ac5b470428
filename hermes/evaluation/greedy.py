"""The likeliest answers of a Transformers model to many prompts at once."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hermes.model.gguf import common_beginning

Ids = list[int]
Stopped = Callable[[Ids], bool]
ROOM = 64  # tokens


class RoomyLayer(DynamicLayer):
    """The keys and values of a layer, with room behind them for the tokens to come.

    Transformers' own layer copies all of them at every token: a sixth of a step of 24 rows of 400 tokens on two cores. This one
    does so once in `ROOM` tokens. Both give attention the same numbers in the same shapes.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.held: list[torch.Tensor] = []  # the keys and the values, (rows, heads, tokens and room, head size)
        self.given: torch.Tensor | None = None  # the keys as attention got them last

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps the keys and values of new tokens, and gives those of all."""
        latent = key_states.shape[-1] != value_states.shape[-1]  # a product with them may need them in one piece
        if self.keys is None or self.values is None or key_states.shape[-2] != 1 or latent:
            self.forget()
            return super().update(key_states, value_states, *args, **kwargs)
        tokens = self.keys.shape[-2]
        if self.keys is not self.given or tokens == self.held[0].shape[-2]:  # other rows, or no room
            self.held = [
                torch.cat([old, old.new_empty(*old.shape[:-2], ROOM, old.shape[-1])], dim=-2)
                for old in (self.keys, self.values)
            ]
        for held, new in zip(self.held, (key_states, value_states), strict=True):
            held[..., tokens : tokens + 1, :] = new
        self.keys, self.values = (held[..., : tokens + 1, :] for held in self.held)
        self.given = self.keys
        return self.keys, self.values

    def forget(self) -> None:
        """Frees the room, where the keys and values are about to be others."""
        self.held, self.given = [], None

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows alone."""
        super().batch_select_indices(indices)
        self.forget()


def roomy_cache(model: PreTrainedModel) -> DynamicCache:
    """The cache that a model would make itself, with room in the layers that see all tokens."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def takes_rows(model: PreTrainedModel, cache: DynamicCache) -> bool:
    """Whether rows may be padded on the left and leave a batch: it takes positions, and its layers are of kinds that were tried."""
    tried = (RoomyLayer, DynamicSlidingWindowLayer)
    taken = inspect.signature(model.forward).parameters.keys()
    return all(type(layer) in tried for layer in cache.layers) and {"past_key_values", "position_ids"} <= taken


def answer_alone(
    model: PreTrainedModel, prompt: Ids, ends: set[int], limit: int, stopped: Stopped | None = None
) -> Ids:
    """The likeliest tokens after a prompt, which is read anew with every token: right for any causal model, and slow."""
    answer: Ids = []
    while True:
        ids = torch.tensor([prompt + answer], device=model.device)
        answer.append(int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax()))
        if answer[-1] in ends or len(answer) >= limit or (stopped is not None and stopped(answer)):
            return answer


def greedy_answers(
    model: PreTrainedModel, prompts: list[Ids], ends: set[int], limit: int, stopped: Stopped | None = None
) -> list[Ids]:
    """The likeliest tokens after each prompt, in one batch; answers that have ended leave it, a tenth at a time.

    The rest of each prompt is padded on the left. What all begin with is computed once, if every layer sees all tokens. A model that keeps
    more than keys and values, or takes no positions, answers one prompt at a time.

    Args:
        model: any causal language model.
        prompts: ids, none empty.
        ends: the tokens that end an answer, which keeps the one that it ends with.
        limit: longest answer.
        stopped: says of an answer so far whether it has ended, without one of them.
    """
    cache = roomy_cache(model)
    if not takes_rows(model, cache):
        return [answer_alone(model, prompt, ends, limit, stopped) for prompt in prompts]
    # Padding would follow the beginning, and a window would count it.
    common = common_beginning(prompts) if all(type(layer) is RoomyLayer for layer in cache.layers) else 0
    width = max(map(len, prompts)) - common
    padding = [common + width - len(prompt) for prompt in prompts]
    ids = torch.tensor(
        [[min(ends)] * n + prompt[common:] for n, prompt in zip(padding, prompts, strict=True)], device=model.device
    )
    mask = torch.tensor([[1] * common + [0] * n + [1] * (width - n) for n in padding], device=model.device)
    positions = (mask.cumsum(dim=1) - 1)[:, common:].clamp(min=0)
    if common:
        beginning = torch.tensor([prompts[0][:common]], device=model.device)
        model(input_ids=beginning, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(prompts))
    answers: list[Ids] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    rows = list(range(len(prompts)))
    while True:
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        ids = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        running = []
        for place, (row, token) in enumerate(zip(rows, ids[:, 0].tolist(), strict=True)):
            answer = answers[row]
            if not ended[row]:
                answer.append(token)
                ended[row] = token in ends or len(answer) >= limit or (stopped is not None and stopped(answer))
                if not ended[row]:
                    running.append(place)
        if not running:
            return answers
        if len(running) <= 0.9 * len(rows):
            kept = torch.tensor(running, device=model.device)
            cache.batch_select_indices(kept)
            ids, mask, positions = ids[kept], mask[kept], positions[kept]
            rows = [rows[place] for place in running]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1
