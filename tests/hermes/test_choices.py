"""The choices of questions side by side, against the model's own forward of each alone."""

import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from hermes.data.prefixes import common_length
from hermes.evaluation import chat_models, choices
from hermes.evaluation.chat_models import HuggingFaceChat
from hermes.evaluation.choices import Part, Room
from hermes.model.base import load
from hermes.training.exactness import TOLERANCE, find_forward
from hermes.training.shared_prefix import Forward, logits_alone
from tests.hermes.test_architectures import small_model, some_pairs

Ids = list[int]
# Of tiny models whose windows are of 8 tokens and whose attention has soft caps and sinks.
SIDE_BY_SIDE = ["llama", "qwen2", "qwen3", "smollm3", "olmo2", "granite", "cohere"]
ALONE = ["mistral", "mixtral", "phi3", "gemma2", "gemma3_text", "cohere2", "gpt_oss", "bloom", "mamba"]


def asked(vocabulary: int = 120, beginning: int = 50) -> tuple[list[Ids], list[list[Ids]]]:
    """Questions of every kind: most share a beginning, two do not, one is that beginning and a token; choices of one token or more."""
    draw = random.Random(0)

    def ids(count: int) -> Ids:
        return [draw.randrange(3, vocabulary) for _ in range(count)]

    start = ids(beginning)
    prompts = [start + ids(count) for count in (9, 1, 14, 3, 22, 9)] + [ids(30), ids(1)]
    answers = [
        [ids(1) for _ in range(4)],
        [ids(3), ids(1), ids(6)],
        [ids(5)],
        [ids(2), ids(2)],
        [ids(1) for _ in range(10)],
        [ids(7), ids(1)],
        [ids(4), ids(4), ids(1)],
        [ids(2), ids(9)],
    ]
    return prompts, answers


def alone(model: PreTrainedModel, prompts: list[Ids], answers: list[list[Ids]]) -> list[list[tuple[float, bool]]]:
    found = []
    with torch.inference_mode():
        for prompt, own in zip(prompts, answers, strict=True):
            scores = []
            for answer in own:
                logits = logits_alone(model.forward, torch.tensor([*prompt, *answer]), len(answer))
                labels = torch.tensor(answer).unsqueeze(1)
                total = logits.log_softmax(dim=-1).gather(1, labels).double().sum()
                scores.append((float(total), bool((logits.argmax(dim=-1, keepdim=True) == labels).all())))
            found.append(scores)
    return found


def check(model: PreTrainedModel, how: Forward, prompts: list[Ids], answers: list[list[Ids]]) -> None:
    found = dict(choices.scores(model, how, prompts, answers, choices.parts(prompts)))
    assert sorted(found) == list(range(len(prompts)))
    for i, expected in enumerate(alone(model, prompts, answers)):
        for (ours, likeliest), (theirs, is_likeliest) in zip(found[i], expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)
            assert likeliest == is_likeliest


@pytest.mark.parametrize("limit", [choices.CPU_ROOM, Room(48, 1024), Room(1, 1)], ids=["one batch", "several", "alone"])
def test_every_choice_has_the_likelihood_that_it_has_alone(limit: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "CPU_ROOM", limit)
    check(small_model("llama"), Forward(), *asked())


def test_the_likeliest_choice_is_marked() -> None:
    model, (prompts, answers) = small_model("llama"), asked()
    with torch.inference_mode():
        for prompt, own in zip(prompts, answers, strict=True):
            greedy = int(logits_alone(model.forward, torch.tensor([*prompt, 3]), 1).argmax())
            own.append([greedy])
    found = dict(choices.scores(model, Forward(), prompts, answers, choices.parts(prompts)))
    assert all(scores[-1][1] for scores in found.values())
    check(model, Forward(), prompts, answers)


def test_a_beginning_is_read_once_and_every_prompt_once() -> None:
    model, (prompts, answers) = small_model("llama"), asked()
    read = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].numel()))
    list(choices.scores(model, Forward(), prompts, answers, choices.parts(prompts)))
    rows = [len(p) + sum(len(a) - 1 for a in own) for p, own in zip(prompts, answers, strict=True)]
    six, two = [count - 50 for count in rows[:6]], rows[6:]
    assert read == [50, 6 * max(six), 2 * max(two)]


