"""The shared-prefix forward against stock TRL: same numbers, same gradients, and no pair sees another."""

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from hermes.training import packing
from hermes.training.packing import IGNORED, causal_blocks, pack_pairs, pair_blocks
from hermes.training.row_attention import RowAttention, Scores, attend_in_parts
from hermes.training.shared_prefix import share_prefix

VOCABULARY = 97
FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1")


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config).float()
    model.lm_head.requires_grad_(False)
    return model.train()


def both_models() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    stock = tiny_llama()
    ours = copy.deepcopy(stock)
    add_fused_lm_head(stock, outputs=FIELDS)
    share_prefix(ours)
    return stock, ours


def batch_of(sizes: list[tuple[int, int, int]], seed: int = 0, common: int = 0) -> dict[str, torch.Tensor]:
    """Random pairs of these (prompt, chosen, rejected) lengths, whose prompts begin with `common` further tokens."""
    rng = random.Random(seed)
    beginning = [rng.randrange(VOCABULARY) for _ in range(common)]
    pairs = [
        {
            f"{name}_ids": [rng.randrange(VOCABULARY) for _ in range(n)]
            for name, n in zip(("prompt", "chosen", "rejected"), size, strict=True)
        }
        for size in sizes
    ]
    for pair in pairs:
        pair["prompt_ids"] = beginning + pair["prompt_ids"]
    batch = DataCollatorForPreference(pad_token_id=0)(pairs)
    batch["labels"] = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, IGNORED)
    return batch


lengths = st.tuples(st.integers(0, 12), st.integers(1, 10), st.integers(1, 10))


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(lengths, min_size=1, max_size=5),
    common=st.integers(0, 9),
    queries=st.sampled_from([1, 5, 512]),
    seed=st.integers(0, 10_000),
)
def test_log_probs_and_gradients_equal_those_of_stock_trl(
    sizes: list[tuple[int, int, int]], common: int, queries: int, seed: int
) -> None:
    stock, ours = both_models()
    batch = batch_of(sizes, seed, common)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "QUERIES", queries)
        check_against_stock(stock, ours, batch, seed)


def check_against_stock(
    stock: LlamaForCausalLM, ours: LlamaForCausalLM, batch: dict[str, torch.Tensor], seed: int
) -> None:
    expected, found = stock(**batch, fused_lm_head=True), ours(**batch, fused_lm_head=True)
    for field in ("log_probs", "entropy", "mean_logits"):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), atol=1e-5, rtol=0)
    weights = torch.randn(expected.log_probs.shape, generator=torch.Generator().manual_seed(seed))
    (expected.log_probs * weights).sum().backward()
    (found.log_probs * weights).sum().backward()
    for (name, left), (_, right) in zip(stock.named_parameters(), ours.named_parameters(), strict=True):
        assert (left.grad is None) == (right.grad is None), name
        if left.grad is not None and right.grad is not None:
            scale = left.grad.norm().clamp(min=1e-4)  # a lone token's attention has no gradient but noise
            assert (left.grad - right.grad).norm() / scale < 1e-4, name


SIZES = [
    (7, 4, 6),
    (0, 3, 5),
    (9, 2, 1),
    (3, 1, 4),
    (5, 0, 3),
    (4, 2, 0),
]  # rest of the prompt, inputs of both branches


