"""The header of a GGUF file: metadata and tensors, with every count compared with the file's size before it is believed.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: the magic number, version, numbers of tensors and of
metadata, the metadata as key, type and value, then name, shape, type and offset of each tensor, and the tensors' data.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np

from belle_compile.compiler.checkpoint.tensors import STAGE
from belle_compile.compiler.lfs import refuse_pointer
from belle_compile.compiler.stored_path import StoredPath
from belle_compile.compiler.untrusted import explained

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Types of metadata: NumPy's name of a number, and the others.
_NUMBERS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
_TEXT, _ARRAY = 8, 9
_ALIGNMENT = "general.alignment"
_MOST_AXES = 4  # GGML_MAX_DIMS
_MOST_TENSORS = 1 << 16  # 40 times what the largest models of these families have
_MOST_KEYS = 1 << 16
_MOST_ELEMENTS = 1 << 22  # of all arrays; the largest vocabularies and their merges have a quarter of that
_SIZE = 8  # bytes of a count, an offset or a length


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the file: its shape is in NumPy's order, `kind` is its GGMLQuantizationType, and it lies at offset..offset +
    bytes."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    offset: int
    bytes: int


@dataclass(frozen=True)
class FileHeader:
    """The metadata and the tensors of a file; `swapped` says whether its numbers have the other byte order than this host's."""

    metadata: dict[str, Any]
    tensors: tuple[StoredTensor, ...]
    swapped: bool


class _Bytes(Protocol):
    """The bytes of a file, of which slices are read."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> bytes: ...


def read_header(file: StoredPath) -> FileHeader:
    """Read the header of a file; raises CompileError if it is damaged, or no GGUF file."""
    refuse_pointer(file)
    size = file.stat().st_size
    found, remedy = f"a file of {size} bytes that does not parse", "it is truncated or damaged: download it again"
    with explained(STAGE, f"GGUF {file}", found=found, expected="a complete GGUF file", remedy=remedy), file.open("rb") as f:
        if size < len(_MAGIC):
            raise ValueError("it is too short")
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Parser(content).header()


class _Parser:
    """Reads values one after the other; raises ValueError for what the file has no room for."""

    def __init__(self, content: _Bytes) -> None:
        self._content, self._at = content, 0
        self._order = "<"
        self._elements = 0

    def header(self) -> FileHeader:
        if self._take(len(_MAGIC)) != _MAGIC:
            raise ValueError("it does not begin as GGUF files do")
        version = self._number("u4")
        if version & 0xFFFF == 0:  # the low half of a version is never 0 in the file's own byte order
            self._order, self._at = ">", len(_MAGIC)
            version = self._number("u4")
        if version not in _VERSIONS:
            raise ValueError(f"its version is {version}")
        tensors, keys = self._number("u8"), self._number("u8")
        if tensors > _MOST_TENSORS or keys > _MOST_KEYS:
            raise ValueError(f"it claims {tensors} tensors and {keys} keys")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._text()
            if key in metadata:
                raise ValueError(f"the key {key} occurs twice")
            metadata[key] = self._value(self._number("u4"))
        stated = [self._tensor() for _ in range(tensors)]
        if len({tensor.name for tensor in stated}) < len(stated):
            raise ValueError("a tensor's name occurs twice")
        data = self._data_offset(metadata.get(_ALIGNMENT, 32))
        native = "<" if np.little_endian else ">"
        return FileHeader(metadata, tuple(self._placed(tensor, data) for tensor in stated), self._order != native)

    def _take(self, count: int) -> bytes:
        if count > len(self._content) - self._at:
            raise ValueError(f"{count} bytes where {len(self._content) - self._at} are left")
        self._at += count
        return self._content[self._at - count : self._at]

    def _number(self, kind: str) -> Any:
        return self._numbers(kind, 1)[0]

    def _numbers(self, kind: str, count: int) -> list[Any]:
        dtype = np.dtype(f"{self._order}{kind}")
        values: list[Any] = np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist()
        return values

    def _text(self) -> str:
        return self._take(self._number("u8")).decode()

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _TEXT:
            return self._text()
        if kind == _ARRAY:
            return self._array(self._number("u4"), self._number("u8"))
        raise ValueError(f"a value of the unknown type {kind}")

    def _array(self, kind: int, count: int) -> list[Any]:
        self._elements += count
        least = np.dtype(_NUMBERS[kind]).itemsize if kind in _NUMBERS else _SIZE
        if count * least > len(self._content) - self._at or self._elements > _MOST_ELEMENTS:
            raise ValueError(f"an array of {count} elements where {len(self._content) - self._at} bytes are left")
        if kind in _NUMBERS:
            return self._numbers(_NUMBERS[kind], count)
        if kind != _TEXT:
            raise ValueError(f"an array of the type {kind}")
        return self._texts(count)

    def _texts(self, count: int) -> list[str]:
        """Many texts, without the cost of an array each."""
        length, texts = struct.Struct(f"{self._order}Q"), []
        for _ in range(count):
            texts.append(self._take(length.unpack(self._take(_SIZE))[0]).decode())
        return texts

    def _tensor(self) -> StoredTensor:
        """A tensor whose offset is still relative to the data of all tensors."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name, axes = self._text(), self._number("u4")
        if not 0 < axes <= _MOST_AXES:
            raise ValueError(f"tensor {name} has {axes} axes")
        shape = tuple(reversed(self._numbers("u8", axes)))
        kind, offset = GGMLQuantizationType(self._number("u4")), self._number("u8")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if min(shape) == 0 or shape[-1] % block:
            raise ValueError(f"tensor {name} has the shape {list(shape)} and blocks of {block}")
        return StoredTensor(name, shape, kind, offset, prod(shape) // block * block_bytes)

    def _data_offset(self, alignment: Any) -> int:
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {str(alignment)[:20]}")
        return -(-self._at // alignment) * alignment

    def _placed(self, tensor: StoredTensor, data: int) -> StoredTensor:
        start = data + tensor.offset
        if start + tensor.bytes > len(self._content):
            raise ValueError(f"tensor {tensor.name} needs {tensor.bytes} bytes at {start} of {len(self._content)}")
        return StoredTensor(tensor.name, tensor.shape, tensor.kind, start, tensor.bytes)
