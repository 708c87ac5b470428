"""The likeliest answers of a Transformers model to many prompts at once.

Not every model takes padding, or a cache. `is_exact` compares a batch with reading all anew before batches are used, on a copy of the
model's first layers in float32. A model that differs answers one prompt at a time.
"""

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hermes.console import warn
from hermes.evaluation.choices import room
from hermes.evaluation.oracle import agrees
from hermes.model.gguf import common_beginning
from hermes.training.shared_prefix import logits_alone

Ids = list[int]
Stopped = Callable[[Ids], bool]
Heard = Callable[[list[int], torch.Tensor], None]
ROOM = 64  # tokens
STEPS = ROOM + 6  # that a batch is tried for
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
    kept = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    while True:
        ids = torch.tensor([prompt + answer], device=model.device)
        answer.append(int(model(input_ids=ids, use_cache=False, **kept).logits[0, -1].argmax()))
        if answer[-1] in ends or len(answer) >= limit or (stopped is not None and stopped(answer)):
            return answer


def widened(states: torch.Tensor, width: int) -> torch.Tensor:
    """Keys or values (..., tokens, size) with zeros in front of them, so that they are of so many tokens."""
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[-2], 0))


def joined(caches: list[DynamicCache]) -> DynamicCache:
    """The rows of all in the first, with zeros in front of those that hold fewer tokens; the others are empty afterwards."""
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        width = max(layer.keys.shape[-2] for layer in layers)
        keys = torch.cat([widened(layer.keys, width) for layer in layers])
        values = torch.cat([widened(layer.values, width) for layer in layers])
        for layer in layers:
            layer.keys = layer.values = None
        layers[0].keys, layers[0].values = keys, values
    return caches[0]


class Read(NamedTuple):
    """A batch of prompts that have been read.

    Attributes:
        cache: their keys and values.
        mask: which tokens of the cache are none of the padding, (prompts, tokens).
        logits: after each prompt, (prompts, vocabulary).
    """

    cache: DynamicCache
    mask: torch.Tensor
    logits: torch.Tensor