def test_prompts_go_by_their_beginnings() -> None:
    def of(start: str, end: str) -> Ids:
        return [ord(letter) for letter in start * 40 + end]

    prompts = [
        of("a", "xyz"),
        of("b", "x"),
        of("a", "y"),
        of("a", "xw"),
        of("b", "y"),
        of("", "quite another"),
        of("a", ""),
    ]
    assert choices.parts(prompts) == [Part(39, [6, 2, 3, 0]), Part(40, [1, 4]), Part(0, [5])]
    assert choices.parts([of("", "ab"), of("", "ac"), of("", "ad")]) == [Part(0, [0, 1, 2])]  # too short to be worth it
    assert choices.parts([]) == []


def test_a_short_beginning_of_many_does_not_hide_the_long_one_of_some() -> None:
    many = [[5] * 20 + [other, i] for i in range(50) for other in (4, 6)]
    some = [[5] * 150 + [7, i] for i in range(10)]
    assert choices.parts(many + some) == [Part(151, [*range(100, 110)]), Part(0, [*range(100)])]


def verdict(name: str) -> bool:
    """Whether a tiny model's choices are the same side by side; an exception is what `is_exact` takes for no."""
    model = small_model(name)
    how, _ = find_forward(model, some_pairs())
    model = small_model(name)
    if not how.shared:
        return False
    try:
        return choices.difference(model, how, *asked(), choices.parts(asked()[0])) <= TOLERANCE
    except Exception:
        return False


@pytest.mark.parametrize("name", SIDE_BY_SIDE + ALONE)
def test_which_families_take_choices_side_by_side(name: str) -> None:
    assert verdict(name) == (name in SIDE_BY_SIDE)


def test_a_model_that_is_not_exact_is_asked_two_choices_at_a_time(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A window of 8 tokens, which no mask of ours knows."""
    model = small_model("mistral")
    model.save_pretrained(tmp_path / "model")
    chat = HuggingFaceChat(
        load(tmp_path / "model", torch.float32), AutoTokenizer.from_pretrained(tiny_model_folder), 0, 8
    )
    prompts, answers = asked()
    found = chat.choices_of(prompts, answers)
    assert "are not read side by side" in capsys.readouterr().err
    expected = alone(model, prompts, answers)
    for own, theirs in zip(found, expected, strict=True):
        assert [total for total, _ in own] == pytest.approx([total for total, _ in theirs], abs=1e-4)
    assert chat.choices_of(prompts, answers) == found
    assert "side by side" not in capsys.readouterr().err  # said once


def test_a_model_that_is_exact_is_tried_once_for_the_longest_question(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    is_exact = choices.is_exact

    def counted(folder: Path, how: Forward, prompts: list[Ids], answers: list[list[Ids]], parts: list[Part]) -> bool:
        tried.append(len(prompts))
        return is_exact(folder, how, prompts, answers, parts)

    monkeypatch.setattr(choices, "is_exact", counted)
    model = load(tiny_model_folder, torch.float32)
    chat = HuggingFaceChat(model, AutoTokenizer.from_pretrained(tiny_model_folder), 0, 8)
    prompts, answers = asked()
    for number in (4, 8, 2):
        found = chat.choices_of(prompts[:number], answers[:number])
        for own, theirs in zip(found, alone(model, prompts[:number], answers[:number]), strict=True):
            assert [total for total, _ in own] == pytest.approx([total for total, _ in theirs], abs=1e-4)
    assert tried == [4, 8]
    assert all(chat.side_by_side.tried.values())
    assert chat.choices_of([], []) == []


class Gpu(torch.nn.Module):
    """What `room` looks at."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.config, self.dtype, self.device = model.config, torch.bfloat16, torch.device("cuda")
        self.weights = torch.nn.Parameter(torch.empty(8_030_261_248, dtype=torch.bfloat16, device="meta"))


def test_a_gpus_batches_go_by_its_memory_and_the_models_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(memory: float, **widths: int) -> Room:
        properties = type("Properties", (), {"total_memory": int(memory)})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        model: Any = Gpu(small_model("llama"))
        for key, value in widths.items():
            setattr(model.config, key, value)
        return choices.room(model)

    llama3 = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128}
    llama3 |= {"num_attention_heads": 32, "num_key_value_heads": 8}
    a40, h100 = on(48e9, **llama3), on(80e9, **llama3)
    assert a40 == Room(2**15, 2**15)
    assert a40.read * 2 * (8 * 4096 + 4 * 14336) < 8e9
    assert a40.seen * 2 * 2 * 8 * 128 * 32 < 8e9
    assert h100.seen == 2 * a40.seen
    assert on(24e9, **llama3).read < a40.read
    assert on(10e9, **llama3) == Room(1, 1)  # where the weights do not fit, either


