"""GGUF files in process and the stages around them, against Transformers on the same tiny weights."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from gguf.quants import quantize as quantize_array
from transformers import AutoTokenizer

from hermes.console import UserError
from hermes.data.chat_text import answer_ids, prompt_ids
from hermes.evaluation.chat_models import ChatModel, GgufChat, HuggingFaceChat
from hermes.model import gguf_files
from hermes.model.base import load
from hermes.model.gguf import GgufModel
from stages import evaluate, merge, quantize

QUESTIONS = (
    "Tell me about kites.",
    "What is salt?",
    "Describe a very long river to a friend, please, in some detail.",
    "Hi",
)


@pytest.fixture(scope="module")
def prompts(tiny_model_folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    return [prompt_ids(tokenizer, question) for question in QUESTIONS]


def test_f16_distributions_are_those_of_the_float32_model(
    gguf_file: Path, tiny_model_folder: Path, prompts: list[list[int]]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    answers = [answer_ids(tokenizer, question, "It is fine, 123.") for question in QUESTIONS]
    reference = HuggingFaceChat(load(tiny_model_folder, torch.float32), tokenizer, 8, 4)
    with GgufModel(gguf_file, threads=1, slots=4, context=128) as model:
        ours = GgufChat(model, tokenizer, 8)
        found = [row for (row,) in ours.answer_logits(prompts, [[a] for a in answers])]
    expected = [row for (row,) in reference.answer_logits(prompts, [[a] for a in answers])]
    assert evaluate.divergence(zip(expected, found, strict=True))["mean_kl"] < 1e-3
    assert evaluate.divergence((a, b.roll(1, dims=0)) for a, b in zip(expected, found, strict=True))["mean_kl"] > 1e-3


@pytest.mark.parametrize("backend", ["gguf", "transformers"])
def test_answers_scored_together_score_as_a_plain_forward_of_each(
    backend: str, gguf_file: Path, tiny_model_folder: Path, prompts: list[list[int]]
) -> None:
    answers = [[[5, 6, 7, 8], [9], [10, 11]], [[12], [13], [21]], [[14], [15, 16, 17]], [[18, 19, 20]]]
    reference = load(tiny_model_folder, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    requests = [
        (("", ""), prompt, answer) for prompt, choices in zip(prompts, answers, strict=True) for answer in choices
    ]
    with GgufModel(gguf_file, threads=1, slots=9, context=128, share_beginning=True) as model:
        ours: ChatModel = GgufChat(model, tokenizer, 8)
        if backend == "transformers":
            ours = HuggingFaceChat(reference, tokenizer, 8, batch_size=4)
        found = ours.answer_logits(prompts, answers)
        scores = ours._loglikelihood_tokens(requests)
    expected = []
    for _, prompt, answer in requests:
        with torch.no_grad():
            expected.append(reference(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1])
    tolerance = 1e-4 if backend == "transformers" else 5e-3  # float16 weights
    for left, right in zip([row for rows in found for row in rows], expected, strict=True):
        torch.testing.assert_close(left, right, atol=tolerance, rtol=0)
    for (log_likelihood, greedy), logits, (_, _, answer) in zip(scores, expected, requests, strict=True):
        wanted = logits.log_softmax(dim=-1)[range(len(answer)), answer].sum()
        assert log_likelihood == pytest.approx(float(wanted), abs=10 * tolerance)
        assert greedy == (logits.argmax(dim=-1).tolist() == answer)


def test_prompts_scored_together_are_bounded_by_tokens_and_by_slots(gguf_file: Path, tiny_model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    prompts, answers = [[1] * 300, [1] * 200, [1] * 2000, [1] * 250], [[[2] * 100] * 2] * 4
    different = [[3 + i, *prompt[1:]] for i, prompt in enumerate(prompts)]
    with GgufModel(gguf_file, threads=1, slots=6, context=16) as model:
        chat = GgufChat(model, tokenizer, 8)
        chat.tokens_together = 1024
        assert chat.batches(different, answers) == [[1, 3], [0], [2]]
        assert chat.batches(prompts, answers) == [[1, 3, 0], [2]]  # 200 tokens are common, and count once a batch
        assert chat.batches([[1]] * 4, [[[2]] * 2] * 4) == [[0, 1, 2], [3]]


@pytest.mark.parametrize("share_beginning", [False, True])
def test_parallel_greedy_answers_are_those_of_one_at_a_time_and_of_transformers(
    share_beginning: bool, gguf_file: Path, tiny_model_folder: Path, prompts: list[list[int]]
) -> None:
    many = prompts * 3
    with GgufModel(gguf_file, threads=1, slots=5, context=128, share_beginning=share_beginning) as model:
        parallel = model.generate(many, 12)
    with GgufModel(gguf_file, threads=1, slots=1, context=128) as model:
        single = model.generate(many, 12)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    reference = HuggingFaceChat(load(tiny_model_folder, torch.float32), tokenizer, 12, batch_size=4).generate(many)
    assert parallel == single
    same = sum(left[:3] == right[:3] for left, right in zip(parallel, reference, strict=True))
    assert same >= 0.75 * len(many)  # float16 against float32 may part at a near tie


def test_samples_of_a_prompt_use_its_cache_and_stop_at_the_limit(gguf_file: Path, prompts: list[list[int]]) -> None:
    with GgufModel(gguf_file, threads=1, slots=4, context=128) as model:
        answers = model.generate(prompts, 6, samples=[3, 1, 2, 4])
        expected = model.generate(prompts, 6)
    assert answers == [answer for answer, count in zip(expected, [3, 1, 2, 4], strict=True) for _ in range(count)]
    assert all(len(answer) <= 6 for answer in answers)


def test_a_prompt_that_does_not_fit_is_refused(gguf_file: Path, prompts: list[list[int]]) -> None:
    with (
        GgufModel(gguf_file, threads=1, context=40) as model,
        pytest.raises(ValueError, match="do not fit a context of 40"),
    ):
        model.generate(prompts, 30)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all" * 100])
def test_a_damaged_gguf_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.gguf: llama\.cpp cannot load it"):
        GgufModel(path, threads=1)


def test_a_truncated_gguf_is_one_line(tmp_path: Path, gguf_file: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(gguf_file.read_bytes()[:-100_000])
    with pytest.raises(UserError, match=r"cut\.gguf"):
        GgufModel(path, threads=1)


@pytest.fixture(scope="module")
def read_gguf(gguf_file: Path) -> GGUFReader:
    return GGUFReader(gguf_file)


def test_tensors_whose_rows_do_not_fit_are_counted_as_fallback(
    gguf_file: Path, read_gguf: GGUFReader, tmp_path: Path
) -> None:
    path = tmp_path / "q.gguf"
    gguf_files.quantize(gguf_file, path, "Q4_K_M")
    reader = GGUFReader(path)
    found, f16 = quantize.describe(path, reader, "Q4_K_M"), quantize.describe(gguf_file, read_gguf, "f16")
    assert found["fallback"] == sum(found["matrices_by_type"].values()) > 0  # rows of 64 and 128 never divide by 256
    assert f16["fallback"] == 0
    assert quantize.weight_change(read_gguf, read_gguf) == {"weight_error": 0.0, "weight_stretch": 0.0}
    change = quantize.weight_change(reader, read_gguf)
    assert 0.002 < change["weight_error"] < 0.1  # a Q8_0 matrix of normal weights has some 0.5 %, a Q5_0 one some 4 %
    assert abs(change["weight_stretch"]) < change["weight_error"] / 4
    assert abs(f16["bits_per_weight"] - 16) < 0.2


def test_a_gguf_of_another_tokenizer_is_refused(
    gguf_file: Path, read_gguf: GGUFReader, tiny_model_folder: Path
) -> None:
    tokenizer, found = AutoTokenizer.from_pretrained(tiny_model_folder), gguf_files.metadata(read_gguf)
    gguf_files.check_vocabulary(gguf_file, found, tokenizer)
    tokenizer.chat_template += "x"
    with pytest.raises(UserError, match="template is"):
        gguf_files.check_vocabulary(gguf_file, found, tokenizer)


def test_a_merged_model_that_lost_its_template_is_refused(tmp_path: Path, tiny_model_folder: Path) -> None:
    copied = tmp_path / "merged"
    shutil.copytree(tiny_model_folder, copied)
    merge.check_companions(tiny_model_folder, copied)
    (copied / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(UserError, match="its chat template differs"):
        merge.check_companions(tiny_model_folder, copied)


def test_q5_1_stretches_weights_that_were_q4_1_before() -> None:
    """Why Q5_K_M, whose rows of 576 fall back to Q5_1, is farther from the merged model than Q4_K_M with its Q5_0.

    The embedded base was published as Q4_1: 16 levels from the least to the largest weight of a block. Q5_1 lays 32 levels over
    the same range, 31/15 of theirs a step, so that all below the middle round down and all above it round up.
    """

    def requantized(weights: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
        return np.asarray(dequantize(quantize_array(weights, kind), kind))

    def stretch(weights: np.ndarray, kind: GGMLQuantizationType) -> float:
        return float(((requantized(weights, kind) - weights) * weights).sum() / (weights**2).sum())

    gaussian = np.random.default_rng(0).standard_normal((64, 576)).astype(np.float32)
    published = requantized(gaussian, GGMLQuantizationType.Q4_1)
    assert abs(stretch(gaussian, GGMLQuantizationType.Q5_1)) < 1e-3
    assert abs(stretch(published, GGMLQuantizationType.Q5_0)) < 1e-3
    assert 0.015 < stretch(published, GGMLQuantizationType.Q5_1) < 0.025
