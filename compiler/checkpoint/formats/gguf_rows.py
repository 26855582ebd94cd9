"""The rows of a tensor in a GGUF file, in the order of its Hugging Face checkpoint and in this host's byte order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from belle_compile.compiler.checkpoint.tensors import Bytes, read_bytes
from belle_compile.compiler.stored_path import StoredPath

Indices = npt.NDArray[np.intp]
# Numbers of two bytes or more in a block of each type that llama.cpp's gguf_convert_endian.py converts: the block's size, and
# their offsets in it; float types are blocks of one number.
_NUMBERS: dict[str, tuple[int, int, tuple[int, ...]]] = {  # type: (bytes of a block, bytes of a number, offsets)
    "F32": (4, 4, (0,)),
    "F16": (2, 2, (0,)),
    "BF16": (2, 2, (0,)),
    "Q4_0": (18, 2, (0,)),
    "Q8_0": (34, 2, (0,)),
    "Q4_K": (144, 2, (0, 2)),
    "Q6_K": (210, 2, (208,)),
}


def swappable(kind: str) -> bool:
    """Whether a tensor of this type can be read where its byte order is not this host's."""
    return kind in _NUMBERS


@dataclass(frozen=True)
class StoredRows:
    """Reads rows of a tensor as they are stored: uint8 [rows, row_bytes].

    `order` maps the indices of rows in the Hugging Face checkpoint to those in the file (None: they are the same). `swapped` is
    the type of the tensor if its numbers have the other byte order, else empty.
    """

    file: StoredPath
    offset: int
    row_bytes: int
    order: Callable[[Indices], Indices] | None = None
    swapped: str = ""

    def __call__(self, start: int, stop: int) -> Bytes:
        if self.order is None or start == stop:
            return self._bytes(start, stop)
        stored = self.order(np.arange(start, stop))
        runs = np.split(stored, np.flatnonzero(np.diff(stored) != 1) + 1)
        first, last = int(stored.min()), int(stored.max()) + 1
        if last - first <= 4 * len(stored):  # rows that are near each other: one read, some of it for nothing
            return self._bytes(first, last)[stored - first]
        return np.concatenate([self._bytes(int(run[0]), int(run[-1]) + 1) for run in runs])

    def _bytes(self, start: int, stop: int) -> Bytes:
        """Rows start..stop in the order of the file."""
        count = (stop - start) * self.row_bytes
        data = read_bytes(self.file, self.offset + start * self.row_bytes, count)
        if self.swapped:
            size, width, offsets = _NUMBERS[self.swapped]
            blocks = data.reshape(-1, size)
            for at in offsets:
                blocks[:, at : at + width] = blocks[:, at : at + width][:, ::-1].copy()
        return data.reshape(stop - start, self.row_bytes)


def interleaved_halves(head_rows: int) -> Callable[[Indices], Indices]:
    """The order of Q and K of a LLaMA: row i * head_rows / 2 + j of a head is stored as row 2 * j + i, because llama.cpp's RoPE
    pairs neighbours (convert_hf_to_gguf.py, LlamaModel.permute)."""

    def stored(rows: Indices) -> Any:
        half, j = np.divmod(rows % head_rows, head_rows // 2)
        return rows - rows % head_rows + 2 * j + half

    return stored


def separated_parts(heads: int, head_dim: int) -> Callable[[Indices], Indices]:
    """The order of a BLOOM's query_key_value: rows [heads, 3, head_dim] are stored as [3, heads, head_dim]
    (convert_hf_to_gguf.py, BloomModel.modify_tensors)."""

    def stored(rows: Indices) -> Any:
        head, within = np.divmod(rows, 3 * head_dim)
        part, j = np.divmod(within, head_dim)
        return (part * heads + head) * head_dim + j

    return stored
