"""Whether a fast way gives what a model's own forward gives: tried on its first layers, before the way is used.

Nothing is trusted by a model's name. The copy is in float32 and has as many layers as hold each kind of layer once, two at least.
A model whose text part is nested in it is copied whole.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hermes.console import warn
from hermes.model.base import load, load_config, release
from hermes.shortage import lack
from hermes.training.exactness import TOLERANCE, quietly, shallow_config

Way = TypeVar("Way")


class Verdicts(Generic[Way]):
    """Which way a model takes at which size, as a window's width decides it. So a verdict does not depend on what was asked before.

    Assumed is that a fast way which is exact at a size is so at smaller ones, and one that is not, at no larger one. All others are tried.
    """

    def __init__(self, slow: Way) -> None:
        self.slow = slow
        self.tried: dict[tuple[int, ...], Way] = {}

    def at(self, size: tuple[int, ...], find: Callable[[], Way]) -> Way:
        """The way at a size, for example in tokens; `find` tries it."""
        for known, way in self.tried.items():
            smaller, larger = (known, size) if way == self.slow else (size, known)
            if all(one <= other for one, other in zip(smaller, larger, strict=True)):
                return way
        return self.tried.setdefault(size, find())


def first_layers(folder: Path) -> PreTrainedConfig:
    """The configuration of a model with its first layers. Within one alone, what the other tokens of a prompt see has no influence."""
    config, whole = shallow_config(folder), load_config(folder)
    count = getattr(whole, "num_hidden_layers", 0)
    if count < 2 or config.num_hidden_layers != 1:
        return config
    for key, value in vars(whole).items():
        if isinstance(value, list) and len(value) == count:
            setattr(whole, key, value[:2])
    whole.num_hidden_layers = 2
    return whole


@torch.inference_mode()
def agrees(folder: Path, difference: Callable[[PreTrainedModel], float], otherwise: str) -> bool:
    """Whether the difference that is measured on a model of this folder is rounding; a line on stderr where it is not.

    Args:
        folder: the model, for Transformers.
        difference: of two ways, in nats a token; what it raises counts as a difference, unless the machine lacks something.
        otherwise: what is done if they differ, for the line.
    """
    with quietly():
        model = load(folder, torch.float32, config=first_layers(folder)).eval()
    try:
        far = difference(model)
        why = "" if far <= TOLERANCE else f"log-probabilities would be up to {far:.1g} nats a token off"
    except Exception as error:  # whatever a model does not take
        if lack(error):
            raise
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    finally:
        del model
        release()
    if why:
        warn(f"{folder}: {otherwise} ({why}), which is slower")
    return not why