@pytest.mark.parametrize("common", [0, 5])
@pytest.mark.parametrize("queries", [1, 5, 512])
def test_the_backward_of_attention_equals_that_of_torch(
    common: int, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU attention has a backward of its own, in strips of queries; torch's differentiates what runs on CUDA."""
    monkeypatch.setattr(packing, "QUERIES", queries)
    blocks = {}
    for name in ("cpu", "cuda"):
        device, start = torch.device(name), common
        blocks[name] = causal_blocks((), slice(0, common), device)
        for size in SIZES:
            blocks[name] += pair_blocks(common, start, *size, device)
            start += sum(size)
    assert all(block.mask is None for block in blocks["cuda"])
    torch.manual_seed(0)
    shapes = [(1, heads, start, 8) for heads in (6, 2, 2)]
    ours = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    torchs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    outputs = (
        RowAttention.apply(*ours, tuple(blocks["cpu"]), 0.3),
        attend_in_parts(torchs[0], torchs[1], torchs[2], tuple(blocks["cuda"]), Scores(0.3)),
    )
    wanted = torch.randn_like(outputs[0])
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    for output in outputs:
        output.backward(wanted)
    for found, expected in zip(ours, torchs, strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_changes_no_bit_of_the_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_llama()
        share_prefix(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = batch_of([(7, 4, 6), (3, 5, 2)])
        model(**batch, fused_lm_head=True).log_probs.sum().backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert torch.equal(*gradients)


def test_a_pair_is_blind_to_its_neighbours_in_the_row() -> None:
    _, model = both_models()
    batch = batch_of([(5, 4, 6), (8, 3, 5), (2, 6, 1)])
    before = model(**batch, fused_lm_head=True).log_probs
    for row in (0, 2, 3, 5):  # the first and third pair's chosen and rejected rows
        prompt = (batch["labels"][row] == IGNORED) & (batch["attention_mask"][row] == 1)
        batch["input_ids"][row, prompt] = 1
        answer = batch["labels"][row] != IGNORED
        batch["input_ids"][row, answer] = batch["labels"][row, answer] = 2
    after = model(**batch, fused_lm_head=True).log_probs
    assert torch.equal(before[[1, 4]], after[[1, 4]])
    assert not torch.equal(before[[0, 3]], after[[0, 3]])


def test_the_rejected_answer_is_blind_to_the_chosen() -> None:
    _, model = both_models()
    batch = batch_of([(5, 4, 6)])
    before = model(**batch, fused_lm_head=True).log_probs[1]
    batch["input_ids"][0, 5:9] = batch["labels"][0, 5:9] = 3
    assert torch.equal(before, model(**batch, fused_lm_head=True).log_probs[1])


def test_every_prompt_is_computed_once_and_no_padding_is() -> None:
    packed = pack_pairs(**batch_of([(50, 4, 6), (3, 2, 9)]))
    assert packed.input_ids.shape == (1, 50 + 3 + 5 + 3 + 1 + 8)


def test_what_all_prompts_begin_with_is_computed_once() -> None:
    packed = pack_pairs(**batch_of([(50, 4, 6), (3, 2, 9)], common=24))
    assert packed.input_ids.shape == (1, 24 + 50 + 3 + 5 + 3 + 1 + 8)
    assert packed.position_ids.max() == 24 + 50 + 4


def test_prompts_of_thousands_of_tokens() -> None:
    stock, ours = both_models()
    check_against_stock(stock, ours, batch_of([(40, 7, 5), (3000, 300, 20)], common=20), seed=0)


def test_without_the_flag_the_forward_is_the_model_s_own() -> None:
    stock = tiny_llama()
    ids = torch.arange(12).reshape(1, 12)
    expected = stock(input_ids=ids).logits
    patched = copy.deepcopy(stock)
    original_attention = patched.config._attn_implementation
    share_prefix(patched)
    patched.set_attn_implementation(original_attention)
    assert torch.equal(patched(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {k: v[:3] for k, v in b.items()}, "3 rows"),
        (lambda b: b | {"input_ids": b["input_ids"].index_fill(0, torch.tensor([0]), 5)}, "same prompt"),
        (lambda b: b | {"labels": b["labels"].roll(-1, dims=1)}, "not the end"),
    ],
)
def test_a_batch_that_is_no_preference_batch_is_refused(change, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        pack_pairs(**change(batch_of([(4, 3, 3), (4, 3, 3)])))


def test_a_trained_output_matrix_is_refused() -> None:
    model = tiny_llama()
    model.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match="frozen output matrix"):
        share_prefix(model)
