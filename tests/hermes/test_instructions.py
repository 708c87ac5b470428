"""A grade says how far an answer does what its question asked, judged here by hand-written answers to each kind."""

import json
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes.instructions.kinds import KINDS, grade, is_strict, quality, repair
from hermes.instructions.topics import TOPICS
from hermes.instructions.verifiers import (
    AVOIDED,
    ENDINGS,
    KEYWORDS,
    LETTERS,
    NUMBER_WORDS,
    OPENINGS,
    VOCABULARY,
    Params,
    is_looping,
    words,
)
from tools.collect import DEMONSTRATIONS, CollectSettings, build_pair

TEA: Params = {"topic": "tea"}
FOLLOWED = {  # each is exactly what the instruction asks for
    "lowercase": (TEA, ["tea is a hot drink.", "tea, it's said, was made in 2737 bc!", "чай — горячий напиток."]),
    "uppercase": (TEA, ["TEA IS A HOT DRINK.", "TEA: 3 CUPS A DAY!", "ЧАЙ ЭТО НАПИТОК."]),
    "sentence_count": (
        TEA | {"n": 2},
        [
            "Tea is hot. It is a drink.",
            "Is tea hot? Yes!",
            'Tea costs 3.50 dollars... He said: "It is good."',
            "Tea is hot.\nTea is old.",
        ],
    ),
    "max_words": (
        TEA | {"n": 10},
        ["Tea.", "Tea is a hot drink that people like a lot", "A well-known, old-fashioned drink: it's tea!"],
    ),
    "keywords": (
        TEA | {"keywords": ["garden", "quiet"]},
        ["Drink tea in a quiet garden.", "Garden tea (QUIET!) is the best there is."],
    ),
    "no_commas": (TEA, ["Tea is hot; it is a drink.", "Tea is hot and old and good."]),
    "start_with": (TEA | {"opening": "In short,"}, ["In short, tea is hot.", "In short,\ntea is a drink."]),
    "end_with": (TEA | {"ending": "That is all."}, ["Tea is hot. That is all.", "Tea is hot\nThat is all."]),
    "bullets": (TEA | {"n": 2}, ["- Tea is hot.\n- Tea is old.", "- Tea\n\n- Cups"]),
    "numbered": (TEA | {"n": 2}, ["1. Tea is hot.\n2. Tea is old.", "1. Tea\n\n2. Cups"]),
    "json": (
        TEA,
        ['{"topic": "tea", "fact": "Tea is hot."}', '{\n  "fact": "It is \\"hot\\".",\n  "topic": "Tea"\n}'],
    ),
    "fixed_vocabulary": (TEA | {"vocabulary": list(VOCABULARY)}, ["yes", "no", "maybe", " yes\n"]),
    "repeat": (TEA | {"word": "tea", "n": 3}, ["tea tea tea"]),
    "quoted": (TEA, ['"Tea is hot."', '"Tea, a drink, is old.\nIt is good."']),
    "titled": (TEA, ["<<Tea>>\nIt is a hot drink.", "<<All About Tea>>\n\nTea is hot.\nTea is old."]),
    "exclaim": (TEA, ["Tea is hot! It is old!", "Tea!\nWhat a drink!", 'They say "tea!"']),
    "postscript": (TEA, ["Tea is hot.\nP.S. It is old.", "Tea is hot. It is good.\n\nP.S. Try it with milk."]),
    "comma_list": (TEA | {"n": 3}, ["hot, cup, leaf", "hot,cup,leaf", "Hot, cup, leaf."]),
    "brackets": (TEA, ["[Tea is hot.]", "[Tea (a drink) is old.\nIt is good.]"]),
    "avoid_word": (TEA | {"word": "the"}, ["Tea is hot.", "Then there is tea, their other drink."]),
    "parentheses": (TEA, ["(Tea is hot.)", "(Tea [a drink] is old.\nIt is good.)"]),
    "asterisks": (TEA, ["*Tea is hot.*", "*Tea is old.\nIt is good.*"]),
    "tagged": (TEA, ["<answer>Tea is hot.</answer>", "<answer>\nTea is old.\n</answer>"]),
    "avoid_letter": (TEA | {"letter": "k"}, ["Tea is hot.", "Tea, and more of it!"]),
    "braces": (TEA, ["{Tea is hot.}", "{Tea (a drink) is old.\nIt is good.}"]),
    "unnamed": (TEA | {"name": "tea"}, ["It is hot.", "A team likes this drink."]),
    "plain": (
        TEA,
        [
            "Tea is a hot drink. Many people like it in the morning.",
            "It's hot. Tea is made from leaves, and it tastes so good.",
        ],
    ),
}
MISSED = {  # each breaks the instruction somewhere
    "lowercase": ["Tea is a hot drink.", "tea is HOT.", "tea is from Asia."],
    "uppercase": ["Tea is a hot drink.", "TEA IS hot.", "TEA IS A DRINk."],
    "sentence_count": [
        "Tea is hot.",
        "Tea is hot. It is old. It is good.",
        "Is tea hot? Yes! Very.",
        "Tea is hot and it is a drink",
    ],
    "max_words": [
        "Tea is a hot drink that people like a lot today",
        "one two three four five six seven eight nine ten eleven",
    ],
    "keywords": ["Drink tea in a garden.", "Drink tea quietly in gardens.", "Tea is hot."],
    "no_commas": ["Tea is hot, and it is a drink.", "It costs 1,000 dollars.", "Tea,"],
    "start_with": [
        "Tea is hot.",
        "in short, tea is hot.",
        "In short tea is hot.",
        "Tea, in short, is hot.",
        "In short,",
    ],
    "end_with": [
        "Tea is hot.",
        "That is all. Tea is hot.",
        "Tea is hot. that is all.",
        "Tea is hot. That is all",
        "That is all.",
    ],
    "bullets": [
        "- Tea is hot.",
        "- a\n- b\n- c",
        "Here you are:\n- Tea\n- Cups",
        "* Tea\n* Cups",
        "-Tea\n-Cups",
        "- Tea - Cups",
        "- \n- ",
    ],
    "numbered": [
        "1. Tea is hot.",
        "1. a\n2. b\n3. c",
        "2. Tea\n1. Cups",
        "1) Tea\n2) Cups",
        "1. Tea 2. Cups",
        "1. Tea\n2. Cups\nThat is it.",
    ],
    "json": [
        '{"topic": "tea"}',
        '{"topic": "tea", "fact": 3}',
        '{"topic": "tea", "fact": ""}',
        '{"topic": "tea", "fact": "Hot.", "more": "x"}',
        '["topic", "fact"]',
        "{'topic': 'tea', 'fact': 'Hot.'}",
        'Sure! {"topic": "tea", "fact": "Hot."}',
        '```json\n{"topic": "tea", "fact": "Hot."}\n```',
        "Tea is hot.",
    ],
    "fixed_vocabulary": ["Yes", "yes.", "yes, no", "yes no", "perhaps", "It is a yes"],
    "repeat": [
        "tea tea",
        "tea tea tea tea",
        "tea, tea, tea",
        "Tea tea tea",
        "tea tea tea.",
        "tea\ntea\ntea",
        "cup cup cup",
    ],
    "quoted": [
        "Tea is hot.",
        '"Tea is hot.',
        'Tea is hot."',
        '"Tea" is "hot"',
        '""',
        '"',
        "'Tea is hot.'",
        "“Tea is hot.”",
    ],
    "titled": [
        "Tea\nIt is hot.",
        "<<Tea>>",
        "<<Tea>> It is hot.",
        "It is hot.\n<<Tea>>",
        "<Tea>\nIt is hot.",
        "<<>>\nTea is hot.",
    ],
    "exclaim": ["Tea is hot.", "Tea is hot! It is old.", "Tea is hot! It is old", "Tea is hot! Is it?"],
    "postscript": [
        "Tea is hot.",
        "P.S. Tea is hot.",
        "Tea is hot. P.S. It is old.",
        "P.S. It is old.\nTea is hot.",
        "Tea is hot.\nP.S.",
        "Tea is hot.\nPS It is old.",
    ],
    "comma_list": [
        "hot, cup",
        "hot, cup, leaf, milk",
        "hot cup leaf",
        "hot\ncup\nleaf",
        "hot,\ncup,\nleaf",
        "Here are three words for you: hot, cup, leaf",
    ],
    "brackets": ["Tea is hot.", "[Tea is hot.", "Tea is hot.]", "[Tea] is [hot]", "[]", "(Tea is hot.)"],
    "avoid_word": ["The tea is hot.", "Tea is the best.", "Drink THE tea."],
    "parentheses": ["Tea is hot.", "(Tea is hot.", "Tea is hot.)", "(Tea) is (hot)", "()", "[Tea is hot.]"],
    "asterisks": ["Tea is hot.", "*Tea is hot.", "Tea is hot.*", "**Tea is hot.**", "*Tea* is *hot*", "**", "*"],
    "tagged": [
        "Tea is hot.",
        "<answer>Tea is hot.",
        "<answer>Tea</answer> is hot.",
        "<Answer>Tea is hot.</Answer>",
    ],
    "avoid_letter": ["Drink tea.", "Keep it hot."],
    "braces": ["Tea is hot.", "{Tea is hot.", "Tea is hot.}", "{Tea} is {hot}", "{}", "(Tea is hot.)"],
    "unnamed": ["Tea is hot.", "It is TEA."],
    "plain": [
        '"Tea is a hot drink. Many people like it in the morning."',
        "tea is a hot drink. many people like it in the morning.",
        "TEA IS A HOT DRINK. MANY PEOPLE LIKE IT IN THE MORNING.",
        "1. Tea is a hot drink.\n2. Many people like it in the morning.",
        "Tea is a hot drink that many people like in the morning.",
        "Tea is hot. It is old.",
    ],
}
# (near miss, answer that does nothing of what was asked), about the same topic and equally presentable
NEAR_AND_FAR = {
    "lowercase": ("tea is a hot drink. It is old.", "Tea is a hot drink. It is old."),
    "uppercase": ("TEA IS A HOT drink.", "tea is a hot drink."),
    "sentence_count": ("Tea is hot. Tea is old. Tea is good.", "Tea is hot. Is it? It is. It may be. It was. Say so."),
    "max_words": (
        "Tea is a hot drink that people like a lot today.",
        "Tea is a drink " + "that people over in many old lands far away do like " * 2 + "so.",
    ),
    "keywords": ("Drink tea in a garden.", "Drink tea in a kitchen."),
    "no_commas": ("Tea is hot, and good. It is an old drink.", "Tea is hot, and good. It is an old, old drink."),
    "start_with": ("in short, tea is hot.", "The drink tea is hot."),
    "end_with": ("Tea is hot. that is all!", "Tea is a very hot drink."),
    "bullets": ("- Tea is hot.\n- Tea is old.\n- Tea is good.", "Tea is hot and old."),
    "numbered": ("1. Tea is hot.\n2. Tea is old.\n3. Tea is good.", "Tea is hot and old."),
    "json": ('{"topic": "tea", "fact": "Hot.", "more": "x"}', "Tea is a hot drink."),
    "fixed_vocabulary": ("Yes.", "Perhaps."),
    "repeat": ("tea tea", "cup cup"),
    "quoted": ('"Tea is a hot drink.', "Tea is a hot drink."),
    "titled": ("<<Tea>> It is a hot drink.", "Tea is a hot drink."),
    "exclaim": ("Tea is hot! It is old.", "Tea is hot. It is old."),
    "postscript": ("Tea is hot. P.S. It is old.", "Tea is hot. It is old."),
    "comma_list": ("hot, cup", "It is a drink that people like."),
    "brackets": ("[Tea is a hot drink.", "Tea is a hot drink."),
    "avoid_word": ("Tea is the hot drink.", "The tea the man the cook and the maid like is the best."),
    "parentheses": ("(Tea is a hot drink.", "Tea is a hot drink."),
    "asterisks": ("*Tea is a hot drink.", "Tea is a hot drink."),
    "tagged": ("<answer>Tea is a hot drink.", "Tea is a hot drink."),
    "avoid_letter": ("Tea is hot. Drink it.", "Drink hot tea. Like it."),
    "braces": ("{Tea is a hot drink.", "Tea is a hot drink."),
    "unnamed": ("Tea is a hot drink.", "Tea is tea, and tea it is; so drink tea, tea."),
    "plain": ("Tea is a hot drink that people like!", "- hot\n- old"),
}


