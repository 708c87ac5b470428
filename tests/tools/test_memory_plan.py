"""Every component of the predicted memory against what is really held, on the CPU, for models of three sizes."""

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from hermes.model.base import load, load_base
from hermes.model.compressed import compress
from hermes.model.llama3 import Shape
from hermes.settings.base import BaseSettings
from hermes.settings.compress import Method
from hermes.settings.train import TrainSettings
from hermes.training import answer_scores
from hermes.training.answer_scores import AnswerLogProbs, Head
from hermes.training.lora import fuse_updates
from hermes.training.packing import pack_pairs
from hermes.training.shared_prefix import share_prefix
from tests.conftest import make_byte_tokenizer
from tests.stages.test_train import SETTINGS
from tools import plan
from tools.memory_plan import layer_activations, training_memory
from tools.quantization_plan import compress_memory, weights_of

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES: list[Any] = [
    {
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    pytest.param(
        {
            "hidden_size": 512,
            "intermediate_size": 1792,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
        },
        marks=pytest.mark.slow,
    ),
]
VOCABULARY = 5003


def settings_with(**changes: Any) -> TrainSettings:
    return SETTINGS.model_copy(update={"lora_rank": 16, "lora_modules": MODULES} | changes)


def base_settings(quantization: str, double: bool, kept: bool = False) -> BaseSettings:
    return BaseSettings.model_validate(
        {
            "quantization": quantization,
            "double_quantization": double,
            "keep_dequantized": kept,
            "dtype": "bfloat16",
            "threads": 2,
        }
    )


def built(sizes: dict[str, Any], base: BaseSettings, train: TrainSettings, folder: Path) -> Any:
    """A random model of these sizes as training holds it."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).bfloat16().save_pretrained(folder)
    lora = LoraConfig(r=train.lora_rank, lora_dropout=train.lora_dropout, target_modules=train.lora_modules)
    model: Any = get_peft_model(load_base(folder, base), lora)
    share_prefix(model.get_base_model())
    fuse_updates(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train()


def held(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of the storages behind tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class LivePeak(TorchDispatchMode):
    """The most bytes that tensors made inside the block held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and (key := (s := tensor.untyped_storage())._cdata) not in given | self.sizes.keys()
            ):
                self.sizes[key] = s.nbytes()
                self.live += s.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(s, self._gone, key)
        return result

    def _gone(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def constants(model: PeftModel) -> list[torch.Tensor]:
    """The quantization constants of nf4 layers."""
    states = [state for p in model.parameters() if (state := getattr(p, "quant_state", None)) is not None]
    return [s.absmax for s in states] + [s.state2.absmax for s in states if s.nested]


def batch(pairs: int, prompt: int, answer: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (2 * pairs, prompt + answer), generator=torch.Generator().manual_seed(1))
    ids[pairs:, :prompt] = ids[:pairs, :prompt]
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def kept_for_backward(model: PeftModel, rows: dict[str, torch.Tensor]) -> int:
    """Bytes that a forward keeps for its backward pass, weights apart."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *constants(model))}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**rows, fused_lm_head=True)
    found = held(kept)
    del output
    return found


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("quantization", "double", "kept"),
    [("nf4", True, False), ("nf4", False, False), ("nf4", True, True), ("none", False, False)],
)
def test_weights_constants_adapter_and_optimizer_are_predicted(
    sizes: dict[str, Any], quantization: str, double: bool, kept: bool, tmp_path: Path
) -> None:
    base, train = base_settings(quantization, double, kept), settings_with()
    model = built(sizes, base, train, tmp_path)
    predicted = training_memory(Shape.of(model.config), base, train, tokens=100, answers=50, cuda=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert predicted.weights == pytest.approx(held([p for p in model.parameters() if not p.requires_grad]), rel=0.01)
    assert predicted.constants == pytest.approx(held(constants(model)), rel=0.05)
    assert predicted.adapter == held(trained)
    optimizer = torch.optim.AdamW(trained)
    model(**batch(2, 10, 10), fused_lm_head=True).log_probs.sum().backward()
    optimizer.step()
    assert predicted.gradients == held([p.grad for p in trained if p.grad is not None])
    states = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    assert predicted.optimizer == held(states)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("modules", [MODULES, ["q_proj", "v_proj"]])
def test_activations_are_predicted(sizes: dict[str, Any], dropout: float, modules: list[str], tmp_path: Path) -> None:
    base, train = base_settings("none", False), settings_with(lora_dropout=dropout, lora_modules=modules)
    model = built(sizes, base, train, tmp_path)
    rows = batch(3, 60, 80)
    packed = pack_pairs(**rows)
    predicted = training_memory(
        Shape.of(model.config), base, train, packed.input_ids.size(1), len(packed.labels), cuda=False
    )
    assert predicted.activations == pytest.approx(kept_for_backward(model, rows), rel=0.15)


@pytest.mark.parametrize("sizes", SIZES)
def test_checkpointing_keeps_the_inputs_of_layers(sizes: dict[str, Any], tmp_path: Path) -> None:
    base, train = base_settings("none", False), settings_with(gradient_checkpointing=True)
    model = built(sizes, base, train, tmp_path)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    rows = batch(3, 60, 80)
    packed = pack_pairs(**rows)
    tokens, shape = packed.input_ids.size(1), Shape.of(model.config)
    predicted = training_memory(shape, base, train, tokens, len(packed.labels), cuda=False)
    recomputed = layer_activations(shape, base, train, tokens, cuda=False)  # of one layer, in the backward pass
    directions = len(packed.labels) * shape.hidden * 2
    assert kept_for_backward(model, rows) == pytest.approx(predicted.activations - recomputed + directions, rel=0.15)


@pytest.mark.parametrize("sizes", SIZES)
def test_logits_are_predicted(sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_scores, "CACHED", answer_scores.CHUNK)  # whole chunks, as on a GPU
    answers, size = 500, sizes["hidden_size"]
    hidden = torch.randn(answers, size).bfloat16().requires_grad_()
    weight, labels = torch.randn(VOCABULARY, size).bfloat16(), torch.arange(answers)
    with LivePeak() as found:
        AnswerLogProbs.apply(hidden, Head(weight), labels)
    shape = Shape.of(LlamaConfig(vocab_size=VOCABULARY, **sizes))
    predicted = training_memory(shape, base_settings("none", False), settings_with(), tokens=900, answers=answers)
    assert predicted.logits == pytest.approx(found.peak, rel=0.15)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_peak_of_a_step_is_predicted(
    sizes: dict[str, Any], quantization: str, checkpointing: bool, tmp_path: Path
) -> None:
    base, train = base_settings(quantization, True), settings_with(gradient_checkpointing=checkpointing)
    model = built(sizes, base, train, tmp_path)
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model(**batch(1, 4, 4), fused_lm_head=True).log_probs.sum().backward()  # the gradients are there from now on
    rows = batch(4, 120, 160)
    packed = pack_pairs(**rows)
    with LivePeak() as found:
        model(**rows, fused_lm_head=True).log_probs.sum().backward()
    predicted = training_memory(
        Shape.of(model.config), base, train, packed.input_ids.size(1), len(packed.labels), cuda=False
    )
    assert predicted.activations + predicted.workspace == pytest.approx(found.peak, rel=0.15)


def test_the_shape_of_llama_3_8b_has_its_weights() -> None:
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    shape = Shape.of(config)
    assert shape.linear_weights + shape.other_weights == 8_030_261_248


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("method", "intermediate"), [("gptq", 1024), ("awq", 2048)])
def test_what_gptq_and_awq_hold_beside_the_weights_is_predicted(
    method: Method, intermediate: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=128,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    random: Any = LlamaForCausalLM(config)
    random.to(dtype).save_pretrained(tmp_path)
    make_byte_tokenizer().save_pretrained(tmp_path)
    model = load(tmp_path, dtype)
    sequences = [torch.randint(3, 256, (n,)).tolist() for n in (150, 100, 200, 120, 140, 90)]
    with LivePeak() as found:
        compress(model, method, sequences, 32)
    profile, shape = plan.load("cpu"), Shape.of(config)
    asked = {"methods": [method], "awq_pairs": len(sequences), "group_size": 32}
    profile = profile.model_copy(update={"compress": profile.compress.model_copy(update=asked)})
    predicted = compress_memory(profile, shape, 800 / 6, 200, dtype.itemsize)
    assert predicted - weights_of(shape) * dtype.itemsize == pytest.approx(found.peak, rel=0.15)
