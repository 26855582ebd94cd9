"""Blocks of the paged KV cache: reference counts, and the promise that an admitted sequence never runs out of blocks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.program import BLOCK_SIZE


def blocks_for(tokens: int) -> int:
    """Number of blocks that hold `tokens` tokens."""
    return -(-tokens // BLOCK_SIZE)


class BlockPool:
    """The `num_blocks` blocks of a KV cache, each free or referenced by one or more block tables.

    A table first reserves its worst case and then takes blocks one at a time as its sequence grows. A reservation never
    exceeds the blocks that are free and not reserved by others, so `take` cannot fail, and no sequence waits for another in
    the middle of its answer. Misuse (a release too many, a take without a reservation) is an AssertionError.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        # The block freed last is taken next, because its pages are in memory already; unused blocks are taken from the low end.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._reserved = 0

    @property
    def available(self) -> int:
        """Blocks that are neither referenced nor reserved."""
        return len(self._free) - self._reserved

    def reserve(self, blocks: int) -> None:
        """Reserve `blocks` blocks, at most `available`."""
        assert blocks <= self.available, f"{blocks} blocks reserved, {self.available} of {self.num_blocks} available"
        self._reserved += blocks

    def cancel(self, blocks: int) -> None:
        """Give up a reservation of `blocks` blocks that were not taken."""
        assert blocks <= self._reserved, f"{blocks} reserved blocks cancelled, {self._reserved} are reserved"
        self._reserved -= blocks

    def take(self) -> int:
        """Take a free block out of a reservation; its reference count becomes 1."""
        assert self._reserved > 0, "a block is taken without a reservation"
        self._reserved -= 1
        block = self._free.pop()
        self._references[block] = 1
        return block

    def acquire(self, block: int) -> None:
        """Add a reference to a block that has one already."""
        assert self._references[block] > 0, f"free block {block} is shared"
        self._references[block] += 1

    def release(self, block: int) -> None:
        """Remove a reference; the block is free after the last one."""
        assert self._references[block] > 0, f"free block {block} is released"
        self._references[block] -= 1
        if self._references[block] == 0:
            self._free.append(block)

    def references(self, block: int) -> int:
        """Number of references to a block; 0 if it is free."""
        return self._references[block]


class BlockTable:
    """The blocks of one sequence, in the order of its positions, and its row (int32 [max_blocks]) of the step's block table."""

    def __init__(self, pool: BlockPool, row: NDArray[np.int32], max_tokens: int) -> None:
        """Reserve blocks for `max_tokens` tokens, which the pool must have available."""
        self._reserved = blocks_for(max_tokens)
        pool.reserve(self._reserved)
        self._pool = pool
        self._row = row
        self.blocks: list[int] = []
        self.capacity = 0  # tokens that `blocks` hold

    def grow(self, tokens: int) -> None:
        """Take blocks until the first `tokens` tokens of the sequence have room, at most what was reserved."""
        while self.capacity < tokens:
            self._append(self._pool.take())
            self._reserved -= 1

    def fork(self, row: NDArray[np.int32], max_tokens: int) -> BlockTable:
        """Return a table over the same blocks, with a row of its own and a reservation to grow to `max_tokens` tokens.

        The pool must have the blocks beyond those shared available. A shared block must be copied before either sequence
        writes to it: see `is_shared`.
        """
        child = BlockTable(self._pool, row, max(0, max_tokens - self.capacity))
        for block in self.blocks:
            self._pool.acquire(block)
            child._append(block)
        return child

    def is_shared(self, position: int) -> bool:
        """Whether the block of a token position has other references, so that it must be copied before it is written to."""
        return self._pool.references(self.blocks[position // BLOCK_SIZE]) > 1

    def free(self) -> None:
        """Release every block and cancel what is left of the reservation. The table is empty afterwards."""
        for block in reversed(self.blocks):  # so that the pool takes the sequence's first block next
            self._pool.release(block)
        self._pool.cancel(self._reserved)
        self.blocks, self._reserved, self.capacity = [], 0, 0

    def _append(self, block: int) -> None:
        self._row[len(self.blocks)] = block
        self.blocks.append(block)
        self.capacity += BLOCK_SIZE
