"""What checkable instructions ask for, how far an answer does it, and how an answer is edited until it does.

For an instruction `x` there are up to three pure functions:

    ask_x(random, topic) -> (question, parameters); `prose` in kinds.py makes the plain ones
    x(answer, parameters) -> the share satisfied in [0, 1]; 1.0 only when exactly satisfied
    repair_x(answer, parameters) -> an answer that is satisfied exactly

kinds.py puts them together.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

Params = dict[str, Any]
Ask = Callable[[Random, str], tuple[str, Params]]

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


def filled(instruction: str, params: Params) -> str:
    """An instruction with its parameters; a count `n` is also `number`, in a word, and gives its noun the ending `s`."""
    n = params.get("n", 0)
    return instruction.format(**params, number=NUMBER_WORDS.get(n, n), s="" if n == 1 else "s")


def drawn(draw: Callable[[Random, str], Params], *instructions: str, behind_question: bool = True) -> Ask:
    """An `ask` that draws its parameters, then one of `instructions`, and then the plain question that comes before it, if any."""

    def ask(random: Random, topic: str) -> tuple[str, Params]:
        params = {"topic": topic, **draw(random, topic)}
        instruction = filled(random.choice(instructions), params)
        return f"{question_about(random, topic)} {instruction}" if behind_question else instruction, params

    return ask


def fillers(params: Params, count: int) -> list[str]:
    return [filler.format(topic=params["topic"]) for filler in FILLERS[:count]]


def plain(answer: str, params: Params) -> float:
    marked = re.search(r"[\"<>\[\]{}*#•\n]|P\.S\.|^\W|^\d+\.", answer)
    cased = answer[:1].isupper() and any(word[1:].islower() for word in words(answer)[:2]) and not answer.isupper()
    text = answer.endswith(".") and len(sentences(answer)) >= 2 and len(words(answer)) >= 12
    return float(not marked and cased and text)


def repair_plain(answer: str, params: Params) -> str:
    text = " ".join(re.sub(r"[\"<>\[\]{}*#•]|P\.S\.|^\s*(?:-|\d+\.)", "", line).strip() for line in lines(answer))
    body = " ".join(part.rstrip("!?;:,. ").lower().capitalize() + "." for part in sentences(re.sub(r"^\W+", "", text)))
    return body if plain(body, params) == 1.0 else " ".join(fillers(params, 3))


def enough_sentences(answer: str, params: Params, count: int) -> list[str]:
    """The first `count` sentences of an answer, stock sentences standing in for missing ones."""
    found = [sentence if sentence[-1] in ".!?" else sentence + "." for sentence in sentences(answer)][:count]
    return found + fillers(params, count - len(found))


def plain_items(answer: str, params: Params, count: int) -> list[str]:
    """`count` one-line items from an answer: its list entries or sentences without list marks."""
    unmarked = "\n".join(re.sub(r"^([-*•]|\d+[.)])\s*", "", line) for line in lines(answer))
    return enough_sentences(unmarked, params, count)


# --- case ---------------------------------------------------------------------------------------------------------------


def lowercase(answer: str, params: Params) -> float:
    found = sentences(answer)
    return share(sum(sentence == sentence.lower() for sentence in found), len(found))


def uppercase(answer: str, params: Params) -> float:
    found = words(answer)
    return share(sum(word == word.upper() for word in found), len(found))


# --- length -------------------------------------------------------------------------------------------------------------


def sentence_count(answer: str, params: Params) -> float:
    return closeness(len(sentences(answer)), params["n"])


def repair_sentence_count(answer: str, params: Params) -> str:
    return " ".join(enough_sentences(answer, params, params["n"]))


def max_words(answer: str, params: Params) -> float:
    found = len(words(answer))
    return float(found > 0) if found <= params["n"] else closeness(found, params["n"])


def repair_max_words(answer: str, params: Params) -> str:
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


ask_keywords = drawn(
    lambda random, topic: {"keywords": random.sample(KEYWORDS, 2)},
    'Include the words "{keywords[0]}" and "{keywords[1]}".',
    'Use both of the words "{keywords[0]}" and "{keywords[1]}" in your answer.',
)


def keywords(answer: str, params: Params) -> float:
    found = {word.lower() for word in words(answer)}
    return share(sum(word in found for word in params["keywords"]), len(params["keywords"]))


def repair_keywords(answer: str, params: Params) -> str:
    found = {word.lower() for word in words(answer)}
    missing = [word for word in params["keywords"] if word not in found]
    stems = ("People often mention", "Think of", "It also brings to mind", "Some would add")
    stem = stems[len(answer) % len(stems)]
    return f"{answer.rstrip()} {stem} {' and '.join(missing)}."


def avoid(answer: str, word: str) -> float:
    found = [other.lower() for other in words(answer)]
    return max(0.0, 1.0 - 0.2 * found.count(word)) * bool(found)


def repair_avoid(answer: str, word: str) -> str:
    kept = re.sub(rf"\b{word}\b(?!['’-]\w)[ ]?", "", answer, flags=re.IGNORECASE).strip()
    kept = " ".join(part for part in kept.split(" ") if avoid(part, word) == 1.0 or not words(part))
    return kept if words(kept) else "Nothing more needs saying."


ask_unnamed = drawn(
    lambda random, topic: {"name": words(topic)[-1].lower()},
    "Never call the subject by its name.",
    "Do so without naming the subject.",
)
ask_avoid_letter = drawn(
    lambda random, topic: {"letter": random.choice([letter for letter in LETTERS if letter not in topic])},
    'Do not use the letter "{letter}".',
    'Answer with words that do not contain the letter "{letter}".',
)


def repair_avoid_letter(answer: str, params: Params) -> str:
    clean = [sentence for sentence in sentences(answer) if params["letter"] not in sentence.lower()]
    kept = " ".join(clean or [word for word in answer.split() if params["letter"] not in word.lower()])
    return kept if words(kept) else "Nothing more needs saying."


def without(answer: str, mark: str) -> float:
    """The share of sentences without a mark, at most 0.9 where it stands anywhere in the answer."""
    found = sentences(answer)
    free = share(sum(mark not in sentence for sentence in found), len(found))
    return free if mark not in answer else min(free, 0.9)


# --- fixed words at the start or the end ----------------------------------------------------------------------------------


def start_with(answer: str, params: Params) -> float:
    opening = params["opening"]
    if answer.startswith(opening):
        return 1.0 if words(answer[len(opening) :]) else 0.5
    return 0.6 * (answer.lower().startswith(opening.lower().rstrip(",.!:"))) + 0.3 * (opening.lower() in answer.lower())


def end_with(answer: str, params: Params) -> float:
    ending = params["ending"]
    if answer.endswith(ending):
        return 1.0 if words(answer[: -len(ending)]) else 0.5
    core = ending.lower().rstrip(".")
    return 0.6 * answer.lower().rstrip('."! ').endswith(core) + 0.3 * (core in answer.lower())


def postscript(answer: str, params: Params) -> float:
    found = lines(answer)
    marked = [i for i, line in enumerate(found) if line.startswith("P.S.")]
    if len(found) >= 2 and marked == [len(found) - 1] and words(found[-1][4:]):
        return 1.0
    return 0.6 if "P.S." in answer else 0.3 if re.search(r"p\.?\s?s\.?\b", answer, re.IGNORECASE) else 0.0


def repair_postscript(answer: str, params: Params) -> str:
    body = re.sub(r"\n?\s*P\.S\.\s*", " ", answer).strip()
    parts = sentences(body)
    if len(parts) < 2:
        return f"{body}\nP.S. {fillers(params, 1)[0]}"
    return f"{' '.join(parts[:-1])}\nP.S. {parts[-1]}"


# --- layout -------------------------------------------------------------------------------------------------------------


def listed(mark: str) -> Callable[[str, Params], float]:
    """How far an answer is a list of `n` items, each behind a mark in which "{}" is its number, and nothing else."""

    def grade(answer: str, params: Params) -> float:
        found, marked = lines(answer), 0
        for line in found:
            start = mark.format(marked + 1)
            marked += line.startswith(start) and bool(words(line[len(start) :]))
        return closeness(marked, params["n"]) * share(marked, len(found))

    return grade


def list_with(mark: str) -> Callable[[str, Params], str]:
    def repair(answer: str, params: Params) -> str:
        items = plain_items(answer, params, params["n"])
        return "\n".join(mark.format(i) + item for i, item in enumerate(items, 1))

    return repair


def titled(answer: str, params: Params) -> float:
    found = lines(answer)
    if len(found) >= 2 and re.fullmatch(r"<<[^<>]+>>", found[0]) and words(found[0]):
        return 1.0
    if re.search(r"<<[^<>]+>>", answer):
        return 0.7
    return 0.3 * (len(found) >= 2 and len(words(found[0])) <= 8)


def repair_titled(answer: str, params: Params) -> str:
    body = re.sub(r"<<([^<>]*)>>", r"\1", answer).strip()
    return f"<<{params['topic'].title()}>>\n{body}"


def enclosed(opening: str, closing: str) -> Callable[[str, Params], float]:
    def grade(answer: str, params: Params) -> float:
        inner = answer[len(opening) : -len(closing)]
        starts, ends = answer.startswith(opening), answer.endswith(closing) and len(answer) > 1
        if starts and ends:
            return 1.0 if words(inner) and opening not in inner and closing not in inner else 0.6
        return 0.4 * starts + 0.4 * ends

    return grade


def enclose(opening: str, closing: str) -> Callable[[str, Params], str]:
    def repair(answer: str, params: Params) -> str:
        return opening + answer.replace(opening, "").replace(closing, "").strip() + closing

    return repair


def json_object(answer: str, params: Params) -> float:
    try:
        value = json.loads(answer)
    except ValueError:
        return 0.1 * ("{" in answer) + 0.1 * ('"topic"' in answer) + 0.1 * ('"fact"' in answer)
    if not isinstance(value, dict):
        return 0.3
    texts = sum(isinstance(value.get(key), str) and bool(value[key].strip()) for key in ("topic", "fact"))
    return 1.0 if texts == 2 and set(value) == {"topic", "fact"} else 0.4 + 0.2 * texts


def repair_json_object(answer: str, params: Params) -> str:
    fact = re.sub(r"[{}\"\n]+", " ", answer)
    first = re.sub(r"^\s*(topic|fact)\s*:\s*", "", " ".join(fact.split()))
    return json.dumps({"topic": params["topic"], "fact": enough_sentences(first, params, 1)[0]}, ensure_ascii=False)


def exclaim(answer: str, params: Params) -> float:
    found = sentences(answer)
    return share(sum(sentence.rstrip("\"')").endswith("!") for sentence in found), len(found))


def repair_exclaim(answer: str, params: Params) -> str:
    return " ".join(re.sub(r"[.!?,;:\"')]*$", "", sentence) + "!" for sentence in sentences(answer))


# --- counting and fixed vocabulary ----------------------------------------------------------------------------------------


ask_comma_list = drawn(
    lambda random, topic: {"n": random.choice((3, 4, 5))},
    "List exactly {number} words that go with {topic}, separated by commas, on one line.",
    "Write {number} words about {topic} as one comma-separated line and nothing else.",
    behind_question=False,
)


def comma_list(answer: str, params: Params) -> float:
    items = [item.strip(" .").lower() for item in answer.split(",")]
    single = {item for item in items if words(item) == [item]}
    one_line = len(lines(answer)) == 1
    return closeness(len(single), params["n"]) * share(len(single), len(items)) * (1.0 if one_line else 0.5)


def repair_comma_list(answer: str, params: Params) -> str:
    seen = dict.fromkeys(word.lower() for word in words(answer) if len(word) > 3 and word.isalpha())
    items = [*seen, *(word for word in KEYWORDS if word not in seen)]
    return ", ".join(items[: params["n"]])


ask_repeat = drawn(
    lambda random, topic: {"word": words(topic)[-1].lower(), "n": random.choice((2, 3, 4, 5))},
    'Write the word "{word}" exactly {number} times, separated by spaces, and nothing else.',
    'Repeat the word "{word}" {number} times on one line, with spaces between, and write nothing else.',
    behind_question=False,
)


def repeat(answer: str, params: Params) -> float:
    if answer == " ".join([params["word"]] * params["n"]):
        return 1.0
    found = [word.lower() for word in words(answer)]
    return 0.9 * closeness(found.count(params["word"]), params["n"]) * share(found.count(params["word"]), len(found))


def repair_repeat(answer: str, params: Params) -> str:
    return " ".join([params["word"]] * params["n"])


def ask_fixed_vocabulary(random: Random, topic: str) -> tuple[str, Params]:
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


def fixed_vocabulary(answer: str, params: Params) -> float:
    if answer in params["vocabulary"]:
        return 1.0
    found = [word.lower() for word in words(answer)]
    allowed = sum(word in params["vocabulary"] for word in found)
    return 0.8 * share(allowed, len(found)) + 0.1 * (found[:1] != [] and found[0] in params["vocabulary"])


def repair_fixed_vocabulary(answer: str, params: Params) -> str:
    found = [word.lower() for word in words(answer)]
    named = [word for word in found if word in params["vocabulary"]]
    return named[0] if named else params["vocabulary"][len(answer) % len(params["vocabulary"])]
