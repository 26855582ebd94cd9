"""Integers of a few bits in words of 32 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
WORD = 32


def unpacked(words: npt.NDArray[Any], bits: int) -> Bytes:
    """The integers in rows of int32 words [rows, words]: uint8 [rows, words * 32 / bits].

    They lie one after the other, the first in the lowest bits, without gaps; integers of 3 bits go on in the next word.
    """
    stored = np.ascontiguousarray(words, dtype="<i4").view(np.uint8)
    rows, count = stored.shape
    if bits == 8:
        return stored
    if WORD % bits:
        single = np.unpackbits(stored, axis=1, bitorder="little").reshape(rows, count * 8 // bits, bits)
        return np.ascontiguousarray(np.packbits(single, axis=2, bitorder="little")[..., 0])
    integers = np.empty((rows, count, 8 // bits), np.uint8)
    for place in range(8 // bits):
        integers[..., place] = (stored >> (bits * place)) & ((1 << bits) - 1)
    return integers.reshape(rows, -1)


def centred(integers: npt.NDArray[Any], bits: int) -> npt.NDArray[Any]:
    """Unsigned integers of some bits less the middle of their range, as int8."""
    return (integers ^ np.uint8(1 << (bits - 1))).view(np.int8) if bits == 8 else integers.astype(np.int8) - (1 << (bits - 1))
