"""Safetensors folders tensor by tensor: what is read and written never needs more memory than its largest tensor.

The library maps whole files into memory or collects a whole shard before it writes; both are gigabytes for a large model. The
format is a JSON header (dtype, shape and place of each tensor) and then the bytes (github.com/huggingface/safetensors, README).
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hermes.artifacts import complete_file, write_json
from hermes.console import UserError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDEX = "model.safetensors.index.json"
PIECE = 1 << 24


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its name, dtype as safetensors writes it, shape, and bytes from `start` to `stop`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.stop - self.start

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own."""
        content = bytearray(self.size)
        with self.file.open("rb") as file:
            file.seek(self.start)
            file.readinto(content)
        return torch.frombuffer(content, dtype=DTYPES[self.dtype]).reshape(self.shape)

    def pieces(self) -> Iterator[bytes]:
        """Its bytes, a few megabytes at a time."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            left = self.size
            while left:
                yield (piece := file.read(min(PIECE, left)))
                left -= len(piece)


def tensor_bytes(tensor: torch.Tensor) -> Iterator[bytes]:
    """The bytes of a contiguous tensor on the CPU, a few megabytes at a time."""
    flat = tensor.flatten().view(torch.uint8)
    for piece in flat.split(PIECE):
        yield piece.numpy().tobytes()


def stored_tensors(folder: Path) -> list[Stored]:
    """All tensors of a folder's safetensors files, sorted by name.

    Raises:
        UserError: there is none, a header cannot be read or contradicts itself, a file is cut, or two files hold the same tensor.
    """
    found: dict[str, Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > path.stat().st_size:
                    raise ValueError("its header would be longer than the file")
                header = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("its header is no object")
            header.pop("__metadata__", None)
            entries = [
                Stored(
                    name,
                    entry["dtype"],
                    tuple(entry["shape"]),
                    path,
                    *(8 + length + at for at in entry["data_offsets"]),
                )
                for name, entry in header.items()
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
            raise UserError(
                f"{path}: not a readable safetensors file ({error}); delete the folder and run `dvc repro`"
            ) from None
        for entry in entries:
            if entry.dtype in DTYPES and entry.size != math.prod(entry.shape) * DTYPES[entry.dtype].itemsize:
                raise UserError(
                    f"{path}: {entry.name} of {entry.shape} has {entry.size} bytes; delete the folder and run `dvc repro`"
                )
        if max((entry.stop for entry in entries), default=0) != path.stat().st_size:
            raise UserError(f"{path}: is cut or has bytes too many; delete the folder and run `dvc repro`")
        if twice := found.keys() & header.keys():
            raise UserError(f"{path}: {min(twice)} is in another file too; delete the folder and run `dvc repro`")
        found |= {entry.name: entry for entry in entries}
    if not found:
        raise UserError(f"{folder}: has no safetensors weights; run `dvc repro`")
    return [found[name] for name in sorted(found)]


def write_file(path: Path, tensors: list[Stored], content: Callable[[Stored], Iterable[bytes]]) -> None:
    """Writes one safetensors file of tensors with these names, dtypes and shapes and the bytes of `content`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [place, place + tensor.size],
        }
        place += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with complete_file(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            before = file.tell()
            file.writelines(content(tensor))
            if file.tell() - before != tensor.size:
                raise ValueError(f"{tensor.name}: {file.tell() - before} bytes instead of {tensor.size}")


def write_folder(
    folder: Path, tensors: list[Stored], content: Callable[[Stored], Iterable[bytes]], max_shard_size: int
) -> None:
    """Writes tensors as model.safetensors, or as several files of at most `max_shard_size` bytes (or one tensor) and their index."""
    shards: list[list[Stored]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(other.size for other in shards[-1]) + tensor.size > max_shard_size:
            shards.append([])
        shards[-1].append(tensor)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard, content)
    if len(shards) > 1:
        places = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.size for tensor in tensors)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
