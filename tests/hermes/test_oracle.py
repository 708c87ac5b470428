"""What was found of a fast way: by size, whatever came before, and never by what the machine lacked."""

import itertools
import random
from functools import partial
from pathlib import Path

import pytest

from hermes.evaluation.oracle import Verdicts, agrees


def test_a_verdict_depends_on_the_size_alone() -> None:
    sizes = list(itertools.product((10, 40, 70), (0, 30), (0, 1)))
    exact = {size: size[0] < 50 and size[1:] != (30, 1) for size in sizes}
    draw = random.Random(0)
    for _ in range(50):
        verdicts = Verdicts(slow=False)
        for size in draw.sample(sizes, len(sizes)) + sizes:
            assert verdicts.at(size, partial(exact.__getitem__, size)) == exact[size]


def test_what_is_smaller_than_an_exact_one_is_not_tried_again() -> None:
    verdicts, tried = Verdicts(slow="slow"), []

    def find(size: int) -> str:
        tried.append(size)
        return "fast" if size < 50 else "slow"

    found = [verdicts.at((size,), partial(find, size)) for size in (30, 20, 60, 70, 45, 40, 55)]
    assert found == ["fast", "fast", "slow", "slow", "fast", "fast", "slow"]
    assert tried == [30, 60, 45, 55]


def test_a_difference_is_no_agreement_and_too_little_memory_is_none_either(
    tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert agrees(tiny_model_folder, lambda _: 1e-6, "otherwise")
    assert not agrees(tiny_model_folder, lambda _: 1.0, "one at a time")
    assert (
        "one at a time (log-probabilities would be up to 1 nats a token off), which is slower"
        in capsys.readouterr().err
    )

    def fails(error: Exception) -> float:
        raise error

    assert not agrees(tiny_model_folder, lambda _: fails(ValueError("no such\nmask")), "one at a time")
    assert "one at a time (ValueError: no such mask)" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        agrees(
            tiny_model_folder, lambda _: fails(RuntimeError("DefaultCPUAllocator: can't allocate memory")), "otherwise"
        )
