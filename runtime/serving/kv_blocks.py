"""Blocks of the paged KV cache: which are free, which are referenced, and which stay cached without references."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.program import BLOCK_SIZE


def blocks_for(tokens: int) -> int:
    """Number of blocks that hold `tokens` tokens."""
    return -(-tokens // BLOCK_SIZE)


class BlockPool:
    """The `num_blocks` blocks of a KV cache. Each is free, used (referenced by block tables), or cached: kept for its contents
    without references, until the room is needed.

    `take` prefers free blocks, and then evicts the cached block that lost its last reference first. `evictions` counts these.
    With `most_references`, blocks have no more references together than that.
    Misuse (a release too many, a take where no block is available) is an AssertionError.
    """

    def __init__(self, num_blocks: int, most_references: int | None = None) -> None:
        self.num_blocks = num_blocks
        self.evictions = 0
        self._most_references = math.inf if most_references is None else most_references
        self._on_eviction: Callable[[int], None] = lambda block: None
        self.reset()

    def reset(self) -> None:
        """Let all blocks be free; nobody may use a block that was taken before."""
        # The block freed last is taken next, because its pages are in memory already; unused blocks are taken from the low end.
        self._free = list(range(self.num_blocks - 1, -1, -1))
        self._references = [0] * self.num_blocks
        self.references_left = self._most_references
        self._kept: set[int] = set()  # blocks that stay cached when they lose their last reference
        self._cached: OrderedDict[int, None] = OrderedDict()  # kept blocks without references, in the order of eviction

    @property
    def available(self) -> int:
        """Blocks that can be taken now: free ones and cached ones, as far as there may be further references."""
        return int(min(len(self._free) + len(self._cached), self.references_left))

    @property
    def used(self) -> int:
        """Blocks with references."""
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def cached(self) -> int:
        """Blocks that are kept without references."""
        return len(self._cached)

    def on_eviction(self, callback: Callable[[int], None]) -> None:
        """Let `callback(block)` be called when a cached block is about to be taken for other contents."""
        self._on_eviction = callback

    def take(self) -> int:
        """Take a free block, or else evict a cached one; its reference count becomes 1."""
        assert self.available, "a block is taken where none is available"
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._kept.remove(block)
            self.evictions += 1
            self._on_eviction(block)
        self._references[block] = 1
        self.references_left -= 1
        return block

    def acquire(self, block: int) -> None:
        """Add a reference to a block that is used or cached."""
        if self._references[block] == 0:
            assert block in self._cached, f"free block {block} is shared"
            del self._cached[block]
        self._references[block] += 1
        self.references_left -= 1

    def release(self, block: int) -> None:
        """Remove a reference. After the last one the block is free, or cached if it is kept."""
        assert self._references[block] > 0, f"block {block} is released without a reference"
        self._references[block] -= 1
        self.references_left += 1
        if self._references[block] == 0:
            if block in self._kept:
                self._cached[block] = None
            else:
                self._free.append(block)

    def keep(self, block: int) -> None:
        """Let a used block stay cached when it loses its last reference."""
        assert self._references[block] > 0, f"block {block} is kept without a reference"
        self._kept.add(block)

    def discard(self, block: int) -> None:
        """Keep a block no longer. A cached one is free afterwards."""
        self._kept.discard(block)
        if block in self._cached:
            del self._cached[block]
            self._free.append(block)

    def references(self, block: int) -> int:
        """Number of references to a block; 0 if it is free or cached."""
        return self._references[block]


class BlockTable:
    """The blocks of one sequence, in the order of its positions, and its row (int32 [max_blocks]) of the step's block table.

    Blocks that other tables reference are not written to, nor are positions that the prefix cache has published.
    """

    def __init__(self, pool: BlockPool, row: NDArray[np.int32]) -> None:
        self._pool = pool
        self._row = row
        self.blocks: list[int] = []

    @property
    def capacity(self) -> int:
        """Tokens that the blocks hold."""
        return BLOCK_SIZE * len(self.blocks)

    def grow(self, tokens: int) -> bool:
        """Take blocks until the first `tokens` tokens of the sequence have room. Where fewer blocks are available than that
        needs, take none and return False."""
        missing = blocks_for(tokens) - len(self.blocks)
        if missing > self._pool.available:
            return False
        for _ in range(missing):
            self._append(self._pool.take())
        return True

    def share(self, block: int) -> None:
        """Append a block that is used by other tables or cached, and reference it."""
        self._pool.acquire(block)
        self._append(block)

    def replace(self, index: int, block: int) -> None:
        """Reference `block`, which has the same contents, in place of the block at `index`, which is released."""
        self._pool.acquire(block)
        self._pool.release(self.blocks[index])
        self.blocks[index] = block
        self._row[index] = block

    def free(self) -> None:
        """Release every block, the last one first: blocks are evicted before those that they continue, and the pool takes the
        sequence's first block next. The table is empty afterwards."""
        for block in reversed(self.blocks):
            self._pool.release(block)
        self.blocks = []

    def _append(self, block: int) -> None:
        self._row[len(self.blocks)] = block
        self.blocks.append(block)
