"""Blocks of the paged KV cache: who owns which, and a promise that an admitted sequence never runs out of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.errors import EngineError

BLOCK_SIZE = 16


def blocks_for(tokens: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // BLOCK_SIZE)


class BlockAllocator:
    """Free blocks of a cache of `num_blocks` blocks.

    A sequence first reserves its worst case, then takes blocks one by one as it grows. Since nobody can reserve what is
    promised to others, taking never fails, so no sequence waits for another in the middle of its answer.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        # The last freed is the next taken: its pages are touched already, and new ones are taken from the low end.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._reserved = 0

    @property
    def available(self) -> int:
        """Blocks that are neither taken nor promised."""
        return len(self._free) - self._reserved

    def reserve(self, blocks: int) -> None:
        """Promise `blocks` blocks; raises `EngineError` when fewer are available (ask `available` to wait instead)."""
        if blocks > self.available:
            raise EngineError(
                "kv cache", "out of blocks", found=f"{self.available} available of {self.num_blocks}",
                expected=f"{blocks} blocks of {BLOCK_SIZE} tokens", remedy="wait for other requests or raise kv_tokens",
            )  # fmt: skip
        self._reserved += blocks

    def take(self) -> int:
        """A block out of those reserved."""
        assert self._reserved > 0, "take() without reserve()"
        self._reserved -= 1
        return self._free.pop()

    def give_back(self, blocks: list[int], unused: int) -> None:
        """Free taken `blocks` and cancel `unused` reserved ones."""
        self._free.extend(reversed(blocks))
        self._reserved -= unused


class BlockTable:
    """The blocks of one sequence, written to its `row` (int32 [max_blocks]) of the step's block table as it grows."""

    def __init__(self, allocator: BlockAllocator, row: NDArray[np.int32], max_tokens: int) -> None:
        """Reserve blocks for `max_tokens` tokens; raises `EngineError` when they are not available."""
        self._promised = blocks_for(max_tokens)
        allocator.reserve(self._promised)
        self._allocator = allocator
        self._row = row
        self.blocks: list[int] = []
        self.capacity = 0

    def grow(self, tokens: int) -> None:
        """Have room for the first `tokens` tokens of the sequence, at most what was reserved."""
        while self.capacity < tokens:
            block = self._allocator.take()
            self._row[len(self.blocks)] = block
            self.blocks.append(block)
            self.capacity += BLOCK_SIZE
            self._promised -= 1

    def free(self) -> None:
        """Give every block back, once; the table is empty afterwards."""
        self._allocator.give_back(self.blocks, self._promised)
        self.blocks, self._promised, self.capacity = [], 0, 0
