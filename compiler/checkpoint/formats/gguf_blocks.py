"""GGUF's block formats of 32 integers with one scale and, in some formats, one offset.

Layouts of a block (ggml-common.h): the scale d and the offset m are float16, qs holds the low four bits of all integers (those
of the first half of the block in the low halves of the bytes), and qh one more bit of each::

    Q4_0  d qs        Q4_1  d m qs
    Q5_0  d qh qs     Q5_1  d m qh qs
    Q8_0  d and 32 int8

A value is d * q + m in the formats with an offset, d * (q - 8) in Q4_0, d * (q - 16) in Q5_0, d * q in Q8_0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from belle_compile.compiler.ir.quantized import QuantizedRows

GROUP = 32
_HALF = GROUP // 2
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class BlockFormat:
    """The layout of a block: integers of `bits` bits, with or without an offset `m`."""

    bits: int
    has_offset: bool

    @property
    def bytes(self) -> int:
        """The size of a block in bytes."""
        return 2 + 2 * self.has_offset + GROUP * self.bits // 8

    def decoded(self, stored: Bytes) -> QuantizedRows:
        """Decode stored rows, uint8 [rows, bytes of a row], to integers, scales and offsets."""
        blocks = stored.reshape(len(stored), -1, self.bytes)
        rows, groups, _ = blocks.shape
        scales = _float16(blocks[..., :2])
        offsets = _float16(blocks[..., 2:4]) if self.has_offset else None
        packed = blocks[..., 4 if self.has_offset else 2 :]
        integers = self._integers(packed).reshape(rows, groups * GROUP)
        return QuantizedRows(integers, scales, offsets=offsets)

    def _integers(self, packed: Bytes) -> npt.NDArray[np.int8]:
        """The integers as int8 [rows, groups, 32], centred on zero in formats without an offset."""
        if self.bits == 8:
            return np.ascontiguousarray(packed).view(np.int8)
        integers = np.empty((*packed.shape[:2], GROUP), np.int8)
        low = packed[..., -_HALF:]
        integers[..., :_HALF], integers[..., _HALF:] = low & 15, low >> 4
        if self.bits == 5:
            fifth = np.unpackbits(np.ascontiguousarray(packed[..., :4]), axis=-1, bitorder="little")
            integers |= (fifth << 4).view(np.int8)
        if not self.has_offset:
            integers -= 1 << (self.bits - 1)
        return integers


BLOCK_FORMATS: Mapping[str, BlockFormat] = {  # by the name of the GGML type
    "Q4_0": BlockFormat(4, has_offset=False),
    "Q4_1": BlockFormat(4, has_offset=True),
    "Q5_0": BlockFormat(5, has_offset=False),
    "Q5_1": BlockFormat(5, has_offset=True),
    "Q8_0": BlockFormat(8, has_offset=False),
}


def _float16(stored: Bytes) -> npt.NDArray[Any]:
    """The float16 [rows, groups] that are stored as bytes [rows, groups, 2]."""
    return np.ascontiguousarray(stored).view(np.float16)[..., 0]
