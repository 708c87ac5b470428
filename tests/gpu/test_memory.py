"""The memory of training on the device, by component, against the predictions of tools/memory_plan.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from hermes import params
from hermes.model.llama3 import Shape
from stages import train
from tests.gpu.projects import (
    LLAMA_1B,
    LLAMA_8B_GROUP,
    ROUNDING,
    SMALL,
    Found,
    error,
    make_project,
    peak_bytes,
    random_pairs,
    shape_for,
)
from tools.memory_plan import Memory, gibibytes, layer_activations, training_memory, with_overhead

pytestmark = pytest.mark.gpu

WITHIN = 0.15  # of a prediction


def lengths(device: torch.device) -> tuple[int, int]:
    """Tokens of a prompt and of an answer: about the means of Hermes on a GPU."""
    return (120, 150) if device.type == "cuda" else (60, 40)


def build_trainer(loaded: train.Params) -> Any:
    return train.build_trainer(loaded, Path("scratch"), AutoTokenizer.from_pretrained(train.BASE), [])


def test_gradient_checkpointing(
    device: torch.device, found: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient with and without it: the same numbers, less memory; masks of dropout that differ would show."""
    shape, (prompt, answer) = shape_for(device, LLAMA_1B, SMALL), lengths(device)
    rows = random_pairs(shape, 4, prompt, answer)
    make_project(tmp_path, device, shape, rows, batch_size=2, gradient_checkpointing=True)
    monkeypatch.chdir(tmp_path)
    trainer = build_trainer(params.load(train.Params))
    model, batch = trainer.model.train(), next(iter(trainer.get_train_dataloader()))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    gradients, peaks = [], []
    without, with_it = model.gradient_checkpointing_disable, model.gradient_checkpointing_enable
    for switch in (without, without, with_it):
        switch()
        model.zero_grad()
        torch.manual_seed(0)  # of the dropout
        peaks.append(peak_bytes(device, lambda: trainer.compute_loss(model, batch).backward()))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    first, again, recomputed = gradients
    noise, relative = error(again, first), error(recomputed, first)
    found(
        f"off the gradient without it by {relative:.1e}, a second time without it by {noise:.1e}; "
        f"the peak is {gibibytes(peaks[2])} instead of {gibibytes(peaks[1])}",
        error=relative,
        noise=noise,
        with_it=peaks[2],
        without=peaks[1],
    )
    assert relative <= (ROUNDING if device.type == "cuda" else 0.0)
    assert peaks[2] < peaks[1]


def step_peak(shape: Shape, loaded: train.Params, tokens: int, predicted: Memory, cuda: bool) -> int:
    """The most that a step makes and drops, where a plan adds up what comes one after another.

    It is there in the forward's last chunk of logits, or in the backward pass of a layer, which with checkpointing has been computed again.
    """
    checkpointing = loaded.train.gradient_checkpointing
    again = layer_activations(shape, loaded.base, loaded.train, tokens, cuda) if checkpointing else 0
    forward = predicted.activations - again + predicted.logits
    return max(forward, predicted.activations + predicted.workspace)


def held(tensors: list[torch.Tensor]) -> int:
    """Bytes of the storages behind tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize(
    ("on_gpu", "on_cpu"), [(LLAMA_1B, SMALL), (LLAMA_8B_GROUP, None)], ids=["1.2 billion weights", "4 layers of 8B"]
)
def test_memory(
    on_gpu: Shape,
    on_cpu: Shape | None,
    device: torch.device,
    found: Found,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two steps of the profile's training, with AdamW that torch's allocator sees, against the plan.

    And what the driver counts, CUDA's context and lost blocks included, against what a plan says with all of them.
    """
    is_gpu = device.type == "cuda"
    shape = on_gpu if is_gpu else on_cpu
    free = torch.cuda.mem_get_info()[0] if is_gpu else 0
    if shape is None or (is_gpu and free < 12 * 2**30):
        pytest.skip(f"needs 12 GiB of GPU memory, {gibibytes(free)} are free")
    pairs, (prompt, answer) = (4 if is_gpu else 1), lengths(device)
    rows = random_pairs(shape, 2 * pairs, prompt, answer)  # two forwards, so that the second finds gradients
    dtype = "bfloat16" if is_gpu else "float32"  # whose products make no copies on any CPU
    settings: dict[str, Any] = {"batch_size": pairs, "accumulation": 2, "max_steps": 2, "optimizer": "adamw_torch"}
    make_project(tmp_path, device, shape, rows, dtype, **settings)
    monkeypatch.chdir(tmp_path)
    loaded = params.load(train.Params)
    trainer = build_trainer(loaded)
    parameters = list(trainer.model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    peak = peak_bytes(device, trainer.train)
    states = [state for p in parameters if (state := getattr(p, "quant_state", None)) is not None]
    sizes = {
        "weights": held([parameter for parameter in parameters if not parameter.requires_grad]),
        "constants": held([s.absmax for s in states] + [s.state2.absmax for s in states if s.nested]),
        "adapter": held(trained),
        "optimizer": held([t for state in trainer.optimizer.state.values() for t in state.values() if t.ndim]),
    }
    tokens = pairs * (prompt + 2 * answer - 2)
    predicted = training_memory(shape, loaded.base, loaded.train, tokens, 2 * pairs * answer, is_gpu)
    expected = {key: getattr(predicted, key) for key in sizes}
    sizes["the step's own"] = peak - sizes["optimizer"] - predicted.gradients
    expected["the step's own"] = step_peak(shape, loaded, tokens, predicted, is_gpu)
    for each in (sizes, expected):
        each["all"] = sum(each.values()) + predicted.gradients
    if is_gpu:
        left, total = torch.cuda.mem_get_info()
        sizes["by the driver"], expected["by the driver"] = total - left, with_overhead(predicted)
    off = {key: sizes[key] / expected[key] - 1 for key in sizes}
    found(", ".join(f"{key} {sizes[key] / 2**20:,.1f} MiB ({share:+.0%})" for key, share in off.items()), **sizes)
    # What is kept is freed bit by bit as the backward pass goes on, so the step's own may be less.
    assert all(share <= WITHIN and (share >= -WITHIN or key == "the step's own") for key, share in off.items()), off
