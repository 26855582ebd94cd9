"""Safetensors files: headers are verified when a file is opened, values are read from the places that they state."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from belle_compile.compiler.checkpoint.formats.shards import Storage
from belle_compile.compiler.checkpoint.tensors import STAGE, LazyTensor, StoredValues, row_major, stamp_of
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.lfs import refuse_pointer
from belle_compile.compiler.stored_path import StoredPath
from belle_compile.compiler.untrusted import explained, parse_bounded

# Format: u64 little-endian header length, JSON header, data; https://huggingface.co/docs/safetensors
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
}
MOST_HEADER_BYTES = 32 << 20  # a third of the library's own limit, and 100 times what the largest models need
_MOST = 1 << 62  # of a size or an offset
_MOST_AXES = 8
_EXPECTED, _REMEDY = "a complete safetensors file", "it is truncated or damaged: download it again"


def open_safetensors(file: StoredPath) -> list[LazyTensor]:
    """The tensors of one file, under the names stored in it; raises CompileError if the header does not match the file."""
    refuse_pointer(file)
    with explained(STAGE, f"weights {file}", expected=_EXPECTED, remedy=_REMEDY):
        header, data_bytes = _header(file)
        stamp = stamp_of(file)
        data_start = stamp[0] - data_bytes

        def load(dtype: str, shape: tuple[int, ...], start: int) -> StoredValues:
            return StoredValues(file, stamp, data_start + start, dtype, shape, row_major(shape))

        tensors = [_tensor(file, name, entry, load) for name, entry in header.items() if name != "__metadata__"]
        parts = sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
        end = max((stop for _, stop in parts), default=0)
        if end > data_bytes:
            raise _broken(file, f"{data_bytes} bytes of tensor data where its header promises {end}")
        starts, ends = [start for start, _ in parts], [stop for _, stop in parts]
        if [*starts, data_bytes] != [0, *ends]:  # the safetensors library refuses such files
            raise _broken(file, "tensors that overlap, or bytes that belong to none")
        return tensors


def _tensor(file: StoredPath, name: str, entry: Any, load: Callable[[str, tuple[int, ...], int], StoredValues]) -> LazyTensor:
    """The tensor of an entry of the header; raises CompileError if its bytes do not fit its dtype and shape.

    `load(dtype, shape, start)` makes its loader."""
    try:
        stored, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        dtype, item_bytes = DTYPES.get(stored, (str(stored), 0))
    except (KeyError, TypeError, ValueError) as e:
        raise _broken(file, f"no dtype, shape and data_offsets for tensor {name}") from e
    numbers = (*shape, start, stop)
    if any(type(n) is not int or not 0 <= n < _MOST for n in numbers) or len(shape) > _MOST_AXES:
        raise _broken(file, f"no shape and data_offsets of whole numbers for tensor {name}")
    if stop < start or (item_bytes and prod(shape) * item_bytes != stop - start):
        raise _broken(file, f"{stop - start} bytes for tensor {name} of dtype {dtype} and shape {list(shape)}")
    return LazyTensor(name, shape, dtype, file, load(dtype, shape, start))


SAFETENSORS = Storage("model", "safetensors", lambda: open_safetensors)  # model.safetensors or shards of it


def _header(file: StoredPath) -> tuple[dict[str, Any], int]:
    """The parsed header and the number of bytes after it."""
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > size - 8 or length > MOST_HEADER_BYTES:
            found = f"a header of {length} bytes in a file of {size} bytes" if size >= 8 else f"a file of {size} bytes"
            raise _broken(file, found)
        try:
            header = parse_bounded(f.read(length))
        except ValueError as e:
            raise _broken(file, f"a header that is not JSON ({e})") from e
    if not isinstance(header, dict):
        raise _broken(file, "a header that is not a JSON object")
    return header, size - 8 - length


def _broken(file: StoredPath, found: str) -> CompileError:
    return CompileError(
        STAGE,
        f"weights {file}",
        found=found,
        expected=_EXPECTED,
        remedy=_REMEDY,
    )
