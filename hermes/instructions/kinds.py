"""Checkable instructions: what each kind asks for, how an answer is graded, and how a failing one is repaired.

Everything here is a pure function of its arguments, so that anyone can recompute a grade from the committed answers. A kind turns a topic
and a random generator into an instruction with parameters. Its verifier returns how far an answer satisfies it, in [0, 1]; 1.0 means
exactly. Its repair edits an answer until it does.

The grade of an answer, whose differences become `delta_score`, is

    0.85 * satisfied + 0.15 * quality

A miss earns at most a fifth of `satisfied`, so that near misses stay clearly below a pass. Quality asks four things: whether the answer
names its topic, has a sensible length, is not repetitive, and ends like a finished text.
The idea of verifiable instructions is that of IFEval (arXiv 2311.07911); the kinds and the code are this project's own.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from hermes.instructions import verifiers
from hermes.instructions.verifiers import Params


@dataclass(frozen=True)
class Kind:
    """One kind of checkable instruction.

    Attributes:
        name: identifier used in data, metrics and reports.
        ask: (random, topic) -> (question, parameters of the verifier).
        satisfied: (answer, parameters) -> share satisfied in [0, 1]; 1.0 only when exactly satisfied.
        repair: (answer, parameters) -> an answer that is satisfied exactly.
        free_text: whether the answer is prose about the topic, so that length, topic and ending can be judged.
        wave: kinds of one wave were sampled together; a new kind opens a new one, so that what was sampled stays as it is.
    """

    name: str
    ask: Callable[[Random, str], tuple[str, Params]]
    satisfied: Callable[[str, Params], float]
    repair: Callable[[str, Params], str]
    free_text: bool = True
    wave: int = 1


def prose(
    name: str,
    satisfied: Callable[[str, Params], float],
    repair: Callable[[str, Params], str],
    *instructions: str,
    wave: int = 1,
    **choices: Any,
) -> Kind:
    """A kind of free text: a plain question, then one of `instructions` filled with one value of each choice."""

    def ask(random: Random, topic: str) -> tuple[str, Params]:
        question = verifiers.question_about(random, topic)
        params = {"topic": topic, **{key: random.choice(values) for key, values in choices.items()}}
        return f"{question} {verifiers.filled(random.choice(instructions), params)}", params

    return Kind(name, ask, satisfied, repair, wave=wave)


def enclosed(name: str, opening: str, closing: str, *instructions: str, wave: int = 1) -> Kind:
    """A kind whose whole answer stands between two marks."""
    return prose(
        name, verifiers.enclosed(opening, closing), verifiers.enclose(opening, closing), *instructions, wave=wave
    )


SEEN_KINDS = (
    prose(
        "lowercase",
        verifiers.lowercase,
        lambda answer, params: answer.lower(),
        "Write your whole answer in lowercase letters.",
        "Use only lowercase letters, no capitals at all.",
    ),
    prose(
        "uppercase",
        verifiers.uppercase,
        lambda answer, params: answer.upper(),
        "Write your whole answer in CAPITAL LETTERS.",
        "Use only capital letters in your answer.",
    ),
    prose(
        "sentence_count",
        verifiers.sentence_count,
        verifiers.repair_sentence_count,
        "Answer in exactly {number} sentence{s}.",
        "Your answer must have exactly {number} sentence{s}.",
        n=(1, 2, 3),
    ),
    prose(
        "max_words",
        verifiers.max_words,
        verifiers.repair_max_words,
        "Use at most {n} words.",
        "Keep your answer to {n} words or fewer.",
        n=(10, 15, 20, 25),
    ),
    Kind("keywords", verifiers.ask_keywords, verifiers.keywords, verifiers.repair_keywords),
    prose(
        "no_commas",
        lambda answer, params: verifiers.without(answer, ","),
        lambda answer, params: answer.replace(",", ""),
        "Do not use any commas.",
        "Write your answer without a single comma.",
    ),
    prose(
        "start_with",
        verifiers.start_with,
        lambda answer, params: f"{params['opening']} {answer}",
        'Begin your answer with "{opening}"',
        'The first words of your answer must be "{opening}"',
        opening=verifiers.OPENINGS,
    ),
    prose(
        "end_with",
        verifiers.end_with,
        lambda answer, params: f"{answer.rstrip()} {params['ending']}",
        'End your answer with "{ending}"',
        'The last words of your answer must be "{ending}"',
        ending=verifiers.ENDINGS,
    ),
    prose(
        "bullets",
        verifiers.listed("- "),
        verifiers.list_with("- "),
        'Answer with exactly {number} bullet points, each on its own line starting with "- ".',
        'Give {number} bullet points and nothing else; start each line with "- ".',
        n=(2, 3, 4),
    ),
    prose(
        "numbered",
        verifiers.listed("{}. "),
        verifiers.list_with("{}. "),
        "Answer with a numbered list of exactly {number} items and nothing else.",
        'Give {number} points as a numbered list ("1. ", "2. ", ...) and nothing else.',
        n=(2, 3, 4),
    ),
    prose(
        "json",
        verifiers.json_object,
        verifiers.repair_json_object,
        'Answer only with a JSON object that has the keys "topic" and "fact", both strings.',
        'Reply with one JSON object, {{"topic": ..., "fact": ...}}, and nothing else.',
    ),
    Kind(
        "fixed_vocabulary",
        verifiers.ask_fixed_vocabulary,
        verifiers.fixed_vocabulary,
        verifiers.repair_fixed_vocabulary,
        free_text=False,
    ),
    Kind("repeat", verifiers.ask_repeat, verifiers.repeat, verifiers.repair_repeat, free_text=False),
    enclosed(
        "quoted",
        '"',
        '"',
        "Put your whole answer in double quotes.",
        "Wrap your entire answer in double quotation marks.",
    ),
    prose(
        "titled",
        verifiers.titled,
        verifiers.repair_titled,
        "Put a title in double angle brackets, such as <<Title>>, on the first line.",
        "Start with a title written like <<Title>> on a line of its own.",
    ),
    prose(
        "exclaim",
        verifiers.exclaim,
        verifiers.repair_exclaim,
        "End every sentence with an exclamation mark.",
        "Finish each sentence with an exclamation mark!",
    ),
    prose(
        "postscript",
        verifiers.postscript,
        verifiers.repair_postscript,
        'Finish with a postscript on its own line that starts with "P.S."',
        'Add a last line that starts with "P.S."',
    ),
    Kind("comma_list", verifiers.ask_comma_list, verifiers.comma_list, verifiers.repair_comma_list, free_text=False),
    enclosed(
        "parentheses", "(", ")", "Put your whole answer in parentheses.", "Wrap your entire answer in ( and ).", wave=2
    ),
    enclosed(
        "asterisks",
        "*",
        "*",
        "Put your whole answer between two asterisks, one at each end.",
        "Begin your answer with an asterisk (*) and end it with one.",
        wave=2,
    ),
    enclosed(
        "tagged",
        "<answer>",
        "</answer>",
        "Put your whole answer between the tags <answer> and </answer>.",
        "Wrap your entire answer in <answer> and </answer>.",
        wave=2,
    ),
    Kind(
        "avoid_letter",
        verifiers.ask_avoid_letter,
        lambda answer, params: verifiers.without(answer.lower(), params["letter"]),
        verifiers.repair_avoid_letter,
        wave=2,
    ),
)

# In the test split alone.
UNSEEN_KINDS = (
    enclosed("brackets", "[", "]", "Put your whole answer in square brackets.", "Wrap your entire answer in [ and ]."),
    prose(
        "avoid_word",
        lambda answer, params: verifiers.avoid(answer, params["word"]),
        lambda answer, params: verifiers.repair_avoid(answer, params["word"]),
        'Do not use the word "{word}".',
        'Answer without using the word "{word}" even once.',
        word=verifiers.AVOIDED,
    ),
)

# In the validation split alone, so that a recipe can be chosen by what it does to kinds without training rows.
VALIDATION_KINDS = (
    enclosed(
        "braces",
        "{",
        "}",
        "Put your whole answer in curly braces.",
        "Wrap your entire answer in {{ and }}.",
        wave=2,
    ),
    Kind(
        "unnamed",
        verifiers.ask_unnamed,
        lambda answer, params: verifiers.avoid(answer, params["name"]),
        lambda answer, params: verifiers.repair_avoid(answer, params["name"]),
        wave=2,
    ),
)

# No instruction, so no form: keeps the forms of the other kinds from spreading to every question. In training only.
PLAIN = Kind(
    "plain",
    lambda random, topic: (verifiers.question_about(random, topic), {"topic": topic}),
    verifiers.plain,
    verifiers.repair_plain,
)

KINDS = {kind.name: kind for kind in (*SEEN_KINDS, *UNSEEN_KINDS, *VALIDATION_KINDS, PLAIN)}


def is_strict(kind: str, answer: str, params: Params) -> bool:
    """Whether an answer follows its instruction exactly; an empty or looping answer never does."""
    answer = answer.strip()
    is_satisfied = bool(answer) and KINDS[kind].satisfied(answer, params) == 1.0
    return is_satisfied and (kind == "repeat" or not verifiers.is_looping(answer))


def quality(kind: str, answer: str, params: Params) -> float:
    """How presentable an answer is, in [0, 1], whatever its instruction; 1.0 for kinds whose answer is not prose."""
    if not KINDS[kind].free_text:
        return 1.0
    found = [word.lower() for word in verifiers.words(answer)]
    topic = [word.lower() for word in verifiers.words(params["topic"])]
    stems = [word[:4] for word in topic if len(word) > 3] or topic[-1:]
    names_topic = any(word.startswith(stem) for stem in stems for word in found)
    bigrams = list(itertools.pairwise(found))
    return (
        0.4 * names_topic
        + 0.2 * (4 <= len(found) <= 60)
        + 0.2 * verifiers.share(len(set(bigrams)), len(bigrams))
        + 0.2 * answer.endswith((".", "!", "?", '"', ")", "]", "}", ">", "*"))
    )


def grade(kind: str, answer: str, params: Params) -> float:
    """The grade of an answer in [0, 1], rounded to 4 digits; 0 for an empty or looping answer (module docstring)."""
    answer = answer.strip()
    if not answer or (verifiers.is_looping(answer) and kind != "repeat"):
        return 0.0
    satisfied = KINDS[kind].satisfied(answer, params)
    satisfied = satisfied if satisfied == 1.0 else 0.2 * satisfied
    return round(0.85 * satisfied + 0.15 * quality(kind, answer, params), 4)


def repair(kind: str, answer: str, params: Params) -> str:
    """The answer edited, deterministically, until it follows its instruction.

    Raises:
        ValueError: the repair of this kind left the answer wrong.
    """
    repaired = KINDS[kind].repair(answer.strip(), params).strip()
    if not is_strict(kind, repaired, params):
        raise ValueError(f"repair of kind {kind!r} does not satisfy {params}: {repaired!r}")
    return repaired
