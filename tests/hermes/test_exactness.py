"""The forward is chosen by trying it on the first layers of a model folder, and said where it is the slow one or none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hermes.console import UserError
from hermes.training import exactness
from hermes.training.exactness import choose_forward, few, shallow_config
from hermes.training.shared_prefix import Forward
from tests.hermes.test_architectures import small_config, small_model, some_pairs


def save(name: str, folder: Path, **changes: Any) -> Path:
    config = small_config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "layers", "needed"),
    [("llama", 4, 1), ("gemma2", 4, 2), ("smollm3", 4, 4), ("gpt_oss", 4, 2), ("jamba", 8, 5)],
)
def test_as_many_first_layers_are_tried_as_hold_every_kind(name: str, layers: int, needed: int, tmp_path: Path) -> None:
    """SmolLM3 leaves out the positions in each fourth layer; Jamba's fifth is its first with attention."""
    folder = tmp_path / "model"
    small = small_config(name)
    small.num_hidden_layers = layers
    AutoModelForCausalLM.from_config(small).save_pretrained(folder)
    assert shallow_config(folder).num_hidden_layers == needed


def test_the_longest_pair_is_tried_the_shortest_and_the_first() -> None:
    pairs = [([1] * n, [2], [3]) for n in (5, 9, 2, 7)]
    assert [len(prompt) for prompt, _, _ in few(pairs)] == [9, 2, 5]
    assert few(pairs[:1]) == pairs[:1]


def test_an_exact_model_shares_its_prompts_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_forward(save("gemma2", tmp_path / "model"), some_pairs()) == Forward(True, 1.0, 3.0)
    assert "computed alone" not in capsys.readouterr().err


def test_a_model_with_a_state_is_computed_an_answer_at_a_time_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert choose_forward(save("mamba", tmp_path / "model"), some_pairs()) == Forward(shared=False)
    assert "every answer is computed alone, which is slower" in capsys.readouterr().err


def test_a_model_that_looks_ahead_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="cannot be trained here; it looks at the tokens that it is to predict"
    ) as error:
        choose_forward(save("roberta", tmp_path / "model"), some_pairs())
    assert "\n" not in str(error.value)


def test_a_fast_forward_that_is_wrong_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it forgets the window: what the check is there for."""
    model, pairs = small_model("mistral"), some_pairs()
    assert exactness.find_forward(model, pairs)[0].shared
    monkeypatch.setattr("hermes.training.packing.Block.under", lambda self, rule, positions: self)
    how, why = exactness.find_forward(small_model("mistral"), pairs)
    assert not how.shared
    assert "nats a token off" in why
