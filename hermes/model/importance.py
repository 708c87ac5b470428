"""The importance matrix of llama.cpp, in process and on token ids: how strongly each column of a model's matrices is used.

A column is multiplied with one number for each token. The mean of their squares is its importance, by which llama.cpp weighs the errors of
rounding; only Q8_0 and floats go without. As in llama.cpp's own tool (tools/imatrix), the matrices of the layers are watched, not the
embedding or the output, and an expert of a mixture counts the tokens that are sent to it. Unlike there, a sequence begins as it is given,
its last few tokens count too, and sums are in float64. The number of threads changes no bit.

llama.cpp shows each node of its graph to a callback. Nothing in the library tells what a node is computed from, so `Tensor` repeats ggml.h,
and is held against what the library does tell.
"""

import ctypes
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from llama_cpp._ggml import libggml

from hermes.console import UserError, progress
from hermes.data.calibration import TOKENS
from hermes.model.gguf import UBATCH, Context, GgufModel
from hermes.model.gguf_files import layer_matrices

OFF = "set `quantize.imatrix: false`"
OBJECT = 32  # bytes that ggml_tensor_overhead counts beside the tensor
SUMS, COUNTS = ".in_sum2", ".counts"
ELEMENTS = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.I32: np.int32}


class Usage(NamedTuple):
    """What a tensor of one matrix, or of one for each expert, was multiplied with.

    `squares` are sums of squares, (matrices, columns) in float64, and `rows` how many vectors each matrix met.
    """

    squares: np.ndarray
    rows: np.ndarray


class Tensor(ctypes.Structure):
    """ggml_tensor of ggml.h."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]
for function, result, arguments in (
    (libggml.ggml_tensor_overhead, ctypes.c_size_t, []),
    (libggml.ggml_op_desc, ctypes.c_char_p, [ctypes.c_void_p]),
    (libggml.ggml_get_name, ctypes.c_char_p, [ctypes.c_void_p]),
    (libggml.ggml_nbytes, ctypes.c_size_t, [ctypes.c_void_p]),
    (libggml.ggml_backend_tensor_get, None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]),
):
    function.restype, function.argtypes = result, arguments


def array(tensor: Tensor) -> np.ndarray:
    """A copy of a tensor's elements, columns last."""
    address = ctypes.addressof(tensor)
    buffer = np.empty(libggml.ggml_nbytes(address), dtype=np.uint8)
    libggml.ggml_backend_tensor_get(address, buffer.ctypes.data, 0, len(buffer))
    return np.ndarray(tensor.ne[::-1], ELEMENTS[GGMLQuantizationType(tensor.type)], buffer, strides=tensor.nb[::-1])


def rows_met(weight: Tensor, inputs: Tensor, experts: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """The vectors that a product multiplies, (rows, columns), and for each of them which matrix of `weight` it meets.

    Raises:
        UserError: several matrices that are not looked up by `experts`.
    """
    found = array(inputs)
    columns = found.shape[-1]
    if experts is not None:
        chosen = array(experts)[0, 0]  # (tokens, experts of each)
        return np.broadcast_to(found[0], (*chosen.shape, columns)).reshape(-1, columns), chosen.reshape(-1)
    if weight.ne[2] * weight.ne[3] > 1:
        raise UserError(f"{weight.name.decode()}: holds several matrices that are no experts; {OFF}")
    rows = found.reshape(-1, columns)
    return rows, np.zeros(len(rows), dtype=np.int32)


class Collector:
    """A callback that sums up what the tensors of these names are multiplied with; their shapes are the file's, columns first.

    Raises:
        UserError: tensors are laid out in another way than declared here.
    """

    def __init__(self, shapes: Mapping[str, list[int]]) -> None:
        self.shapes = shapes
        self.found: dict[str, Usage] = {}
        self.error: Exception | None = None
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._see)
        self._check(libggml.ggml_tensor_overhead() - OBJECT == ctypes.sizeof(Tensor))

    def _check(self, as_declared: bool) -> None:
        if not as_declared:
            raise UserError(
                f"llama-cpp-python {llama_cpp.__version__}: its tensors are laid out in another way than those of the version in "
                f"requirements.lock; run ./setup.sh, or {OFF}"
            )

    def _see(self, address: int, asks: bool, _: object) -> bool:
        """Called of every node: whether it is wanted, and once more when that is computed."""
        try:
            operation = libggml.ggml_op_desc(address)
            if self.error or operation not in (b"MUL_MAT", b"MUL_MAT_ID"):
                return False
            source = Tensor.from_address(address).src
            weight = source[0].contents
            name = libggml.ggml_get_name(ctypes.addressof(weight)).decode()
            if name in self.shapes and not asks:
                shape = self.shapes[name]
                self._check(weight.name.decode() == name and weight.ne[: len(shape)] == shape)
                experts = source[2].contents if operation == b"MUL_MAT_ID" else None
                self._add(name, weight, *rows_met(weight, source[1].contents, experts))
            return name in self.shapes
        except Exception as error:  # ctypes would print it and go on
            self.error = error
            return False

    def _add(self, name: str, weight: Tensor, rows: np.ndarray, matrix: np.ndarray) -> None:
        count, columns = weight.ne[2], weight.ne[0]
        usage = self.found.setdefault(name, Usage(np.zeros((count, columns)), np.zeros(count, dtype=np.int64)))
        for i in np.unique(matrix):
            met = rows[matrix == i].astype(np.float64)
            usage.squares[i] += np.square(met).sum(axis=0)
            usage.rows[i] += len(met)


