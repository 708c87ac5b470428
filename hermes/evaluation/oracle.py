"""Whether a fast way gives what a model's own forward gives: tried on its first layers, before the way is used.

Nothing is trusted by a model's name. The copy is in float32 and has as many layers as hold each kind of layer once, two at least.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hermes.console import warn
from hermes.model.base import load, load_config, release
from hermes.training.exactness import TOLERANCE, quietly, shallow_config


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
        difference: of two ways, in nats a token; what it raises counts as a difference.
        otherwise: what is done if they differ, for the line.
    """
    with quietly():
        model = load(folder, torch.float32, config=first_layers(folder)).eval()
    try:
        far = difference(model)
        why = "" if far <= TOLERANCE else f"log-probabilities would be up to {far:.1g} nats a token off"
    except Exception as error:  # whatever a model does not take
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    finally:
        del model
        release()
    if why:
        warn(f"{folder}: {otherwise} ({why}), which is slower")
    return not why
