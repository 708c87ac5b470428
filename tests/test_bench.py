"""The measurements against other libraries: both sides do the same work, and ratios, fits and tables say what was measured."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import bench, sides, suites
from hermes.artifacts import write_parquet
from hermes.data.chat_text import answer_ids, prompt_ids
from hermes.training.packing import IGNORED, pack_pairs
from stages.tokenize import schema

ROOT = Path(__file__).parent.parent
QUESTIONS = ("Tell me about kites.", "What is salt?", "Hi", "Name a river.", "Why is it dark?", "Who is that?")


@pytest.fixture
def tiny_sides(byte_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The sides on the tiny model and six pairs of training tokens."""
    tokenizer = AutoTokenizer.from_pretrained(byte_model_folder)
    rows = [
        {
            "prompt_ids": prompt_ids(tokenizer, question),
            "chosen_ids": answer_ids(tokenizer, question, "It is fine, " + question),
            "rejected_ids": answer_ids(tokenizer, question, "No."),
        }
        for question in QUESTIONS
    ]
    write_parquet(tmp_path / "train.parquet", pa.Table.from_pylist(rows, schema=schema()))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # which the sides take from the profile
    monkeypatch.setattr(sides, "TOKENS", tmp_path)
    monkeypatch.setattr(sides, "BASE", byte_model_folder)
    return rows


def test_both_training_sides_see_the_same_pairs(tiny_sides: list[dict[str, Any]]) -> None:
    ours = sides.train_ours(mix="embedded", pairs=4)
    stock = sides.train_trl(mix="embedded", pairs=4, quantized=True, checkpointing=True, precompute=False, batch_size=8)
    precomputed = sides.train_trl(
        mix="embedded", pairs=4, quantized=False, checkpointing=False, precompute=True, batch_size=2
    )
    torch.use_deterministic_algorithms(False)
    expected = sides.tokens(sides.embedded_pairs(4), batch=8)["answers"]
    assert ours["answers"] == stock["answers"] == precomputed["answers"] == expected  # counted in what each trains on
    assert ours["pairs"] == 4
    assert min(ours["train"], ours["reference"], stock["train"], precomputed["reference"]) > 0
    assert stock["reference"] == 0


def test_the_token_count_is_that_of_the_row_that_is_computed(tiny_sides: list[dict[str, Any]]) -> None:
    batch = sides.DataCollatorForPreference(pad_token_id=0)([dict(row) for row in tiny_sides])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
    packed = pack_pairs(batch["input_ids"], batch["attention_mask"], labels)
    counted = sides.tokens(tiny_sides, batch=8)
    assert counted["unique_tokens"] == packed.input_ids.size(1)
    assert counted["answers"] == len(packed.labels)