def read(model: PreTrainedModel, prompts: list[Ids], together: int | None) -> Read:
    """Reads so many prompts in one forward, what all begin with before, and once, if every layer sees all tokens.

    Shorter prompts are padded on the left, behind such a beginning. A forward is as wide as its own longest prompt. A window would count
    padding: where a layer has one, no beginning is kept, and all forwards are equally wide.
    """
    kept = roomy_cache(model)
    sees_all = all(type(layer) is RoomyLayer for layer in kept.layers)
    common = common_beginning(prompts) if sees_all else 0
    width = max(map(len, prompts))
    together = together or max(1, room(model).read // (width - common))
    if common:
        beginning = torch.tensor([prompts[0][:common]], device=model.device)
        model(input_ids=beginning, past_key_values=kept, use_cache=True, logits_to_keep=1)
    caches, masks, logits = [], [], []
    for start in range(0, len(prompts), together):
        some = prompts[start : start + together]
        wide = max(map(len, some)) if sees_all else width
        lacking = [wide - len(prompt) for prompt in some]
        padded = [prompt[:1] * n + prompt[common:] for n, prompt in zip(lacking, some, strict=True)]
        mask = torch.tensor([[1] * common + [0] * n + [1] * (wide - common - n) for n in lacking], device=model.device)
        positions = (mask.cumsum(dim=1) - 1)[:, common:].clamp(min=0)
        cache = copy.deepcopy(kept)
        if common:
            cache.batch_repeat_interleave(len(some))
        logits.append(step(model, cache, torch.tensor(padded, device=model.device), mask, positions))
        caches.append(cache)
        masks.append(torch.nn.functional.pad(mask, (width - wide, 0)))
    return Read(joined(caches), torch.cat(masks), torch.cat(logits))


def step(
    model: PreTrainedModel, cache: DynamicCache, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """The logits after the last of some ids (rows, tokens), (rows, vocabulary); the cache holds these, too, then."""
    settings = {"use_cache": True, "logits_to_keep": 1}
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, **settings)
    return output.logits[:, -1]


def greedy_answers(
    model: PreTrainedModel,
    prompts: list[Ids],
    ends: set[int],
    limit: int,
    stopped: Stopped | None = None,
    heard: Heard | None = None,
    together: int | None = None,
) -> list[Ids]:
    """The likeliest tokens after each prompt, in one batch; answers that have ended leave it, a tenth at a time.

    Args:
        model: a causal language model for which this is exact (`is_exact`).
        prompts: ids, none empty.
        ends: the tokens that end an answer, which keeps the one that it ends with.
        limit: longest answer.
        stopped: says of an answer so far whether it has ended, without one of them.
        heard: gets the numbers of the prompts in the batch and the logits (prompts, vocabulary) of each step.
        together: prompts that are read in one forward; None is as many as `room` has for, since a CPU is slower with more.
    """
    cache, mask, logits = read(model, prompts, together)
    positions = mask.sum(dim=1, keepdim=True) - 1
    answers: list[Ids] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    rows = list(range(len(prompts)))
    while True:
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
        positions = positions + 1
        logits = step(model, cache, ids, mask, positions)


def tried(prompts: Sequence[Ids], limit: int) -> tuple[list[list[Ids]], int]:
    """Two batches, and the steps after them, that reach as many tokens as these prompts and their answers.

    The prompts are cut from the longest one, repeated. In the first batch they have a beginning in common, in the second none.
    """
    longest = max(prompts, key=len)
    total = len(longest) + limit
    steps = min(STEPS, total // 2)
    prompt = (longest * (1 + total // len(longest)))[: total - steps]
    shorter = [prompt[: max(1, len(prompt) * part // 3)] for part in (2, 1)]
    another = 0 if prompt[0] else 1
    return [[prompt, prompt, *shorter], [[another, *prompt[1:]], prompt, *shorter]], steps


@torch.inference_mode()
def difference(model: PreTrainedModel, prompts: list[Ids], steps: int) -> float:
    """How far the log-probabilities in a batch are from those of reading all anew, in nats a token at most.

    Prompts are read two at a time. The second answer leaves the batch after two tokens. Looked at are the eight likeliest tokens of each
    step.
    """
    tokens = itertools.count(1)
    found: list[list[torch.Tensor]] = [[] for _ in prompts]

    def heard(rows: list[int], logits: torch.Tensor) -> None:
        for row, own in zip(rows, logits.float().log_softmax(dim=-1), strict=True):
            found[row].append(own)

    together = min(2, room(model).read)  # `room` itself may not know a model
    answers = greedy_answers(model, prompts, set(), steps, lambda _: next(tokens) == len(prompts) + 2, heard, together)
    far = 0.0
    for prompt, answer, ours in zip(prompts, answers, found, strict=True):
        ids = torch.tensor([*prompt, *answer], device=model.device)
        theirs = logits_alone(model.forward, ids, len(answer)).float().log_softmax(dim=-1)
        likeliest, places = theirs.topk(min(8, theirs.shape[-1]))
        apart = float((torch.stack(ours[: len(answer)]).gather(1, places) - likeliest).abs().max())
        far = max(far, apart if math.isfinite(apart) else math.inf)
    return far


def is_exact(folder: Path, model: PreTrainedModel, prompts: Sequence[Ids], limit: int) -> bool:
    """Whether batches of prompts like these get the answers of up to so many tokens that each gets alone; says so on stderr where not."""
    if not takes_rows(model, roomy_cache(model)):
        warn(f"{folder}: {ONE_AT_A_TIME} (it takes no positions or no usual cache), which is slower")
        return False
    batches, steps = tried(prompts, limit)
    return agrees(folder, lambda shallow: max(difference(shallow, batch, steps) for batch in batches), ONE_AT_A_TIME)
