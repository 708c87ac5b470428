"""How long evaluation takes: what is asked of each model, in tokens, from the profile and from what tools/plan.yaml takes suites to be."""

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
    """A part of an evaluation: questions, the choices of each (0 where the answer is written), tokens of a prompt and of an answer.

    `shared` tokens of a prompt are those of many others, and are read once (hermes/evaluation/choices.py).
    """

    questions: int
    choices: int
    prompt: int
    answer: int
    shared: int = 0


ASSUMED = read_yaml(Path(__file__).with_name("plan.yaml"))
MIXES = {name: Mix(**mix) for name, mix in ASSUMED["mixes"].items()}
GENERAL = (200, 1, 25, 130)  # hermes/evaluation/general.py, which base and merged alone are asked
HELD_OUT = "held-out"  # the stage's own tasks, on held-out rows
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
) -> dict[str, dict[str, float]]:
    """Time of the stage's own tasks, as `held-out`, and of each suite that a model is asked, by model.

    The pairs' prompts and answers have so many tokens in the mean. Tokens cost FLOPs, and those that are written a pass over the weights a
    batch too. A prompt is read once for all its choices. Transformers reads what the prompts of a task begin with once for all of them,
    llama.cpp again with each. Several processes share the suites alike. Transformers unpacks 4-bit weights, so GPTQ and AWQ take as long
    as the merged model.
    """
    e, mix = loaded.evaluate, MIXES[kind(loaded)]
    questions = mix.kinds * min(e.questions_per_kind or mix.questions, mix.questions)
    tasks = {
        "preference": Work(held_out(loaded) + e.divergence_pairs, 2, prompt, answer),
        "instructions": Work(questions, 0, prompt, e.max_new_tokens // 2),
        "plain": Work(mix.plain, 1, prompt, answer),
        "general": Work(*GENERAL),
    }

    def seconds(part: Work, model: str) -> float:
        batch, kept = (e.slots, 0) if model in BITS else (e.batch_size, part.shared)
        answers = part.questions * max(1, part.choices) * part.answer
        read = part.questions * (part.prompt - kept) + answers
        passes = answers / batch * weights_of(shape) * BITS.get(model, 16.0) / 8 if part.choices == 0 else 0
        return (
            2 * (shape.linear_weights * read + shape.vocabulary * shape.hidden * answers) / flops + passes / bandwidth
        )

    files = evaluated(loaded, shape)
    asked = {"base", "merged", *(files if e.suite_types == "all" else e.suite_types)}
    return {
        model: {
            HELD_OUT: sum(seconds(tasks[name], model) for name in e.tasks if name != "general" or model not in files)
        }
        | {
            name: sum(seconds(part, model) for part in SUITES[name]) / e.processes
            for name in e.suites
            if model in asked
        }
        for model in ("base", "merged", *files)
    }
