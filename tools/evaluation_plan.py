"""How long evaluation takes: what is asked of each model, in tokens, from the profile and from what tools/plan.yaml takes suites to be."""

import math
from pathlib import Path
from typing import NamedTuple

from hermes.model.llama3 import Shape
from hermes.params import read_yaml
from hermes.settings.experiment import Profile
from tools.quantization_plan import BITS, evaluated, weights_of


class Mix(NamedTuple):
    """A kind of data before it is here: how much is held out, and (mean, deviation of the logarithm) of tokens."""

    pairs: int
    kinds: int  # of instruction
    questions: int  # of a kind
    plain: int
    lengths: list[tuple[float, float]]  # of prompts, chosen and rejected answers


class Work(NamedTuple):
    """A part of an evaluation: questions, the choices of each (0 where the answer is written), tokens of a prompt and of an answer."""

    questions: int
    choices: int
    prompt: int
    answer: int


ASSUMED = read_yaml(Path(__file__).with_name("plan.yaml"))
MIXES = {name: Mix(**mix) for name, mix in ASSUMED["mixes"].items()}
SUITES = {name: [Work(**part) for part in parts] for name, parts in ASSUMED["suites"].items()}


def kind(loaded: Profile) -> str:
    """The kind of the profile's data, one of `MIXES`."""
    return "embedded" if loaded.data.source == "embedded" else "Hermes"


def held_out(loaded: Profile) -> int:
    """How many pairs validation and test each have."""
    pairs = MIXES[kind(loaded)].pairs
    return min(loaded.subset.held_out_k or pairs, pairs)


def evaluation_seconds(
    loaded: Profile, shape: Shape, prompt: int, answer: int, flops: float, bandwidth: float
) -> dict[str, float]:
    """Time of every task and suite on base, merged and each of `evaluate.types`, by model.

    The pairs' prompts and answers have so many tokens in the mean. Tokens cost FLOPs, and those that are written a pass over the weights a
    batch too. Transformers reads a prompt once for two choices, or for all of one token, llama.cpp once for all. Transformers unpacks 4-bit
    weights, so GPTQ and AWQ take as long as the merged model.
    """
    e, mix = loaded.evaluate, MIXES[kind(loaded)]
    questions = mix.kinds * min(e.questions_per_kind or mix.questions, mix.questions)
    tasks = {
        "preference": Work(held_out(loaded) + e.divergence_pairs, 2, prompt, answer),
        "instructions": Work(questions, 0, prompt, e.max_new_tokens // 2),
        "plain": Work(mix.plain, 1, prompt, answer),
    }

    def seconds(part: Work, model: str) -> float:
        batch, together = (e.slots, e.slots) if model in BITS else (e.batch_size, 2)
        prompts = max(1, math.ceil(part.choices / together)) if part.answer > 1 else 1
        answers = part.questions * max(1, part.choices) * part.answer
        read = part.questions * prompts * part.prompt + answers
        passes = answers / batch * weights_of(shape) * BITS.get(model, 16.0) / 8 if part.choices == 0 else 0
        return (
            2 * (shape.linear_weights * read + shape.vocabulary * shape.hidden * answers) / flops + passes / bandwidth
        )

    parts = [*(tasks[name] for name in e.tasks), *(part for name in e.suites for part in SUITES[name])]
    models = ("base", "merged", *evaluated(loaded, shape))
    return {model: sum(seconds(part, model) for part in parts) for model in models}