class Watched(Context):
    """A context of one sequence whose graph is shown to a collector."""

    def __init__(self, model: GgufModel, tokens: int, collector: Collector) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = tokens
        params.n_ubatch = UBATCH
        params.n_threads = params.n_threads_batch = model.threads
        params.cb_eval = collector.callback
        self.ctx = llama_cpp.llama_init_from_model(model.model, params)
        if not self.ctx:
            raise UserError(f"{model.path}: no memory for a context of {tokens} tokens; {OFF}")
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        self.batch = llama_cpp.llama_batch_init(tokens, 0, 1)
        self.vocabulary_size = llama_cpp.llama_vocab_n_tokens(model.vocab)


def importance(path: Path, reader: GGUFReader, sequences: Sequence[Sequence[int]]) -> dict[str, Usage]:
    """How the sequences use each matrix of the layers of a GGUF file in float16, by the tensor's name.

    Raises:
        UserError: no or another use than a finite one of a matrix, or tensors that are not understood here.
    """
    shapes = {tensor.name: tensor.shape.tolist() for tensor in layer_matrices(reader)}
    collector = Collector(shapes)
    with GgufModel(path, threads=os.cpu_count() or 1) as model:
        context = Watched(model, max(map(len, sequences)), collector)
        model.contexts.append(context)
        for ids in progress(sequences, "importance matrix", unit="pair"):
            context.clear()
            for start in range(0, len(ids), UBATCH):
                context.add(ids[start : start + UBATCH], start, [0])  # tokens without logits would skip the last layer
                context.decode(0)
                if collector.error:
                    raise collector.error
    found = collector.found
    unused = [name for name in shapes if name not in found or not 0 < found[name].squares.sum() < np.inf]
    if unused:
        raise UserError(
            f"{path}: {unused[0]} ({len(unused)} of {len(shapes)} matrices) is multiplied with nothing, zeros or numbers that are not "
            f"finite; {OFF}"
        )
    return found


def write(path: Path, found: Mapping[str, Usage], sequences: Sequence[Sequence[int]]) -> None:
    """Writes an importance matrix as llama.cpp's tools read it (`llama-quantize --imatrix`)."""
    writer = GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [TOKENS.as_posix()])
    writer.add_uint32("imatrix.chunk_count", len(sequences))
    writer.add_uint32("imatrix.chunk_size", max(map(len, sequences)))
    for name, usage in sorted(found.items()):
        writer.add_tensor(name + SUMS, usage.squares.astype(np.float32))
        writer.add_tensor(name + COUNTS, usage.rows[:, None].astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path: Path) -> dict[str, np.ndarray]:
    """The mean square of each column from a file of `write`, float32, an expert's columns after another's.

    As in llama-quantize, the columns of an expert that no token was sent to have 1.
    """
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    means = {}
    for name in (name.removesuffix(SUMS) for name in tensors if name.endswith(SUMS)):
        sums, rows = tensors[name + SUMS], tensors[name + COUNTS]
        means[name] = np.where(rows > 0, sums / np.maximum(rows, 1), np.float32(1)).reshape(-1)
    return means