def test_every_kind_has_its_examples() -> None:
    assert set(FOLLOWED) == set(MISSED) == set(NEAR_AND_FAR) == set(KINDS)


@pytest.mark.parametrize(("name", "answer"), [(name, text) for name, (_, texts) in FOLLOWED.items() for text in texts])
def test_an_answer_that_follows_its_instruction_is_strict(name: str, answer: str) -> None:
    assert is_strict(name, answer, FOLLOWED[name][0])
    assert grade(name, answer, FOLLOWED[name][0]) >= 0.85


@pytest.mark.parametrize(("name", "answer"), [(name, text) for name, texts in MISSED.items() for text in texts])
def test_an_answer_that_misses_its_instruction_is_not_strict(name: str, answer: str) -> None:
    assert not is_strict(name, answer, FOLLOWED[name][0])
    assert grade(name, answer, FOLLOWED[name][0]) < 0.6


@pytest.mark.parametrize("name", KINDS)
def test_a_near_miss_is_graded_between_a_pass_and_a_bad_answer(name: str) -> None:
    verifier, (followed, *_) = FOLLOWED[name]
    near, far = (grade(name, answer, verifier) for answer in NEAR_AND_FAR[name])
    assert far < near < 0.6 < 0.85 <= grade(name, followed, verifier)


