"""The evaluator's paged KV cache in NumPy, with the block size and the roundings of an engine's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes  # noqa: F401 (registers "bfloat16" with NumPy)
import numpy as np
import numpy.typing as npt

BLOCK_SIZE = 16  # tokens in a block

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int32]
Stored = npt.NDArray[Any]


def quantize_heads(x: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """x[..., head_dim] as int8 with one scale per head: absmax / 127, x * (127 / absmax) rounded half to even."""
    absmax = np.abs(x).max(axis=-1)
    inverse = np.divide(np.float32(127), absmax, out=np.zeros_like(absmax), where=absmax > 0)
    return np.rint(x * inverse[..., None]).astype(np.int8), absmax / np.float32(127)


@dataclass
class PagedCache:
    """Keys and values of all layers in blocks of 16 tokens; a sequence's blocks are found through its block table.

    k: [num_layers, num_blocks, num_kv_heads, head_dim, 16], v: [num_layers, num_blocks, num_kv_heads, 16, head_dim], of
    `dtype`: float32, bfloat16, float16 or int8. An int8 cache holds value = integer * scale, with a float32 scale per token and
    head: k_scales and v_scales [num_layers, num_blocks, num_kv_heads, 16]. `read` returns float32 values, rounded to those that
    the cache can hold. Fresh blocks hold NaN (int8: in their scales), so that reading a slot which was never written
    shows in the result.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_blocks: int
    dtype: str = "float32"
    k: Stored = field(init=False, repr=False)
    v: Stored = field(init=False, repr=False)
    k_scales: Floats = field(init=False, repr=False)
    v_scales: Floats = field(init=False, repr=False)

    def __post_init__(self) -> None:
        assert self.dtype in ("float32", "bfloat16", "float16", "int8"), self.dtype
        blocks = (self.num_layers, self.num_blocks, self.num_kv_heads)
        fresh = 0 if self.quantized else np.nan
        self.k = np.full((*blocks, self.head_dim, BLOCK_SIZE), fresh, np.dtype(self.dtype))
        self.v = np.full((*blocks, BLOCK_SIZE, self.head_dim), fresh, np.dtype(self.dtype))
        scales = (*blocks, BLOCK_SIZE if self.quantized else 0)
        self.k_scales, self.v_scales = (np.full(scales, np.nan, np.float32) for _ in range(2))

    @property
    def quantized(self) -> bool:
        """Whether the cache holds integers with scales."""
        return self.dtype == "int8"

    def write(self, layer: int, blocks: Integers, position: int, k: Floats, v: Floats) -> None:
        """Store one token's k and v, each [num_kv_heads, head_dim]; `blocks` is its sequence's row of the block table."""
        block, offset = blocks[position // BLOCK_SIZE], position % BLOCK_SIZE
        if self.quantized:
            self.k[layer, block, :, :, offset], self.k_scales[layer, block, :, offset] = quantize_heads(k)
            self.v[layer, block, :, offset, :], self.v_scales[layer, block, :, offset] = quantize_heads(v)
        else:
            self.k[layer, block, :, :, offset] = k
            self.v[layer, block, :, offset, :] = v

    def read(self, layer: int, blocks: Integers, length: int) -> tuple[Floats, Floats]:
        """Keys and values of positions 0..length-1 of one sequence, each float32 [num_kv_heads, length, head_dim]."""
        used = blocks[: -(-length // BLOCK_SIZE)]
        k = self.k[layer, used].astype(np.float32)
        v = self.v[layer, used].astype(np.float32)
        if self.quantized:
            k *= self.k_scales[layer, used][:, :, None, :]
            v *= self.v_scales[layer, used][:, :, :, None]
        k = k.transpose(1, 0, 3, 2).reshape(self.num_kv_heads, -1, self.head_dim)
        v = v.transpose(1, 0, 2, 3).reshape(self.num_kv_heads, -1, self.head_dim)
        return k[:, :length], v[:, :length]