def test_a_task_is_read_as_its_size_says_and_not_as_those_before_it(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many short choices are more tokens together than one long sequence, which alone may pass a window."""
    short, many, long = (([[5] * tokens], [[[6] * 10] * number]) for tokens, number in ((20, 2), (20, 8), (60, 2)))
    ways: list[int] = []

    def two_at_a_time(
        _: HuggingFaceChat, prompts: list[Ids], answers: list[list[Ids]]
    ) -> list[list[tuple[float, bool]]]:
        ways.append(choices.size(prompts, answers, choices.parts(prompts)).row)
        return []

    monkeypatch.setattr(choices, "is_exact", lambda _, how, *task: choices.size(*task).row <= 75)
    monkeypatch.setattr(HuggingFaceChat, "scores_of", two_at_a_time)
    model, tokenizer = load(tiny_model_folder, torch.float32), AutoTokenizer.from_pretrained(tiny_model_folder)
    for order in itertools.permutations([short, many, long]):
        chat = HuggingFaceChat(model, tokenizer, 0, 8)
        ways.clear()
        for task in order:
            chat.choices_of(*task)
        assert sorted(ways) == [78, 92]


def test_a_model_without_a_shared_row_is_not_read_side_by_side(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where a larger task, of a shorter pair, was."""
    monkeypatch.setattr(chat_models, "choose_forward", lambda _, pairs: Forward(shared=sum(map(len, pairs[0])) < 80))
    model, tokenizer = load(tiny_model_folder, torch.float32), AutoTokenizer.from_pretrained(tiny_model_folder)
    chat = HuggingFaceChat(model, tokenizer, 0, 8)
    larger, longer = ([[5] * 40], [[[6], [6] * 60, [6]]]), ([[5] * 35], [[[6] * 25, [6] * 25]])
    read: list[int] = []
    scores = choices.scores

    def counted(*arguments: Any) -> Any:
        read.append(len(arguments[2][0]))
        return scores(*arguments)

    monkeypatch.setattr(choices, "scores", counted)
    for task in (larger, longer):
        for ours, theirs in zip(chat.choices_of(*task)[0], alone(model, *task)[0], strict=True):
            assert ours[0] == pytest.approx(theirs[0], abs=1e-4)
    assert set(read) == {40}


@pytest.mark.parametrize("seed", range(20))
def test_what_is_tried_has_the_size_of_all(seed: int) -> None:
    """The longest beginning is kept in it, the longest choice read and the widest row, whatever else the prompts are."""
    draw = random.Random(seed)

    def some(count: int) -> Ids:
        return [draw.randrange(3, 120) for _ in range(count)]

    beginnings = [some(draw.randrange(33, 80)) for _ in range(3)]
    prompts = [some(draw.randrange(1, 90)) for _ in range(draw.randrange(40))]
    prompts += [[*draw.choice(beginnings), *some(draw.randrange(1, 90))] for _ in range(draw.randrange(2, 40))]
    draw.shuffle(prompts)
    answers = [[some(draw.randrange(1, 9)) for _ in range(draw.randrange(1, 5))] for _ in prompts]
    parts = choices.parts(prompts)
    asked, whole = choices.few(prompts, answers, parts), choices.size(prompts, answers, parts)
    numbers = [i for part in asked for i in part.members]
    assert choices.size([prompts[i] for i in numbers], [answers[i] for i in numbers], asked) == whole
    assert len(numbers) == len(set(numbers)) <= 9
    for part in asked:
        assert common_length([prompts[i] for i in part.members]) >= part.beginning


def test_only_the_questions_that_are_asked_are_scored() -> None:
    model, (prompts, answers) = small_model("llama"), asked()
    whole = dict(choices.scores(model, Forward(), prompts, answers, choices.parts(prompts)))
    some = dict(choices.scores(model, Forward(), prompts, answers, [Part(50, [1, 4]), Part(0, [7])]))
    assert some.keys() == {1, 4, 7}
    for i, found in some.items():
        assert [total for total, _ in found] == pytest.approx([total for total, _ in whole[i]], abs=1e-4)


def test_a_difference_that_is_no_number_is_infinite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "logits_alone", lambda forward, ids, count: torch.full((count, 128), math.nan))
    assert choices.difference(small_model("llama"), Forward(), *asked(), choices.parts(asked()[0])) == math.inf