def test_hermes_lengths_are_those_of_the_published_data(tiny_sides: list[dict[str, Any]]) -> None:
    pairs = sides.hermes_pairs(400)
    mean = {name: sum(len(pair[name]) for pair in pairs) / 400 for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    assert 90 < mean["prompt_ids"] < 130
    assert 120 < mean["chosen_ids"] < 170
    assert pairs == sides.hermes_pairs(400)


@pytest.mark.parametrize("quadratic", [0.0, 1e-6])
def test_the_scaling_fit_finds_a_cost_that_is_not_linear(monkeypatch: pytest.MonkeyPatch, quadratic: float) -> None:
    def measure(side: str, prompt: int, answer: int, pairs: int, repetitions: int) -> dict[str, Any]:
        unique = pairs * (prompt + 2 * answer)
        attended = pairs * (prompt**2 / 2 + 2 * answer * prompt + answer**2)
        seconds = 1e-3 * unique + 4e-4 * pairs * 2 * answer + 1e-6 * attended + quadratic * unique**2
        return {"unique_tokens": unique, "answers": pairs * 2 * answer, "pairs": pairs, "seconds": seconds}

    monkeypatch.setattr(bench, "measure", measure)
    fit, cells = bench.measure_scaling(1)
    assert len(cells) == len(fit) == len(bench.ANSWERS) * len(bench.SHARES) * len(bench.TOTALS)
    if quadratic:
        assert min(fit) < 0.8 or max(fit) > 1.2
    else:
        assert fit == pytest.approx([1.0] * len(fit))


def test_ratios_are_taken_within_a_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = iter([1.0, 2.0])  # the machine slows down between repetitions

    def measure(side: str, **arguments: Any) -> dict[str, Any]:
        if side == "train_ours":
            measure.slowness = next(speed)  # type: ignore[attr-defined]
        slowness = getattr(measure, "slowness", 1.0)
        if side == "matrix_peak":
            return {"peak": 1e6 / slowness, "layers": 1000.0, "head": 500.0}
        seconds = {"train_ours": 2.0, "train_trl": 9.0 if arguments.get("checkpointing") else 6.0}[side] * slowness
        return {
            "reference": slowness,
            "train": seconds,
            "unique_tokens": 100,
            "answers": 40,
            "peak_rss": 10**9,
            "pairs": 8,
        }

    monkeypatch.setattr(bench, "measure", measure)
    ratios, _ = bench.compare_training("embedded", 8, 2, bench.OTHERS)
    assert ratios["train.vs_trl"] == [10 / 3, 10 / 3]
    assert ratios["train.vs_trl_best"] == [7 / 3, 7 / 3]
    assert ratios["sweep.vs_trl"] == [50 / 11, 50 / 11]
    assert ratios["train.of_peak"] == [pytest.approx(2 * (100 * 1000 + 40 * 500) / 2.0 / 1e6)] * 2


def test_a_side_that_fails_is_said_in_one_line() -> None:
    with pytest.raises(bench.UserError, match=r"train_trl: .*nonsense"):
        bench.measure("train_trl", nonsense=1)


def test_the_table_has_every_number(tmp_path: Path) -> None:
    numbers = {key: {"min": 1.0, "median": 2.0, "max": 3.25} for key in bench.TARGETS}
    found = {
        **numbers,
        "hermes": {"train.vs_trl": {"min": 4.0, "median": 5.0, "max": 6.0}},
        "full": True,
        "repetitions": 3,
        "cpu": "a processor",
        "threads": 2,
        "versions": {"torch": "1"},
        "best": {"embedded": {"quantized": False}},
        "scaling_cells": [
            {"answer": 16, "share": 0.5, "pairs": 4, "seconds": 2.0, "unique_tokens": 1000, "peak_rss": 3 * 10**9}
        ],
    }
    bench.write_markdown(json.loads(json.dumps(found)), tmp_path / "bench.md")
    text = (tmp_path / "bench.md").read_text()
    for key in bench.TARGETS:
        assert f"| {key} |" in text
    assert text.count("| 2 | 1 | 3.25 |") == len(bench.TARGETS)
    assert "| 5 | 4 | 6 |" in text
    assert "| 16 | 50% | 1,000 | 2.00 | 2.00 | 3,000 |" in text


@pytest.mark.parametrize("shape", ["shared", "unshared", "generation"])
def test_both_sides_of_a_suite_answer_alike(
    shape: Any, byte_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"question": f"{question} {n}", "chosen": f"It is {n}.", "rejected": f"No, {n}"}
        for n, question in enumerate(QUESTIONS)
    ]
    write_parquet(tmp_path / "data/subset/test.parquet", pa.Table.from_pylist(rows))
    monkeypatch.setattr(suites, "ROOT", tmp_path)
    monkeypatch.setattr(suites, "BASE", byte_model_folder)
    monkeypatch.setattr(suites, "WRITTEN", suites.WRITTEN | {"max_gen_toks": 6})
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    ours, theirs = suites.suites_ours(shape, 3), suites.suites_hf(shape, 3)
    assert ours["answers"] == theirs["answers"]
    assert ours.get("totals", []) == pytest.approx(theirs.get("totals", []), abs=1e-3)
    assert len(ours["answers"]) == 3
    assert min(ours["seconds"], theirs["seconds"]) > 0


def test_the_rows_of_suites_are_measured_alone_into_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def measured(side: str, shape: str, questions: int) -> dict[str, Any]:
        asked.append(shape)
        second = asked.count("generation") == 3  # of our side's repetitions, which differs in one answer
        answers = [int(second), *[0] * (questions - 1)]
        return {"seconds": 1.0 if side == "suites_ours" else 4.0, "peak_rss": 1, "answers": answers}

    monkeypatch.setattr(bench, "REPORTS", ROOT / "reports")
    monkeypatch.setattr(bench, "measure", measured)
    before = json.loads((ROOT / "reports/bench.json").read_text())
    found = bench.suites_alone()
    for shape in ("shared", "unshared", "generation"):
        assert found[f"evaluate.suites_vs_hf.{shape}"] == {"median": 4.0, "min": 4.0, "max": 4.0}
    assert found["train.vs_trl"] == before["train.vs_trl"]
    bench.write_markdown(found, tmp_path / "bench.md")
    text = (tmp_path / "bench.md").read_text()
    assert "The rows evaluate.suites_vs_hf were measured alone, on " in text
    assert "answer alike: 24 of 24 in shared, 12 of 12 in unshared, 63 of 64 in generation.\n" in text
