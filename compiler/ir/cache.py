"""The paged KV cache as the evaluator keeps it: same blocks and layouts as the engine's, in NumPy."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

BLOCK_SIZE = 16  # tokens of one block

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int32]


@dataclass
class PagedCache:
    """Keys and values of all layers in blocks of 16 tokens; a sequence's blocks are found through its block table.

    k: [num_layers, num_blocks, num_kv_heads, head_dim, 16], v: [num_layers, num_blocks, num_kv_heads, 16, head_dim].
    Fresh blocks hold NaN, so that reading a slot which was never written shows in the result.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_blocks: int
    k: Floats = field(init=False, repr=False)
    v: Floats = field(init=False, repr=False)

    def __post_init__(self) -> None:
        blocks = (self.num_layers, self.num_blocks, self.num_kv_heads)
        self.k = np.full((*blocks, self.head_dim, BLOCK_SIZE), np.nan, np.float32)
        self.v = np.full((*blocks, BLOCK_SIZE, self.head_dim), np.nan, np.float32)

    def write(self, layer: int, blocks: Integers, position: int, k: Floats, v: Floats) -> None:
        """Store one token's k and v, each [num_kv_heads, head_dim]; `blocks` is its sequence's row of the block table."""
        block, offset = blocks[position // BLOCK_SIZE], position % BLOCK_SIZE
        self.k[layer, block, :, :, offset] = k
        self.v[layer, block, :, offset, :] = v

    def read(self, layer: int, blocks: Integers, length: int) -> tuple[Floats, Floats]:
        """Keys and values of positions 0..length-1 of one sequence, each [num_kv_heads, length, head_dim]."""
        used = blocks[: -(-length // BLOCK_SIZE)]
        k = self.k[layer, used].transpose(1, 0, 3, 2).reshape(self.num_kv_heads, -1, self.head_dim)
        v = self.v[layer, used].transpose(1, 0, 2, 3).reshape(self.num_kv_heads, -1, self.head_dim)
        return k[:, :length], v[:, :length]
