"""Checkable instructions: what each kind asks for, how an answer is graded, and how a failing one is repaired.

Everything here is a pure function of its arguments, so that a grade can be recomputed from the committed answers by anyone.
A kind turns a topic and a random generator into an instruction with parameters; its verifier returns how far an answer
satisfies it, in [0, 1], where 1.0 means exactly satisfied; its repair edits an answer until it is.

The grade of an answer, whose differences become `delta_score`, is

    0.85 * satisfied + 0.15 * quality

where a miss earns at most a fifth of `satisfied` (so that near misses stay clearly below a pass) and quality asks whether the
answer names its topic, has a sensible length, is not repetitive and ends like a finished text.
The idea of verifiable instructions is that of IFEval (arXiv 2311.07911); the kinds and the code are this project's own.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

Params = dict[str, Any]

NUMBER_WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}
KEYWORDS = (
    "always", "bright", "careful", "common", "early", "family", "friendly", "garden",
    "gentle", "history", "important", "journey", "large", "local", "modern", "morning",
    "music", "natural", "ocean", "patient", "popular", "quiet", "river", "simple",
    "special", "strong", "summer", "useful", "village", "winter", "world", "young",
)  # fmt: skip
OPENINGS = ("Well,", "In short,", "To be honest,", "Good question!", "Let me explain:", "Of course.")
ENDINGS = ("That is all.", "I hope this helps.", "Thank you for asking.", "And that is why.", "Have a nice day.")
AVOIDED = ("the", "and", "of", "is")
LETTERS = "bkvw"
VOCABULARY = ("yes", "no", "maybe")
FILLERS = (
    "There is more to learn about {topic}.",
    "Many people enjoy {topic}.",
    "It is a good subject for a long talk.",
    "Ask a friend what they think about {topic}.",
    "Small details make {topic} interesting.",
)


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


def words(text: str) -> list[str]:
    """The words of a text, without punctuation."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text)


def sentences(text: str) -> list[str]:
    """The sentences of a text, split after `.`, `!` or `?` and at line breaks."""
    parts = re.split(r"(?<=[.!?])[\"')\]]*\s+|\n+", text.strip())
    return [part.strip() for part in parts if words(part)]