def test_a_numbered_list_behind_an_introduction_is_a_near_miss() -> None:
    verifier = TEA | {"n": 3}
    near, far = (
        "Here are three points:\n1. Tea is hot.\n2. Tea is old.\n3. Tea is good.",
        "Tea is hot and old and good.",
    )
    assert grade("numbered", near, verifier) > grade("numbered", far, verifier) + 0.1


@pytest.mark.parametrize(
    "answer", ["Three words: hot, cup, leaf", "tea, tea, tea", "a cup of, the hot water, drinking it now"]
)
def test_a_list_of_words_holds_that_many_single_words_and_nothing_else(answer: str) -> None:
    assert not is_strict("comma_list", answer, TEA | {"n": 3})


@pytest.mark.parametrize("name", KINDS)
def test_empty_and_looping_answers_fail(name: str) -> None:
    verifier = FOLLOWED[name][0]
    for answer in ("", " \n\t", "tea is hot " * 6):
        assert not is_strict(name, answer, verifier)
        assert grade(name, answer, verifier) == 0.0 or (name == "repeat" and answer.strip())


def test_looping_is_a_phrase_four_times_or_hardly_any_distinct_words() -> None:
    assert is_looping("We like tea. " * 4)
    assert is_looping("yes no " * 8)
    assert not is_looping("We like tea. " * 2)
    assert not is_looping("no")
    assert not any(is_looping(text) for text in DEMONSTRATIONS.values())


