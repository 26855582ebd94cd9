"""The rows of a step that have adapters, in the blocks that kernels compute together."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.program import BLOCK_ROWS

NO_ROW = -1
SIZES = tuple(BLOCK_ROWS >> shift for shift in range(BLOCK_ROWS.bit_length()))  # of blocks: powers of two


def adapter_blocks(slots: NDArray[np.int32], threads: int) -> NDArray[np.int32]:
    """Blocks [count, BLOCK_ROWS] of rows with the same adapter, given the adapter slot of each row, negative for none.

    A block has one of `SIZES` of rows, and `NO_ROW` in its other places. Blocks are small enough for all threads to have one.
    """
    adapters, blocks = np.unique(slots[slots >= 0]), [np.zeros((0, BLOCK_ROWS), np.int32)]
    most = max(1, int(np.count_nonzero(slots >= 0)) // threads)
    for slot in adapters:
        rows = np.flatnonzero(slots == slot)
        for size in SIZES:
            if size > most:
                continue
            whole = len(rows) // size * size
            block = np.full((whole // size, BLOCK_ROWS), NO_ROW, np.int32)
            block[:, :size] = rows[:whole].reshape(-1, size)
            blocks.append(block)
            rows = rows[whole:]
    return np.concatenate(blocks)
