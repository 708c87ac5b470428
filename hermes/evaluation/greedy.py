"""The likeliest answers of a Transformers model to many prompts at once.

Not every model takes padding, or a cache. `is_exact` compares a batch with reading all anew before batches are used, on a copy of the
model's first layers in float32. A model that differs answers one prompt at a time.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hermes.console import warn
from hermes.evaluation.oracle import agrees
from hermes.model.gguf import common_beginning
from hermes.training.shared_prefix import logits_alone

Ids = list[int]
Stopped = Callable[[Ids], bool]
Heard = Callable[[list[int], torch.Tensor], None]
ROOM = 64  # tokens
ONE_AT_A_TIME = "prompts are answered one at a time and not in batches"


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
    model: PreTrainedModel,
    prompts: list[Ids],
    ends: set[int],
    limit: int,
    stopped: Stopped | None = None,
    heard: Heard | None = None,
) -> list[Ids]:
    """The likeliest tokens after each prompt, in one batch; answers that have ended leave it, a tenth at a time.

    The rest of each prompt is padded on the left. What all begin with is computed once, if every layer sees all tokens.

    Args:
        model: a causal language model for which this is exact (`is_exact`).
        prompts: ids, none empty.
        ends: the tokens that end an answer, which keeps the one that it ends with.
        limit: longest answer.
        stopped: says of an answer so far whether it has ended, without one of them.
        heard: gets the numbers of the prompts in the batch and the logits (prompts, vocabulary) of each step.
    """
    cache = roomy_cache(model)
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
        logits = output.logits[:, -1]
        if heard is not None:
            heard(rows, logits)
        ids = logits.argmax(dim=-1, keepdim=True)
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


def few(prompts: Sequence[Ids]) -> list[Ids]:
    """The longest prompt, the shortest and the middle one."""
    by_length = sorted(prompts, key=lambda prompt: (len(prompt), prompt))
    return [by_length[-1], by_length[0], by_length[len(by_length) // 2]]


@torch.inference_mode()
def difference(model: PreTrainedModel, prompts: list[Ids], ends: set[int], limit: int) -> float:
    """How far the log-probabilities of a batch's tokens are from those of reading all anew, in nats a token at most.

    An answer leaves the batch at every third of the limit, whatever it is.
    """
    tokens, every = itertools.count(1), max(1, len(prompts) * limit // 3)
    found: list[list[torch.Tensor]] = [[] for _ in prompts]

    def heard(rows: list[int], logits: torch.Tensor) -> None:
        for row, own in zip(rows, logits.float().log_softmax(dim=-1), strict=True):
            found[row].append(own)

    answers = greedy_answers(model, prompts, ends, limit, lambda _: next(tokens) % every == 0, heard)
    far = 0.0
    for prompt, answer, steps in zip(prompts, answers, found, strict=True):
        ids = torch.tensor([*prompt, *answer], device=model.device)
        theirs = logits_alone(model.forward, ids, len(answer)).float().log_softmax(dim=-1)
        chosen = ids[len(prompt) :].unsqueeze(1)
        apart = float((torch.stack(steps[: len(answer)]) - theirs).gather(1, chosen).abs().max())
        far = max(far, apart if math.isfinite(apart) else math.inf)
    return far


def is_exact(folder: Path, model: PreTrainedModel, prompts: Sequence[Ids], ends: set[int], limit: int) -> bool:
    """Whether a batch of a few prompts gets the answers that each gets alone; says so on stderr where not.

    A first batch may keep a beginning; a second one cannot, as one of its prompts lacks it.
    """
    if not takes_rows(model, roomy_cache(model)):
        warn(f"{folder}: {ONE_AT_A_TIME} (it keeps more than keys and values, or takes no positions), which is slower")
        return False
    tried, steps = few(prompts), min(limit, ROOM + 2)
    without = [*tried[:2], tried[0][1:] or tried[0]]
    return agrees(
        folder,
        lambda shallow: max(difference(shallow, batch, ends, steps) for batch in (tried, without)),
        ONE_AT_A_TIME,
    )