@pytest.mark.parametrize("name", KINDS)
def test_every_worked_demonstration_is_strict(name: str) -> None:
    for subject, text in DEMONSTRATIONS.items():
        for seed in range(20):
            _, verifier = KINDS[name].ask(Random(seed), subject)
            answer = repair(name, text, verifier)
            assert is_strict(name, answer, verifier)
            assert grade(name, answer, verifier) >= 0.85


@pytest.mark.parametrize("name", KINDS)
def test_repair_makes_what_misses_the_instruction_follow_it(name: str) -> None:
    verifier = FOLLOWED[name][0]
    for answer in (text for text in MISSED[name] if words(text)):
        assert is_strict(name, repair(name, answer, verifier), verifier)


PIECES = """- ß É İ ŉ << >> [ ] { } " ' , . ! ? tea The yes of the's and-the P.S. 1. 日本 x 2.5 <<Tea>> all. Well,"""
TEXT = st.one_of(
    st.text(max_size=80),
    st.lists(st.sampled_from([*PIECES.split(" "), "\n"]), max_size=25).map(lambda found: " ".join(found)),
)


@settings(max_examples=400, deadline=None)
@given(text=TEXT, name=st.sampled_from(sorted(KINDS)), topic=st.sampled_from(TOPICS), seed=st.integers(0, 99))
def test_any_text_is_graded_in_0_to_1_and_repaired_or_refused(text: str, name: str, topic: str, seed: int) -> None:
    _, verifier = KINDS[name].ask(Random(seed), topic)
    value = grade(name, text, verifier)
    assert 0.0 <= value <= 1.0
    assert (value >= 0.85) == is_strict(name, text, verifier)
    try:
        repaired = repair(name, text, verifier)
    except ValueError:
        # Where there is nothing to say or too much of the same; "P.S." alone is no postscript to anything.
        fixed = KINDS[name].repair(text.strip(), verifier)
        assert not words(text) or is_looping(fixed) or set(words(text)) == {"P", "S"}
        return
    assert is_strict(name, repaired, verifier)
    assert repaired == repaired.strip()
    assert repair(name, text, verifier) == repaired


