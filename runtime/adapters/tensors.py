"""Reads the tensors of a safetensors file into memory, without the package."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.schema import parse_json

_TYPES: Mapping[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32,
}  # fmt: skip


def read_file(path: Path) -> bytes:
    """The content of a file; raises `EngineError` if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise EngineError("adapter", f"file {path} cannot be read", found=error.strerror or str(error)) from None


def parse_tensors(content: bytes, path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The tensors in the content of the file `path` by name, and its metadata; floats of 16 and 64 bits become float32.

    Raises `EngineError` for a file that is damaged, or that has another type of tensor.
    """
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header = parse_json(content[8 : 8 + length])
        data = memoryview(content)[8 + length :]
        metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
        return {name: _tensor(data, entry) for name, entry in header.items()}, metadata
    except (ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        found = f"a file that does not parse: {error}"
        raise EngineError("adapter", f"file {path}", found=found, expected="safetensors", remedy="copy it again") from None


def _tensor(data: memoryview, entry: Mapping[str, Any]) -> NDArray[Any]:
    if entry["dtype"] not in _TYPES:
        raise ValueError(f"a tensor of type {entry['dtype']}, not one of {', '.join(_TYPES)}")
    start, stop = entry["data_offsets"]
    shape, dtype = [int(size) for size in entry["shape"]], np.dtype(_TYPES[entry["dtype"]])
    if not 0 <= start <= stop <= len(data) or stop - start != math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"a tensor {shape} at bytes {start} to {stop} of {len(data)}")
    array = np.frombuffer(data[start:stop], dtype).reshape(shape)
    if entry["dtype"] == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32) if array.dtype.kind == "f" else array.copy()