def lines(text: str) -> list[str]:
    """The lines of a text that are not blank, stripped."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def share(part: float, whole: float) -> float:
    """`part / whole` limited to [0, 1], and 0 where there is nothing to share."""
    return max(0.0, min(1.0, part / whole)) if whole else 0.0


def closeness(found: int, wanted: int) -> float:
    """1.0 when the count is right, falling to 0 as it is off by the whole wanted amount or more."""
    return max(0.0, 1.0 - abs(found - wanted) / max(wanted, 1))


def is_looping(text: str) -> bool:
    """Whether a text repeats itself: some three words in a row four times over, or hardly any distinct words."""
    tokens = [word.lower() for word in words(text)]
    trigrams = Counter(zip(tokens, tokens[1:], tokens[2:], strict=False))
    few_distinct = len(tokens) >= 16 and len(set(tokens)) < 0.35 * len(tokens)
    return few_distinct or max(trigrams.values(), default=0) >= 4


def question_about(random: Random, topic: str) -> str:
    """A plain question about a topic, the part that carries no instruction."""
    return random.choice(
        (
            f"Tell me about {topic}.",
            f"What is interesting about {topic}?",
            f"Why do people care about {topic}?",
            f"Write a short text about {topic}.",
            f"What should a beginner know about {topic}?",
            f"Describe {topic} to a friend.",
        )
    )


def _prose(*instructions: str, **choices: Any) -> Callable[[Random, str], tuple[str, Params]]:
    """An `ask` for free text: a plain question, then one of `instructions` filled with one value of each choice."""

    def ask(random: Random, topic: str) -> tuple[str, Params]:
        question = question_about(random, topic)
        params: Params = {name: random.choice(values) for name, values in choices.items()}
        shown = params | {"number": NUMBER_WORDS.get(params.get("n", 0), str(params.get("n", "")))}
        shown["s"] = "" if params.get("n") == 1 else "s"
        instruction = random.choice(instructions).format(**shown)
        return f"{question} {instruction}", {"topic": topic, **params}

    return ask


def _fillers(params: Params, count: int) -> list[str]:
    return [filler.format(topic=params["topic"]) for filler in FILLERS[:count]]


def _plain(answer: str, params: Params) -> float:
    marked = re.search(r"[\"<>\[\]{}*#•\n]|P\.S\.|^\W|^\d+\.", answer)
    cased = answer[:1].isupper() and any(word[1:].islower() for word in words(answer)[:2]) and not answer.isupper()
    text = answer.endswith(".") and len(sentences(answer)) >= 2 and len(words(answer)) >= 12
    return float(not marked and cased and text)


def _repair_plain(answer: str, params: Params) -> str:
    text = " ".join(re.sub(r"[\"<>\[\]{}*#•]|P\.S\.|^\s*(?:-|\d+\.)", "", line).strip() for line in lines(answer))
    body = " ".join(part.rstrip("!?;:,. ").lower().capitalize() + "." for part in sentences(re.sub(r"^\W+", "", text)))
    return body if _plain(body, params) == 1.0 else " ".join(_fillers(params, 3))


def _enough_sentences(answer: str, params: Params, count: int) -> list[str]:
    """The first `count` sentences of an answer, stock sentences standing in for missing ones."""
    found = [sentence if sentence[-1] in ".!?" else sentence + "." for sentence in sentences(answer)][:count]
    return found + _fillers(params, count - len(found))


def _plain_items(answer: str, params: Params, count: int) -> list[str]:
    """`count` one-line items from an answer: its list entries or sentences without list marks."""
    unmarked = "\n".join(re.sub(r"^([-*•]|\d+[.)])\s*", "", line) for line in lines(answer))
    return _enough_sentences(unmarked, params, count)


# --- case ---------------------------------------------------------------------------------------------------------------


def _lowercase(answer: str, params: Params) -> float:
    found = sentences(answer)
    return share(sum(sentence == sentence.lower() for sentence in found), len(found))


def _uppercase(answer: str, params: Params) -> float:
    found = words(answer)
    return share(sum(word == word.upper() for word in found), len(found))


# --- length -------------------------------------------------------------------------------------------------------------


def _sentence_count(answer: str, params: Params) -> float:
    return closeness(len(sentences(answer)), params["n"])


def _repair_sentence_count(answer: str, params: Params) -> str:
    return " ".join(_enough_sentences(answer, params, params["n"]))


def _max_words(answer: str, params: Params) -> float:
    found = len(words(answer))
    return float(found > 0) if found <= params["n"] else closeness(found, params["n"])


def _repair_max_words(answer: str, params: Params) -> str:
    limit = params["n"]
    kept = ""
    for sentence in sentences(answer):
        candidate = f"{kept} {sentence}".strip()
        if len(words(candidate)) > limit:
            break
        kept = candidate
    if kept:
        return kept
    cut = " ".join(answer.split())
    while len(words(cut)) > limit:
        cut = cut.rsplit(" ", 1)[0] if " " in cut else words(cut)[0]
    return cut.rstrip(" ,;:-") + ("" if cut.endswith((".", "!", "?")) else ".")


# --- keywords -----------------------------------------------------------------------------------------------------------


def _ask_keywords(random: Random, topic: str) -> tuple[str, Params]:
    first, second = random.sample(KEYWORDS, 2)
    instruction = random.choice(
        (
            f'Include the words "{first}" and "{second}".',
            f'Use both of the words "{first}" and "{second}" in your answer.',
        )
    )
    return f"{question_about(random, topic)} {instruction}", {"topic": topic, "keywords": [first, second]}


def _keywords(answer: str, params: Params) -> float:
    found = {word.lower() for word in words(answer)}
    return share(sum(word in found for word in params["keywords"]), len(params["keywords"]))


def _repair_keywords(answer: str, params: Params) -> str:
    found = {word.lower() for word in words(answer)}
    missing = [word for word in params["keywords"] if word not in found]
    stems = ("People often mention", "Think of", "It also brings to mind", "Some would add")
    stem = stems[len(answer) % len(stems)]
    return f"{answer.rstrip()} {stem} {' and '.join(missing)}."


def _avoid(answer: str, params: Params) -> float:
    found = [word.lower() for word in words(answer)]
    return max(0.0, 1.0 - 0.2 * found.count(params["word"])) * bool(found)


def _repair_avoid(answer: str, params: Params) -> str:
    kept = re.sub(rf"\b{params['word']}\b(?!['’-]\w)[ ]?", "", answer, flags=re.IGNORECASE).strip()
    kept = " ".join(part for part in kept.split(" ") if _avoid(part, params) == 1.0 or not words(part))
    return kept if words(kept) else "Nothing more needs saying."


def _ask_unnamed(random: Random, topic: str) -> tuple[str, Params]:
    instruction = random.choice(("Never call the subject by its name.", "Do so without naming the subject."))
    return f"{question_about(random, topic)} {instruction}", {"topic": topic, "name": words(topic)[-1].lower()}


def _unnamed(answer: str, params: Params) -> float:
    return _avoid(answer, {"word": params["name"]})


def _repair_unnamed(answer: str, params: Params) -> str:
    return _repair_avoid(answer, {"word": params["name"]})


def _ask_avoid_letter(random: Random, topic: str) -> tuple[str, Params]:
    letter = random.choice([letter for letter in LETTERS if letter not in topic])
    instruction = random.choice(
        (f'Do not use the letter "{letter}".', f'Answer with words that do not contain the letter "{letter}".')
    )
    return f"{question_about(random, topic)} {instruction}", {"topic": topic, "letter": letter}


def _avoid_letter(answer: str, params: Params) -> float:
    return _without(answer.lower(), params["letter"])


def _repair_avoid_letter(answer: str, params: Params) -> str:
    clean = [sentence for sentence in sentences(answer) if params["letter"] not in sentence.lower()]
    kept = " ".join(clean or [word for word in answer.split() if params["letter"] not in word.lower()])
    return kept if words(kept) else "Nothing more needs saying."


def _without(answer: str, mark: str) -> float:
    """The share of sentences without a mark, at most 0.9 where it stands anywhere in the answer."""
    found = sentences(answer)
    free = share(sum(mark not in sentence for sentence in found), len(found))
    return free if mark not in answer else min(free, 0.9)


# --- fixed words at the start or the end ----------------------------------------------------------------------------------


def _start_with(answer: str, params: Params) -> float:
    opening = params["opening"]
    if answer.startswith(opening):
        return 1.0 if words(answer[len(opening) :]) else 0.5
    return 0.6 * (answer.lower().startswith(opening.lower().rstrip(",.!:"))) + 0.3 * (opening.lower() in answer.lower())


def _end_with(answer: str, params: Params) -> float:
    ending = params["ending"]
    if answer.endswith(ending):
        return 1.0 if words(answer[: -len(ending)]) else 0.5
    core = ending.lower().rstrip(".")
    return 0.6 * answer.lower().rstrip('."! ').endswith(core) + 0.3 * (core in answer.lower())


def _postscript(answer: str, params: Params) -> float:
    found = lines(answer)
    marked = [i for i, line in enumerate(found) if line.startswith("P.S.")]
    if len(found) >= 2 and marked == [len(found) - 1] and words(found[-1][4:]):
        return 1.0
    return 0.6 if "P.S." in answer else 0.3 if re.search(r"p\.?\s?s\.?\b", answer, re.IGNORECASE) else 0.0


def _repair_postscript(answer: str, params: Params) -> str:
    body = re.sub(r"\n?\s*P\.S\.\s*", " ", answer).strip()
    parts = sentences(body)
    if len(parts) < 2:
        return f"{body}\nP.S. {_fillers(params, 1)[0]}"
    return f"{' '.join(parts[:-1])}\nP.S. {parts[-1]}"


# --- layout -------------------------------------------------------------------------------------------------------------


def _list_grade(answer: str, wanted: int, mark: Callable[[int], str]) -> float:
    found = lines(answer)
    marked = 0
    for line in found:
        marked += line.startswith(mark(marked)) and bool(words(line[len(mark(marked)) :]))
    return closeness(marked, wanted) * share(marked, len(found))


def _bullets(answer: str, params: Params) -> float:
    return _list_grade(answer, params["n"], lambda i: "- ")


def _numbered(answer: str, params: Params) -> float:
    return _list_grade(answer, params["n"], lambda i: f"{i + 1}. ")


def _repair_bullets(answer: str, params: Params) -> str:
    return "\n".join(f"- {item}" for item in _plain_items(answer, params, params["n"]))


def _repair_numbered(answer: str, params: Params) -> str:
    return "\n".join(f"{i + 1}. {item}" for i, item in enumerate(_plain_items(answer, params, params["n"])))


def _titled(answer: str, params: Params) -> float:
    found = lines(answer)
    if len(found) >= 2 and re.fullmatch(r"<<[^<>]+>>", found[0]) and words(found[0]):
        return 1.0
    if re.search(r"<<[^<>]+>>", answer):
        return 0.7
    return 0.3 * (len(found) >= 2 and len(words(found[0])) <= 8)


def _repair_titled(answer: str, params: Params) -> str:
    body = re.sub(r"<<([^<>]*)>>", r"\1", answer).strip()
    return f"<<{params['topic'].title()}>>\n{body}"


def _wrapped(opening: str, closing: str) -> Callable[[str, Params], float]:
    def grade(answer: str, params: Params) -> float:
        inner = answer[len(opening) : -len(closing)]
        starts, ends = answer.startswith(opening), answer.endswith(closing) and len(answer) > 1
        if starts and ends:
            return 1.0 if words(inner) and opening not in inner and closing not in inner else 0.6
        return 0.4 * starts + 0.4 * ends

    return grade


def _wrap(opening: str, closing: str) -> Callable[[str, Params], str]:
    def repair(answer: str, params: Params) -> str:
        return opening + answer.replace(opening, "").replace(closing, "").strip() + closing

    return repair


def _json(answer: str, params: Params) -> float:
    try:
        value = json.loads(answer)
    except ValueError:
        return 0.1 * ("{" in answer) + 0.1 * ('"topic"' in answer) + 0.1 * ('"fact"' in answer)
    if not isinstance(value, dict):
        return 0.3
    texts = sum(isinstance(value.get(key), str) and bool(value[key].strip()) for key in ("topic", "fact"))
    return 1.0 if texts == 2 and set(value) == {"topic", "fact"} else 0.4 + 0.2 * texts


def _repair_json(answer: str, params: Params) -> str:
    fact = re.sub(r"[{}\"\n]+", " ", answer)
    first = re.sub(r"^\s*(topic|fact)\s*:\s*", "", " ".join(fact.split()))
    return json.dumps({"topic": params["topic"], "fact": _enough_sentences(first, params, 1)[0]}, ensure_ascii=False)


def _exclaim(answer: str, params: Params) -> float:
    found = sentences(answer)
    return share(sum(sentence.rstrip("\"')").endswith("!") for sentence in found), len(found))


def _repair_exclaim(answer: str, params: Params) -> str:
    return " ".join(re.sub(r"[.!?,;:\"')]*$", "", sentence) + "!" for sentence in sentences(answer))


# --- counting and fixed vocabulary ----------------------------------------------------------------------------------------


def _ask_comma_list(random: Random, topic: str) -> tuple[str, Params]:
    n = random.choice((3, 4, 5))
    instruction = random.choice(
        (
            f"List exactly {NUMBER_WORDS[n]} words that go with {topic}, separated by commas, on one line.",
            f"Write {NUMBER_WORDS[n]} words about {topic} as one comma-separated line and nothing else.",
        )
    )
    return instruction, {"topic": topic, "n": n}


def _comma_list(answer: str, params: Params) -> float:
    items = [item.strip(" .").lower() for item in answer.split(",")]
    single = {item for item in items if words(item) == [item]}
    one_line = len(lines(answer)) == 1
    return closeness(len(single), params["n"]) * share(len(single), len(items)) * (1.0 if one_line else 0.5)


def _repair_comma_list(answer: str, params: Params) -> str:
    seen = dict.fromkeys(word.lower() for word in words(answer) if len(word) > 3 and word.isalpha())
    items = [*seen, *(word for word in KEYWORDS if word not in seen)]
    return ", ".join(items[: params["n"]])


def _ask_repeat(random: Random, topic: str) -> tuple[str, Params]:
    word, n = words(topic)[-1].lower(), random.choice((2, 3, 4, 5))
    instruction = random.choice(
        (
            f'Write the word "{word}" exactly {NUMBER_WORDS[n]} times, separated by spaces, and nothing else.',
            f'Repeat the word "{word}" {NUMBER_WORDS[n]} times on one line, with spaces between, and write nothing else.',
        )
    )
    return instruction, {"topic": topic, "word": word, "n": n}


def _repeat(answer: str, params: Params) -> float:
    if answer == " ".join([params["word"]] * params["n"]):
        return 1.0
    found = [word.lower() for word in words(answer)]
    return 0.9 * closeness(found.count(params["word"]), params["n"]) * share(found.count(params["word"]), len(found))


def _repair_repeat(answer: str, params: Params) -> str:
    return " ".join([params["word"]] * params["n"])


def _ask_fixed_vocabulary(random: Random, topic: str) -> tuple[str, Params]:
    question = random.choice(
        (
            f"Would a child be interested in {topic}?",
            f"Is it easy to learn about {topic}?",
            f"Can you talk about {topic} at dinner?",
            f"Do most people know something about {topic}?",
        )
    )
    instruction = random.choice(
        (
            "Answer with exactly one of these words and nothing else: yes, no, maybe.",
            "Reply only with yes, no or maybe, in lowercase and without punctuation.",
        )
    )
    return f"{question} {instruction}", {"topic": topic, "vocabulary": list(VOCABULARY)}


def _fixed_vocabulary(answer: str, params: Params) -> float:
    if answer in params["vocabulary"]:
        return 1.0
    found = [word.lower() for word in words(answer)]
    allowed = sum(word in params["vocabulary"] for word in found)
    return 0.8 * share(allowed, len(found)) + 0.1 * (found[:1] != [] and found[0] in params["vocabulary"])


def _repair_fixed_vocabulary(answer: str, params: Params) -> str:
    found = [word.lower() for word in words(answer)]
    named = [word for word in found if word in params["vocabulary"]]
    return named[0] if named else params["vocabulary"][len(answer) % len(params["vocabulary"])]


SEEN_KINDS = (
    Kind(
        "lowercase",
        _prose("Write your whole answer in lowercase letters.", "Use only lowercase letters, no capitals at all."),
        _lowercase,
        lambda answer, params: answer.lower(),
    ),
    Kind(
        "uppercase",
        _prose("Write your whole answer in CAPITAL LETTERS.", "Use only capital letters in your answer."),
        _uppercase,
        lambda answer, params: answer.upper(),
    ),
    Kind(
        "sentence_count",
        _prose(
            "Answer in exactly {number} sentence{s}.",
            "Your answer must have exactly {number} sentence{s}.",
            n=(1, 2, 3),
        ),
        _sentence_count,
        _repair_sentence_count,
    ),
    Kind(
        "max_words",
        _prose("Use at most {n} words.", "Keep your answer to {n} words or fewer.", n=(10, 15, 20, 25)),
        _max_words,
        _repair_max_words,
    ),
    Kind("keywords", _ask_keywords, _keywords, _repair_keywords),
    Kind(
        "no_commas",
        _prose("Do not use any commas.", "Write your answer without a single comma."),
        lambda answer, params: _without(answer, ","),
        lambda answer, params: answer.replace(",", ""),
    ),
    Kind(
        "start_with",
        _prose(
            'Begin your answer with "{opening}"', 'The first words of your answer must be "{opening}"', opening=OPENINGS
        ),
        _start_with,
        lambda answer, params: f"{params['opening']} {answer}",
    ),
    Kind(
        "end_with",
        _prose('End your answer with "{ending}"', 'The last words of your answer must be "{ending}"', ending=ENDINGS),
        _end_with,
        lambda answer, params: f"{answer.rstrip()} {params['ending']}",
    ),
    Kind(
        "bullets",
        _prose(
            'Answer with exactly {number} bullet points, each on its own line starting with "- ".',
            'Give {number} bullet points and nothing else; start each line with "- ".',
            n=(2, 3, 4),
        ),
        _bullets,
        _repair_bullets,
    ),
    Kind(
        "numbered",
        _prose(
            "Answer with a numbered list of exactly {number} items and nothing else.",
            'Give {number} points as a numbered list ("1. ", "2. ", ...) and nothing else.',
            n=(2, 3, 4),
        ),
        _numbered,
        _repair_numbered,
    ),
    Kind(
        "json",
        _prose(
            'Answer only with a JSON object that has the keys "topic" and "fact", both strings.',
            'Reply with one JSON object, {{"topic": ..., "fact": ...}}, and nothing else.',
        ),
        _json,
        _repair_json,
    ),
    Kind("fixed_vocabulary", _ask_fixed_vocabulary, _fixed_vocabulary, _repair_fixed_vocabulary, free_text=False),
    Kind("repeat", _ask_repeat, _repeat, _repair_repeat, free_text=False),
    Kind(
        "quoted",
        _prose("Put your whole answer in double quotes.", "Wrap your entire answer in double quotation marks."),
        _wrapped('"', '"'),
        _wrap('"', '"'),
    ),
    Kind(
        "titled",
        _prose(
            "Put a title in double angle brackets, such as <<Title>>, on the first line.",
            "Start with a title written like <<Title>> on a line of its own.",
        ),
        _titled,
        _repair_titled,
    ),
    Kind(
        "exclaim",
        _prose("End every sentence with an exclamation mark.", "Finish each sentence with an exclamation mark!"),
        _exclaim,
        _repair_exclaim,
    ),
    Kind(
        "postscript",
        _prose(
            'Finish with a postscript on its own line that starts with "P.S."',
            'Add a last line that starts with "P.S."',
        ),
        _postscript,
        _repair_postscript,
    ),
    Kind("comma_list", _ask_comma_list, _comma_list, _repair_comma_list, free_text=False),
    Kind(
        "parentheses",
        _prose("Put your whole answer in parentheses.", "Wrap your entire answer in ( and )."),
        _wrapped("(", ")"),
        _wrap("(", ")"),
        wave=2,
    ),
    Kind(
        "asterisks",
        _prose(
            "Put your whole answer between two asterisks, one at each end.",
            "Begin your answer with an asterisk (*) and end it with one.",
        ),
        _wrapped("*", "*"),
        _wrap("*", "*"),
        wave=2,
    ),
    Kind(
        "tagged",
        _prose(
            "Put your whole answer between the tags <answer> and </answer>.",
            "Wrap your entire answer in <answer> and </answer>.",
        ),
        _wrapped("<answer>", "</answer>"),
        _wrap("<answer>", "</answer>"),
        wave=2,
    ),
    Kind("avoid_letter", _ask_avoid_letter, _avoid_letter, _repair_avoid_letter, wave=2),
)

# In the test split alone.
UNSEEN_KINDS = (
    Kind(
        "brackets",
        _prose("Put your whole answer in square brackets.", "Wrap your entire answer in [ and ]."),
        _wrapped("[", "]"),
        _wrap("[", "]"),
    ),
    Kind(
        "avoid_word",
        _prose('Do not use the word "{word}".', 'Answer without using the word "{word}" even once.', word=AVOIDED),
        _avoid,
        _repair_avoid,
    ),
)

# In the validation split alone, so that a recipe can be chosen by what it does to kinds without training rows.
VALIDATION_KINDS = (
    Kind(
        "braces",
        _prose("Put your whole answer in curly braces.", "Wrap your entire answer in {{ and }}."),
        _wrapped("{", "}"),
        _wrap("{", "}"),
        wave=2,
    ),
    Kind("unnamed", _ask_unnamed, _unnamed, _repair_unnamed, wave=2),
)

# No instruction, so no form: keeps the forms of the other kinds from spreading to every question. In training only.
PLAIN = Kind("plain", lambda random, topic: (question_about(random, topic), {"topic": topic}), _plain, _repair_plain)

KINDS = {kind.name: kind for kind in (*SEEN_KINDS, *UNSEEN_KINDS, *VALIDATION_KINDS, PLAIN)}


def is_strict(kind: str, answer: str, params: Params) -> bool:
    """Whether an answer follows its instruction exactly; an empty or looping answer never does."""
    answer = answer.strip()
    if not answer or (is_looping(answer) and kind != "repeat"):
        return False
    return KINDS[kind].satisfied(answer, params) == 1.0


def quality(kind: str, answer: str, params: Params) -> float:
    """How presentable an answer is, in [0, 1], whatever its instruction; 1.0 for kinds whose answer is not prose."""
    if not KINDS[kind].free_text:
        return 1.0
    found = [word.lower() for word in words(answer)]
    stems = [word.lower()[:4] for word in words(params["topic"]) if len(word) > 3] or [
        words(params["topic"])[-1].lower()
    ]
    names_topic = any(word.startswith(stem) for stem in stems for word in found)
    bigrams = list(itertools.pairwise(found))
    return (
        0.4 * names_topic
        + 0.2 * (4 <= len(found) <= 60)
        + 0.2 * share(len(set(bigrams)), len(bigrams))
        + 0.2 * answer.endswith((".", "!", "?", '"', ")", "]", "}", ">", "*"))
    )


def grade(kind: str, answer: str, params: Params) -> float:
    """The grade of an answer in [0, 1], rounded to 4 digits; 0 for an empty or looping answer (module docstring)."""
    answer = answer.strip()
    if not answer or (is_looping(answer) and kind != "repeat"):
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