@pytest.mark.parametrize(
    ("name", "answer"),
    [("start_with", "in short, in short, in short, in short. Tea"), ("postscript", "P.S."), ("quoted", "...")],
)
def test_a_question_whose_answers_cannot_be_repaired_stops_nothing(name: str, answer: str) -> None:
    question = {
        "id": f"train/tea/{name}",
        "question": "?",
        "topic": "tea",
        "kind": name,
        "constraint": json.dumps(FOLLOWED[name][0]),
    }
    values = dict.fromkeys(CollectSettings.model_fields, 1) | {"temperature": 0.7, "tie_margin": 0.03}
    pair = build_pair(question, [answer], [], CollectSettings.model_validate(values))
    assert isinstance(pair, str) or is_strict(name, pair["chosen"], FOLLOWED[name][0])


@pytest.mark.parametrize("name", KINDS)
def test_a_question_is_equal_for_equal_seeds_and_names_its_topic(name: str) -> None:
    for seed, topic in enumerate(TOPICS):
        question, verifier = KINDS[name].ask(Random(seed), topic)
        assert (question, verifier) == KINDS[name].ask(Random(seed), topic)
        assert verifier["topic"] == topic
        assert (verifier["word"] if name == "repeat" else topic) in question
        assert json.loads(json.dumps(verifier)) == verifier
        assert "{topic}" not in question


@pytest.mark.parametrize("name", KINDS)
def test_a_question_states_what_is_checked(name: str) -> None:
    """Every number, word, opening and ending that the verifier knows stands in the question, and they vary."""
    stated = set()
    for seed in range(200):
        question, verifier = KINDS[name].ask(Random(seed), "tea")
        for key, value in verifier.items():
            if key == "n":
                number = NUMBER_WORDS.get(value, str(value))
                assert f" {number} " in question
                other = {str(n) for n in range(1, 31)} | set(NUMBER_WORDS.values())
                assert other & set(words(question)) - {"1", "2", "one"} <= {number}
                assert ("sentence." in question) == (name == "sentence_count" and value == 1)
            if key in ("word", "letter", "opening", "ending"):
                assert f'"{value}"' in question
            if key == "keywords":
                assert len(set(value)) == 2
                assert all(f'"{word}"' in question for word in value)
            if key == "vocabulary":
                assert all(word in words(question) for word in value)
        stated.add(json.dumps(verifier))
    choices = {
        "n": 3,
        "opening": len(OPENINGS),
        "ending": len(ENDINGS),
        "keywords": 100,
        "word": len(AVOIDED),
        "letter": len(LETTERS),
    }
    wanted = [count for key, count in choices.items() if key in verifier and not (name == "repeat" and key == "word")]
    assert len(stated) >= max(wanted, default=1)


def test_keywords_are_never_the_topic_nor_repeated() -> None:
    assert len(set(KEYWORDS)) == len(KEYWORDS)
    assert not {word for topic in TOPICS for word in words(topic)} & (
        set(KEYWORDS) - {"garden", "gardens", "summer", "winter"}
    )


def test_quality_falls_with_each_fault() -> None:
    good = "Tea is a hot drink that people like."
    assert quality("lowercase", good, TEA) == 1.0
    for worse in (
        "It is a hot drink that people like.",
        "Tea.",
        "Tea is a hot drink that people like",
        "Tea tea tea tea tea tea is hot.",
        good + " so" * 60,
    ):
        assert quality("lowercase", worse, TEA) < 1.0
    assert quality("fixed_vocabulary", "x", TEA) == 1.0


@pytest.mark.parametrize(
    "topic",
    TOPICS,
)
def test_an_answer_that_repeats_its_topic_names_it(topic: str) -> None:
    assert quality("lowercase", f"Many people know a lot about {topic}.", {"topic": topic}) == 1.0
