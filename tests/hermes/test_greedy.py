"""Greedy answers of many prompts at once are those of one at a time, and the cache's room changes no bit of them."""

import itertools
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer

from hermes.data.prefixes import common_length
from hermes.evaluation import chat_models, greedy
from hermes.evaluation.chat_models import HuggingFaceChat
from hermes.evaluation.choices import Room
from hermes.evaluation.greedy import (
    ROOM,
    RoomyLayer,
    answer_alone,
    greedy_answers,
    is_exact,
    roomy_cache,
    takes_rows,
    tried,
)
from hermes.model.base import load
from tests.hermes.test_architectures import EXPECTED as TRAINED
from tests.hermes.test_architectures import PAGE, small_model

SIZES: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PLAIN: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "gemma2, every second layer a window": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 8, "sliding_window": 16}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4, "head_dim": 8}),
    "deepseek, values of another size": (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        {"num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "kv_lora_rank": 8}
        | {"q_lora_rank": 8, "first_k_dense_replace": 2, "n_routed_experts": 8, "n_group": 2, "topk_group": 1},
    ),
}
# docs/bring-a-model.md says how every architecture answers, which is what is expected here.
ROW = re.compile(r"^\| (in batches|one prompt at a time) \| (.*) \|$", re.MULTILINE)
EXPECTED = {name: how for how, names in ROW.findall(PAGE.read_text()) for name in re.findall(r"`([^`]+)`", names)}
FAMILIES = ["llama", "mistral", "gemma2", "gpt_oss", "bloom", "lfm2", "qwen3_next", "mamba", "moshi"]
# Latent attention, whose published models have as many heads of keys as of queries.
LATENT = {name: {"num_key_value_heads": 4} for name in ("axk1", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu")}


def answered(model: PreTrainedModel, prompts: list[list[int]]) -> tuple[list[list[int]], list[torch.Tensor]]:
    """The greedy answers, and the logits of every step; every 250th token ends an answer, whatever it is."""
    logits: list[torch.Tensor] = []
    tokens = itertools.count(1)
    hook = model.get_output_embeddings().register_forward_hook(lambda *parts: logits.append(parts[2].clone()))
    with torch.inference_mode():
        answers = greedy_answers(model, prompts, {7}, ROOM + 30, lambda answer: next(tokens) % 250 == 0)
    hook.remove()
    return answers, logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", PLAIN)
def test_the_room_of_the_cache_changes_no_bit(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config, architecture, special = PLAIN[family]
    model = architecture(config(initializer_range=0.4, **SIZES | special)).to(dtype).eval()
    roomy = [type(layer) is RoomyLayer for layer in roomy_cache(model).layers]
    assert roomy == ([False, True] if config is Gemma2Config else [True, True])
    assert takes_rows(model, roomy_cache(model))
    beginning = torch.randint(53, (4,)).tolist()
    prompts = [beginning + torch.randint(53, (1 + i % 12,)).tolist() for i in range(30)]
    found, logits = answered(model, prompts)
    monkeypatch.setattr(greedy, "RoomyLayer", DynamicLayer)
    expected, slow = answered(model, prompts)
    assert found == expected
    assert len(logits) == len(slow) > ROOM + 2
    assert all(torch.equal(left, right) for left, right in zip(logits, slow, strict=True))
    assert len({len(step) for step in logits}) > 3  # rows left the batch


@pytest.mark.parametrize("family", PLAIN)
def test_answers_do_not_depend_on_how_many_prompts_are_read_at_once(family: str) -> None:
    """With and without a beginning that is kept; some prompts are longer than gemma2's window."""
    torch.manual_seed(0)
    config, architecture, special = PLAIN[family]
    model = architecture(config(initializer_range=0.4, **SIZES | special)).eval()
    rest = [torch.randint(53, (1 + 3 * i,)).tolist() for i in range(9)]
    for prompts in (rest, [[5, 40, 8, 11, *own] for own in rest]):
        found: dict[int, list[torch.Tensor]] = {}
        answers = {}
        with torch.inference_mode():
            for together in (1, 4, 9):
                steps = found[together] = []

                def heard(_: list[int], logits: torch.Tensor, steps: list[torch.Tensor] = steps) -> None:
                    steps.append(logits)

                answers[together] = greedy_answers(model, prompts, {7}, 20, None, heard, together)
        assert answers[1] == answers[4] == answers[9]
        for few, all_at_once in zip(found[1] + found[4], found[9] + found[9], strict=True):
            torch.testing.assert_close(few, all_at_once, atol=1e-4, rtol=0)


def test_no_more_prompts_are_read_at_once_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy, "room", lambda model: Room(100, 1000))
    model, shapes = small_model("llama"), []
    model.model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(given["input_ids"].shape), with_kwargs=True
    )
    with torch.inference_mode():
        greedy_answers(model, [[3 + i] * (21 + i) for i in range(9)], {2}, 2)
        greedy_answers(model, [[3] * 120, [4] * 110], {2}, 1)  # one at least
    # A forward is as wide as its own longest prompt.
    assert shapes == [(3, 23), (3, 26), (3, 29), (9, 1), (1, 120), (1, 110)]


def ragged(seed: int) -> list[list[int]]:
    """Prompts of many lengths with a common beginning; some pass a window of 8 tokens."""
    draw = random.Random(seed)
    beginning = [draw.randrange(3, 128) for _ in range(4)]
    return [beginning + [draw.randrange(3, 128) for _ in range(n)] for n in (3, 11, 1, 18, 7)]


def check(name: str, folder: Path) -> str:
    """The verdict on a model type. What is said to be exact gives other prompts the answers of reading all anew."""
    model = small_model(name, **LATENT.get(name, {}))
    model.save_pretrained(folder)
    if not is_exact(folder, model, ragged(0), 12):
        return "one prompt at a time"
    prompts = ragged(1)
    with torch.inference_mode():
        for asked in (prompts, [prompt[i:] for i, prompt in enumerate(prompts)]):
            assert greedy_answers(model, asked, {2}, 12) == [answer_alone(model, prompt, {2}, 12) for prompt in asked]
    return "in batches"


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_of_a_ragged_batch_are_those_of_reading_all_anew(name: str, tmp_path: Path) -> None:
    """Windows of 8 tokens, and states that run on from token to token: what padding or a kept beginning could reach."""
    assert check(name, tmp_path) == EXPECTED[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EXPECTED.keys() - set(FAMILIES)))
