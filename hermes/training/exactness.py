"""Which forward scores the preference pairs of a base: found by trying, before it is used.

The shared row (hermes/training/shared_prefix.py) is several times faster than the model's own forward, and is exact for most models. Some
have a state that runs from token to token, or make their attention masks by themselves. Nothing is trusted by name. A few pairs of the data
are scored in both ways in float32, by a copy of the base with its first layers only: as many as it takes to have each kind of layer once.
Where the ways differ, every answer is computed alone, by the model's own forward: slower, and right.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from hermes.console import UserError, warn
from hermes.model.base import load, load_config, release
from hermes.training.packing import padded_batch
from hermes.training.shared_prefix import Forward, body, logits_alone, share_prefix

Ids = list[int]
Pair = tuple[Ids, Ids, Ids]  # prompt, chosen, rejected
TOLERANCE = 1e-4  # nats a token; rounding of float32 is some 1e-6 in a tiny model and 2e-5 in a real one
SEEN = 64  # tokens whose logits are looked at, so that a long pair's need no memory
# What configurations call the factor of the logits, or what they are divided by, and their soft cap.
SCALES, SOFTCAP = ("logit_scale", "logits_scaling", "lm_head_multiplier"), "final_logit_softcapping"


def few(pairs: Sequence[Pair]) -> list[Pair]:
    """The longest pair, which reaches across a window if any does, the shortest and the first."""
    by_length = sorted(range(len(pairs)), key=lambda i: (sum(map(len, pairs[i])), i))
    return [pairs[i] for i in dict.fromkeys([by_length[-1], by_length[0], 0])]


def kinds_of_layers(model: PreTrainedModel, count: int) -> int:
    """How many of the first layers hold every kind of layer once; all `count` where the layers are not found."""
    layers = next(
        (part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == count), None
    )
    if layers is None:
        return count

    def kind(layer: torch.nn.Module) -> tuple[object, ...]:
        settings = (
            (name, key, value)
            for name, part in layer.named_modules()
            for key, value in sorted(vars(part).items())
            if isinstance(value, bool | int | float | str) and not key.startswith("layer_i")
        )
        return (repr(layer), *settings)

    kinds = [kind(layer) for layer in layers]
    return 1 + max(kinds.index(one) for one in set(kinds))


@contextmanager
def quietly() -> Iterator[None]:
    """Transformers would name every weight of the layers that are left out."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def shallow_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a model with as many of its layers as have every kind once."""
    config = load_config(folder)
    count = getattr(config, "num_hidden_layers", 0)
    if not count or config.get_text_config() is not config:
        return config
    with torch.device("meta"):
        kept = kinds_of_layers(AutoModelForCausalLM.from_config(config, trust_remote_code=False), count)
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == count:
            setattr(config, key, value[:kept])
    config.num_hidden_layers = kept
    return config


def head_of(model: PreTrainedModel, ids: torch.Tensor) -> Forward:
    """How this model makes logits, of what its configuration names: the one that comes nearest to its own logits of some ids (tokens,)."""
    config = model.config.get_text_config()
    count = min(SEEN, len(ids) - 1)
    hidden = body(model)(input_ids=ids.unsqueeze(0), use_cache=False).last_hidden_state[0, -count - 1 : -1]
    own = logits_alone(model.forward, ids, count)
    named = [getattr(config, name, None) for name in SCALES]
    numbers = [float(value) for value in named if isinstance(value, int | float) and value]
    scales = [1.0, *numbers, *(1 / number for number in numbers)]
    cap = getattr(config, SOFTCAP, None)
    tried = [
        Forward(True, scale, softcap) for scale, softcap in product(scales, dict.fromkeys([None, cap and float(cap)]))
    ]
    return min(tried, key=lambda how: float((how.head(model).logits(hidden) - own).abs().max()))


def is_causal(model: PreTrainedModel, ids: torch.Tensor) -> bool:
    """Whether the last of some ids (tokens,) has no influence on the logits before it."""
    other = torch.cat([ids[:-1], ids[:1]])
    logits, changed = (logits_alone(model.forward, row, min(SEEN, len(ids) - 1)) for row in (ids, other))
    return float((logits - changed).abs().max()) <= TOLERANCE


def own_scores(model: PreTrainedModel, pairs: Sequence[Pair]) -> torch.Tensor:
    """The log-probability of every token of every answer, all chosen first, (tokens,), each sequence alone."""
    found = []
    for prompt, answer in [*((p, c) for p, c, _ in pairs), *((p, r) for p, _, r in pairs)]:
        ids = torch.tensor([*prompt, *answer], device=model.device)
        log_probs = logits_alone(model.forward, ids, len(answer)).float().log_softmax(dim=-1)
        found.append(log_probs.gather(1, ids[len(prompt) :].unsqueeze(1)).squeeze(1))
    return torch.cat(found)


def pair_scores(model: PreTrainedModel, pairs: Sequence[Pair], how: Forward) -> torch.Tensor:
    """The same by the forward of training; the model keeps that forward."""
    sequences = [*((p, c) for p, c, _ in pairs), *((p, r) for p, _, r in pairs)]
    ids, mask, labels = padded_batch(sequences, model.device)
    share_prefix(model, how)
    output = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    return output.log_probs[output.label_mask]


@torch.no_grad()
def find_forward(model: PreTrainedModel, pairs: Sequence[Pair]) -> tuple[Forward, str]:
    """The fastest forward that is exact for a float32 model on these pairs, and why it is not the shared one; empty where it is.

    Raises:
        ValueError: none is; says how far apart.
    """
    model.eval().requires_grad_(False)
    expected, own, attention = own_scores(model, pairs), model.forward, model.config._attn_implementation
    longest = torch.tensor(max((prompt + chosen for prompt, chosen, _ in pairs), key=len), device=model.device)
    if not expected.isfinite().all():
        raise ValueError("it gives no finite log-probability; its weights are damaged")
    if not is_causal(model, longest):
        raise ValueError("it looks at the tokens that it is to predict")
    try:
        how = head_of(model, longest)
        difference = float((pair_scores(model, pairs, how) - expected).abs().max())
        if difference <= TOLERANCE:
            return how, ""
        why = f"in a shared row its log-probabilities are up to {difference:.1g} nats a token off"
    except Exception as error:  # whatever a model does not take
        why = f"a shared row does not suit it ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    model.forward, how = own, Forward(shared=False)
    if model.config._attn_implementation != attention:
        model.set_attn_implementation(attention)
    difference = float((pair_scores(model, pairs, how) - expected).abs().max())
    if not difference <= TOLERANCE:
        raise ValueError(f"its log-probabilities are up to {difference:.1g} nats a token off, even an answer at a time")
    return how, why


def choose_forward(folder: Path, pairs: Sequence[Pair]) -> Forward:
    """The forward for the pairs of a model folder; says so on stderr where it is the slow one.

    Raises:
        UserError: no forward here is exact for this model, or the folder holds no readable one.
    """
    if not pairs:
        return Forward()
    with quietly():
        model = load(folder, torch.float32, config=shallow_config(folder))
    try:
        how, why = find_forward(model, few(pairs))
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder}: this model cannot be trained here; {error}") from None
    finally:
        del model
        release()
    if why:
        warn(f"{folder}: {why}; every answer is computed alone, which is slower")
    return how
