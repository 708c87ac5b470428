"""A training run that cannot fit is refused, with a change that makes it fit and a smaller one that does not."""

import numpy as np
import pytest

from hermes.model import llama3
from tools import memory_plan
from tools.memory_plan import Lengths, Training, changes, smallest_change
from tools.plan import GPUS, Params, load

LENGTHS = Lengths(np.full(64, 120), np.full(64, 150), np.full(64, 140))


@pytest.fixture
def run() -> Training:
    """The published experiment's, on pairs of one length."""
    loaded: Params = load("a40")
    return Training(llama3.SHAPE, LENGTHS, loaded.base, loaded.train)


def test_the_largest_row_is_one_of_the_epoch() -> None:
    lengths = Lengths(np.array([5, 1, 1, 1]), np.array([9, 2, 2, 2]), np.array([9, 3, 3, 3]))
    assert lengths.tokens.tolist() == [21, 4, 4, 4]
    assert lengths.largest_row(1) == (21, 18)
    assert lengths.largest_row(4) == (33, 33)


def test_the_largest_row_is_found_over_many_orders() -> None:
    lengths = Lengths(*(np.where(np.arange(400) < 2, 1000, 10) for _ in range(3)))
    assert lengths.largest_row(8) == (
        2 * 2998 + 6 * 28,
        2 * 2000 + 6 * 20,
    )  # both long pairs in one row; rare in one order


def test_under_fsdp_the_weights_are_shared_and_the_base_still_loads_whole(run: Training) -> None:
    sharded = run.changed({}, {"distribution": "fsdp", "processes": 4})
    whole, part = run.memory(), sharded.on_gpu()
    assert part.weights == whole.weights // 4
    assert part.activations == whole.activations
    assert part.workspace == whole.workspace + 128_256 * 4096 * 2
    assert run.changed({}, {"processes": 4}).total() == run.total()
    alone = whole.weights + whole.constants
    assert max(alone, part.total) < sharded.total() < run.total()


def test_an_a40_holds_the_published_run_and_half_of_it_does_not(run: Training) -> None:
    assert smallest_change(run, GPUS["A40"].memory) is None
    assert smallest_change(run, run.total()) is None
    assert "no change" in str(smallest_change(run, 4 << 30))


def test_the_change_named_fits_and_none_before_it(run: Training) -> None:
    large = run.changed(
        {"keep_dequantized": True}, {"gradient_checkpointing": False, "batch_size": 32, "accumulation": 1}
    )
    totals = [large.changed(base, train).total() for base, train in changes(large)]
    named = []
    for limit in sorted({*totals, large.total()}, reverse=True):
        first = next((i for i, total in enumerate(totals) if total <= limit), None)
        change = smallest_change(large, limit)
        if limit >= large.total():
            assert change is None
        else:
            assert first is not None
            assert all(total > limit for total in totals[:first])
            assert change is not None
            assert all(key in change for part in list(changes(large))[first] for key in part)
            named.append(change)
    assert "base.keep_dequantized: false" in named
    assert "base.keep_dequantized: false, train.gradient_checkpointing: true" in named
    assert (
        "base.keep_dequantized: false, train.gradient_checkpointing: true, train.batch_size: 1, train.accumulation: 32"
        in named
    )


def test_every_change_leaves_the_pairs_of_a_step(run: Training) -> None:
    odd = run.changed({"quantization": "none"}, {"batch_size": 6, "accumulation": 2, "processes": 2})
    for change in changes(odd):
        settings = odd.changed(*change).train
        assert settings.batch_size * settings.accumulation == 12
        assert settings.accumulation % settings.processes == 0


def test_a_machine_without_a_gpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan.torch.cuda, "is_available", lambda: False)
    assert memory_plan.present_gpu() is None
