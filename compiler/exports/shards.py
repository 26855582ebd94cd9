"""Safetensors files as Transformers writes them: shards of at most a few gigabytes, with an index where there are several."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from belle_compile.compiler.errors import CompileError
from belle_compile.runtime.schema import canonical_json

Array = npt.NDArray[Any]

SHARD_BYTES = 5_000_000_000  # Transformers' default until version 5, which every loader can map
INDEX_NAME = "model.safetensors.index.json"
_CODES = {"int8": "I8", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_TYPES: dict[str, Any] = {"int8": np.int8, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
_ALIGNMENT = 64  # bytes at whose multiples tensors begin in a file


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: `chunks` computes its rows, a part at a time, in a type that is converted to `dtype`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Array]]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * _item_bytes(self.dtype)


def _item_bytes(dtype: str) -> int:
    return int(np.dtype(_TYPES[dtype]).itemsize)


def write_shards(
    folder: Path, tensors: Sequence[StoredTensor], shard_bytes: int, on_progress: Callable[[int, int], None]
) -> list[str]:
    """Write tensors to model.safetensors, or to several files with an index; returns the names of the files.

    Raises CompileError where a value is not finite, or too large for the type that it is stored in.
    """
    shards = _divided(tensors, shard_bytes)
    count, total, done = len(shards), sum(tensor.bytes for tensor in tensors), 0
    names = ["model.safetensors"] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for name, shard in zip(names, shards, strict=True):
        for written in _write(folder / name, shard):
            done += written
            on_progress(done, total)
    if count == 1:
        return names
    weights = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weights}
    (folder / INDEX_NAME).write_text(canonical_json(index), encoding="utf-8")
    return [*names, INDEX_NAME]


def _divided(tensors: Sequence[StoredTensor], most: int) -> list[list[StoredTensor]]:
    """The tensors in their order, in groups of at most `most` bytes; a larger tensor has a group of its own."""
    shards: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    return shards


def _write(path: Path, tensors: Sequence[StoredTensor]) -> Iterator[int]:
    """Write one file; yields the bytes of each chunk.

    Tensors lie by the size of their elements, the largest first, so that each begins at a multiple of it without any gap, which
    the format does not allow. They are computed in their own order, in which neighbours share computations.
    """
    places: dict[str, int] = {}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in sorted(tensors, key=lambda tensor: -_item_bytes(tensor.dtype)):
        places[tensor.name] = offset
        end = offset + tensor.bytes
        entries[tensor.name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    with path.open("xb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        start = file.tell()
        for tensor in tensors:
            file.seek(start + places[tensor.name])
            for chunk in tensor.chunks():
                stored = converted(chunk, tensor.dtype, tensor.name)
                file.write(stored.reshape(-1).view(np.uint8).data)
                yield stored.nbytes
            assert file.tell() == start + places[tensor.name] + tensor.bytes, f"{tensor.name} has another size than announced"
        file.flush()
        os.fsync(file.fileno())


def converted(values: Array, dtype: str, name: str) -> Array:
    """Values in a type for floats, or integers as they are; raises CompileError where a result is not finite."""
    if dtype == "int8":
        assert values.dtype == np.int8, f"{name} holds {values.dtype}"
        return np.ascontiguousarray(values)
    with np.errstate(over="ignore"):
        stored: Array = np.ascontiguousarray(values, dtype=_TYPES[dtype])
    if not np.isfinite(stored if dtype != "bfloat16" else stored.astype(np.float32)).all():
        largest = float(np.abs(values).max())
        found = f"a magnitude of {largest:,.0f}" if np.isfinite(largest) else "NaN or infinity"
        remedy = "give another --dtype" if np.isfinite(largest) else ""
        raise CompileError("write", f"tensor {name}", found=found, expected=f"finite {dtype}", remedy=remedy)
    return stored