def test_every_other_architecture(name: str, tmp_path: Path) -> None:
    assert check(name, tmp_path) == EXPECTED[name]


def test_a_model_that_differs_in_a_batch_answers_one_prompt_at_a_time(
    tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_model("moshi")
    model.save_pretrained(tmp_path)
    chat = HuggingFaceChat(load(tmp_path, torch.float32), AutoTokenizer.from_pretrained(tiny_model_folder), 12, 5)
    with torch.inference_mode():
        expected = [answer_alone(model, prompt, chat.ends, 12) for prompt in ragged(2)]
        assert greedy_answers(model, ragged(2), chat.ends, 12) != expected  # what the check is for
    for _ in range(2):
        assert chat.generate(ragged(2)) == expected
    said = capsys.readouterr().err
    assert said.count("one at a time and not in batches (log-probabilities would be up to") == 1


def test_a_window_that_only_a_long_answer_passes_is_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model("moshi", sliding_window=100)
    model.save_pretrained(tmp_path)
    assert is_exact(tmp_path, model, [[5] * 20, [6] * 9], 60)
    assert not is_exact(tmp_path, model, [[5] * 20, [6] * 9], 120)
    assert "one at a time" in capsys.readouterr().err


@pytest.mark.parametrize(("prompts", "limit"), [([[5]], 1), ([[5], [6]], 3), ([[0, 0]], 1), ([[7] * 3] * 4, 200)])
def test_what_is_tried_has_a_beginning_once_and_reaches_the_last_token(prompts: list[list[int]], limit: int) -> None:
    (with_one, without), steps = tried(prompts, limit)
    assert max(map(len, with_one)) + steps == max(map(len, prompts)) + limit
    assert max(map(len, without)) == max(map(len, with_one))
    assert 1 <= steps <= ROOM + 6
    assert common_length(without) == 0
    assert common_length(with_one) == min(map(len, with_one))
    if limit > 100:
        assert len({len(prompt) for prompt in with_one}) == 3


def test_batches_are_tried_again_where_more_tokens_come_than_were_tried(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is shorter than what was exact is not tried again, and neither is what is longer than what was not."""
    asked: list[int] = []

    def within_window(folder: Path, model: PreTrainedModel, prompts: list[list[int]], limit: int) -> bool:
        asked.append(max(map(len, prompts)) + limit)
        return is_exact(folder, model, prompts, limit) and asked[-1] <= 40

    monkeypatch.setattr(greedy, "is_exact", within_window)
    model = load(tiny_model_folder, torch.float32)
    chat = HuggingFaceChat(model, AutoTokenizer.from_pretrained(tiny_model_folder), 10, 5)
    ways: list[int] = []

    def batched(model: PreTrainedModel, prompts: list[list[int]], *settings: Any) -> list[list[int]]:
        ways.append(len(prompts))
        return greedy_answers(model, prompts, *settings)

    monkeypatch.setattr(chat_models, "greedy_answers", batched)
    for length, limit, in_batches in (
        (20, 10, True),
        (10, 10, True),
        (20, 15, True),
        (40, 10, False),
        (45, 10, False),
        (5, 5, True),
    ):
        chat.max_new_tokens, prompts = limit, [[5] * length, [6] * 3]
        ways.clear()
        found = chat.generate(prompts)
        assert ways == ([2] if in_batches else [])
        with torch.inference_mode():
            assert found == [answer_alone(model, prompt, chat.ends, limit) for prompt in prompts]
    assert asked == [30, 35, 50]
    assert chat.generate([]) == []


def test_the_page_has_every_architecture_that_can_be_evaluated() -> None:
    assert EXPECTED.keys() == {name for name, verdict in TRAINED.items() if verdict != "refused"}


def test_a_token_is_written_behind_the_others_and_they_are_not_copied() -> None:
    torch.manual_seed(0)
    roomy, plain = RoomyLayer(), DynamicLayer()

    def both(tokens: int, rows: int) -> None:
        new = torch.randn(rows, 2, tokens, 8), torch.randn(rows, 2, tokens, 8)
        for left, right in zip(roomy.update(*new), plain.update(*new), strict=True):
            assert torch.equal(left, right)

    def selected(rows: list[int]) -> None:
        for layer in (roomy, plain):
            layer.batch_select_indices(torch.tensor(rows))

    both(5, 1)
    for layer in (roomy, plain):
        layer.batch_repeat_interleave(4)
    both(3, 4)
    places = []
    for _ in range(2 * ROOM + 1):
        both(1, 4)
        assert roomy.keys is not None
        places.append(roomy.keys.data_ptr())
    assert [places[i] != places[i - 1] for i in range(1, len(places))].count(True) == 2
    selected([0, 2, 3])
    assert not roomy.held  # what is gone takes no memory
    both(1, 3)
    both(2, 3)  # several at once
    both(1, 3)
    selected([1])
    both(1, 1)
    assert roomy.get_seq_length() == plain.get_seq_length() == 8 + 2 * ROOM + 1 + 5


@pytest.mark.parametrize("beginning", [[], [5, 40, 7, 11]])
def test_batched_greedy_answers_are_those_of_generate(beginning: list[int]) -> None:
    """Ragged prompts whose answers end at different steps, so that the batch shrinks more than once."""
    torch.manual_seed(0)
    config = LlamaConfig(initializer_range=0.4, **SIZES)  # of varied answers
    model, end, limit = LlamaForCausalLM(config).eval(), 7, 40
    prompts = [beginning + torch.randint(53, (1 + i % 12,)).tolist() for i in range(30)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        ones = torch.ones_like(ids)
        output = model.generate(
            ids, attention_mask=ones, do_sample=False, max_new_tokens=limit, eos_token_id=end, pad_token_id=0
        )
        expected.append(output[0, len(prompt) :].tolist())
    ended = [len(answer) for answer in expected if answer[-1] == end]
    assert len(set(ended)) >= 5
    assert any(len(answer) == limit for answer in expected)
    with torch.inference_mode():
        assert greedy_answers(model, prompts, {end}, limit) == expected
