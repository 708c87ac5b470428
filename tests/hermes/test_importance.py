"""The importance matrix against Transformers on the same tokens, and what llama.cpp rounds by it."""

import ctypes
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import llama_cpp
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, dequantize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hermes.console import UserError
from hermes.model import gguf_files, importance
from hermes.model.base import load
from hermes.model.importance import Usage
from hermes.settings.quantize import GGUF_TYPES, WEIGHED, Blocks256, GgufType
from stages.quantize import fallen
from tests.hermes.test_gguf_families import write_model

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
BLOCKS_OF_256 = get_args(Blocks256)
Squares = dict[tuple[str, int], list[torch.Tensor]]


@pytest.fixture(scope="module")
def reader(gguf_file: Path) -> GGUFReader:
    """Read once, since its vocabulary alone takes seconds."""
    return GGUFReader(gguf_file)


def sequences_of(vocabulary: int, lengths: tuple[int, ...] = (5, 40, 700, 17)) -> list[list[int]]:
    """Random ones: less than llama.cpp's own tool counts, and more than one batch takes."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, vocabulary, (n,), generator=generator).tolist() for n in lengths]


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[Squares]:
    """Squares of what goes into each matrix of a model, by the tensor's name in a GGUF file and the number of the expert."""
    seen: Squares = defaultdict(list)

    def plain(name: str) -> Any:
        return lambda _, inputs: seen[name, 0].append(inputs[0][0].square())

    def by_experts(layer: str) -> Any:
        def see(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            hidden, chosen, _ = inputs
            for expert in range(module.num_experts):
                met = hidden[(chosen == expert).any(dim=-1)]
                gate, up = (met @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
                for name, rows in (("gate", met), ("up", met), ("down", module.act_fn(gate) * up)):
                    seen[f"blk.{layer}.ffn_{name}_exps.weight", expert].append(rows.square())

        return see

    hooks = []
    for name, module in model.named_modules():
        if found := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
            layer, part = found.groups()
            if part in NAMES:
                hooks.append(module.register_forward_pre_hook(plain(f"blk.{layer}.{NAMES[part]}.weight")))
            elif part == "mlp.experts":
                hooks.append(module.register_forward_pre_hook(by_experts(layer)))
    yield seen
    for hook in hooks:
        hook.remove()


def check_against(
    model: PreTrainedModel, file: Path, reader: GGUFReader, sequences: list[list[int]], tolerance: float
) -> dict[str, Usage]:
    found = importance.importance(file, reader, sequences)
    with torch.inference_mode(), watched(model) as seen:
        for ids in sequences:
            model(input_ids=torch.tensor([ids]))
    assert {(name, i) for name, usage in found.items() for i in range(len(usage.rows))} == seen.keys()
    for (name, i), parts in seen.items():
        squares = torch.cat(parts).double()
        assert found[name].rows[i] == len(squares), name
        np.testing.assert_allclose(found[name].squares[i], squares.sum(dim=0).numpy(), rtol=tolerance, err_msg=name)
    return found


def test_the_sums_are_those_of_every_linear_layer(gguf_file: Path, reader: GGUFReader, tiny_model_folder: Path) -> None:
    sequences = sequences_of(49152)
    found = check_against(load(tiny_model_folder, torch.float32), gguf_file, reader, sequences, tolerance=5e-3)
    assert len(found) == 14
    assert {int(rows) for usage in found.values() for rows in usage.rows} == {sum(map(len, sequences))}


@pytest.mark.slow
def test_an_expert_counts_the_tokens_that_are_sent_to_it(
    tmp_path: Path, embedded_tokenizer: PreTrainedTokenizerBase
) -> None:
    folder, file = tmp_path / "model", tmp_path / "f16.gguf"
    write_model("mixtral", {"sliding_window": None}, folder, embedded_tokenizer)
    gguf_files.convert(folder, file, "f16")
    found = check_against(
        load(folder, torch.float32), file, GGUFReader(file), sequences_of(49152, (5, 60)), tolerance=2e-2
    )
    rows = found["blk.0.ffn_down_exps.weight"].rows
    assert len(rows) == 4
    assert rows.sum() == 2 * 65  # two experts a token
    assert len(set(rows.tolist())) > 1


def test_the_number_of_threads_changes_no_bit(
    gguf_file: Path, reader: GGUFReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr("os.cpu_count", lambda threads=threads: threads)
        usages = importance.importance(gguf_file, reader, sequences_of(49152, (5, 600)))
        found.append(b"".join(usage.squares.tobytes() for _, usage in sorted(usages.items())))
    assert found[0] == found[1] == found[2]


def test_what_is_written_is_what_llama_quantize_reads(tmp_path: Path) -> None:
    usages = {
        "blk.0.attn_q.weight": Usage(np.array([[3.0, 6.0, 1.5]]), np.array([3])),
        "blk.0.ffn_up_exps.weight": Usage(np.array([[8.0, 4.0], [0.0, 0.0]]), np.array([4, 0])),
    }
    path = tmp_path / "imatrix.gguf"
    importance.write(path, usages, [[1, 2], [3]])
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF")}
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == ["data/tokens"]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (2, 2)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["blk.0.ffn_up_exps.weight.in_sum2"].shape.tolist() == [2, 2]
    assert tensors["blk.0.ffn_up_exps.weight.counts"].shape.tolist() == [1, 2]
    found = importance.read(path)
    assert {name: mean.tolist() for name, mean in found.items()} == {
        "blk.0.attn_q.weight": [1.0, 2.0, 0.5],
        "blk.0.ffn_up_exps.weight": [2.0, 1.0, 1.0, 1.0],  # an expert that no token was sent to
    }
    assert {mean.dtype for mean in found.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("value", [0.0, float("inf")])
def test_a_matrix_that_is_not_used_is_one_line(
    value: float, gguf_file: Path, reader: GGUFReader, tmp_path: Path
) -> None:
    path = tmp_path / "f16.gguf"
    (norm,) = (tensor for tensor in reader.tensors if tensor.name == "blk.0.attn_norm.weight")
    content = bytearray(gguf_file.read_bytes())
    content[norm.data_offset : norm.data_offset + norm.n_bytes] = np.full(64, value, dtype=np.float32).tobytes()
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"blk\.0\..* of 14 matrices\) .*; set `quantize\.imatrix: false`$") as error:
        importance.importance(path, reader, [[5, 6, 7]])
    assert "\n" not in str(error.value)


def test_a_matrix_that_no_token_meets_is_one_line(gguf_file: Path, tmp_path: Path) -> None:
    write_tensors(tmp_path / "other.gguf", {"blk.9.attn_q.weight": 64})
    with pytest.raises(UserError, match=r": blk\.9\.attn_q\.weight \(1 of 1 matrices\) is multiplied with nothing, "):
        importance.importance(gguf_file, GGUFReader(tmp_path / "other.gguf"), [[5, 6, 7]])


@pytest.mark.parametrize("wrong", ["size", "shape"])
def test_tensors_of_another_layout_are_one_line(
    wrong: str, gguf_file: Path, reader: GGUFReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wrong == "size":
        monkeypatch.setattr(importance, "OBJECT", importance.OBJECT + 8)
    else:
        write_matrices(tmp_path / "other.gguf", 96, 256)
        reader = GGUFReader(tmp_path / "other.gguf")
    with pytest.raises(UserError, match=r"laid out in another way .* or set `quantize\.imatrix: false`$"):
        importance.importance(gguf_file, reader, [[5, 6, 7]])


def write_tensors(path: Path, columns: dict[str, int], **numbers: int) -> None:
    """A GGUF file of random matrices of 16 rows in float16; `numbers` go to its metadata."""
    random = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, value in numbers.items():
        getattr(writer, f"add_{name}")(value)
    for name, count in columns.items():
        writer.add_tensor(name, random.standard_normal((16, count)).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_matrices(path: Path, width: int, inner: int, heads: int = 4, output: bool = False) -> None:
    """The matrices of eight layers: enough to be quantized, and no model that runs."""
    columns = {f"{name}.weight": width for name in ("token_embd", *["output"] * output)}
    for layer in range(8):
        for name in NAMES.values():
            columns[f"blk.{layer}.{name}.weight"] = inner if name == "ffn_down" else width
    sizes = {"embedding_length": width, "feed_forward_length": inner, "head_count": 4, "head_count_kv": heads}
    write_tensors(path, columns, block_count=8, context_length=64, vocab_size=16, **sizes)


def skewed(reader: GGUFReader) -> dict[str, np.ndarray]:
    """An importance of each column, in which few columns have most of it, as in a trained model."""
    random = np.random.default_rng(1)
    return {
        tensor.name: random.lognormal(sigma=2, size=tensor.shape[0]).astype(np.float32)
        for tensor in gguf_files.layer_matrices(reader)
    }


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose rows 256 divides."""
    path = tmp_path_factory.mktemp("wide") / "f16.gguf"
    write_matrices(path, 256, 512)
    return path


def stored(reader: GGUFReader) -> dict[str, GGMLQuantizationType]:
    return {tensor.name: tensor.tensor_type for tensor in reader.tensors}


def weighted_error(path: Path, source: Path, columns: dict[str, np.ndarray]) -> float:
    """The sum of squared changes of the weights, each times the importance of its column."""
    originals = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(source).tensors}
    return sum(
        float(
            ((dequantize(tensor.data, tensor.tensor_type) - originals[tensor.name]) ** 2 @ columns[tensor.name]).sum()
        )
        for tensor in GGUFReader(path).tensors
        if tensor.name in columns
    )


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_a_type_is_rounded_by_the_importance_where_llama_cpp_looks_at_it(
    kind: GgufType, wide: Path, tmp_path: Path
) -> None:
    """All but Q8_0. The files compared have each tensor in the same type, and so the same size."""
    columns = skewed(GGUFReader(wide))
    flat = {name: np.ones_like(mean) for name, mean in columns.items()}
    first, again, without = (tmp_path / f"{name}.gguf" for name in ("first", "again", "without"))
    gguf_files.quantize(wide, first, kind, importance=columns)
    gguf_files.quantize(wide, again, kind, threads=1, importance=columns)
    types = stored(GGUFReader(first))
    gguf_files.quantize(wide, without, kind, importance=flat if kind in WEIGHED else None, tensor_types=types)
    assert first.read_bytes() == again.read_bytes()
    assert stored(GGUFReader(without)) == types
    if kind == "Q8_0":
        assert first.read_bytes() == without.read_bytes()
    else:
        assert weighted_error(first, wide, columns) < 0.95 * weighted_error(without, wide, columns)


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_the_types_that_need_an_importance_matrix_are_those_that_llama_cpp_refuses_without(
    kind: GgufType, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind not in WEIGHED:
        gguf_files.quantize(wide, tmp_path / "q.gguf", kind)
        return
    with pytest.raises(UserError, match=rf"^{kind} is rounded by .*; set `quantize\.imatrix: true`$"):
        gguf_files.quantize(wide, tmp_path / "q.gguf", kind)
    monkeypatch.setattr(gguf_files, "WEIGHED", {})
    with pytest.raises(UserError, match=r"llama\.cpp cannot quantize it"):
        gguf_files.quantize(wide, tmp_path / "q.gguf", kind)


@pytest.mark.parametrize(
    ("width", "inner", "heads", "output"),
    [(256, 512, 1, True), (256, 96, 4, False), (96, 256, 1, False), (96, 160, 4, True), (48, 256, 4, False)],
)
def test_what_falls_back_is_what_llama_cpp_says(
    width: int, inner: int, heads: int, output: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives an embedding or output that blocks of 256 do not fit Q8_0, and does not call that a fallback."""
    said: list[str] = []

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        said.append(text.decode())

    monkeypatch.setattr(gguf_files, "quiet_llama_cpp", lambda: llama_cpp.llama_log_set(log, ctypes.c_void_p(0)))
    source, path = tmp_path / "f16.gguf", tmp_path / "q.gguf"
    write_matrices(source, width, inner, heads, output)
    columns = skewed(GGUFReader(source))
    for kind, weighed in [(kind, True) for kind in GGUF_TYPES] + [(kind, False) for kind in {*GGUF_TYPES} - WEIGHED]:
        said.clear()
        gguf_files.quantize(source, path, kind, importance=columns if weighed else None)
        counts = re.findall(r"(\d+) of \d+ tensor\(s\) required fallback", "".join(said))
        unsaid = width == 96 and kind in BLOCKS_OF_256
        assert sum(fallen(GGUFReader(path), kind).values()) == sum(map(int, counts)) + unsaid, (kind, weighed)
    assert said
