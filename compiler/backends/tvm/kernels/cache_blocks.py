"""Where one head of one block lies in the key or value cache, and the scales of an int8 cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compiler.backends.tvm import tir
from compiler.backends.tvm.tir import Buffer, Expr, T
from runtime.program import KVLayout


@dataclass(frozen=True)
class CacheBlocks:
    """The addresses of `runtime.program.KVLayout` for kernels, counted in elements of the cache."""

    kv_heads: int
    head_dim: int
    dtype: str

    @property
    def quantized(self) -> bool:
        """Whether there are scales."""
        return self.dtype == "int8"

    @property
    def line(self) -> int:
        """Elements of a cache line."""
        return 64 // np.dtype(self.dtype).itemsize

    def start(self, block: Expr, head: Expr) -> Expr:
        """The first value of a head of a physical block."""
        layout, itemsize = KVLayout(1, self.kv_heads, self.head_dim, self.dtype), np.dtype(self.dtype).itemsize
        stride, first = layout.head_block_bytes // itemsize, layout.scales_bytes // itemsize
        return tir.opaque((tir.i64(block) * self.kv_heads + head) * stride + first)

    def scales_before(self, start: Expr) -> Expr:
        """The first of the 16 scales of the values at `start`, counted in float32 from the start of the cache."""
        scales_bytes = KVLayout(1, self.kv_heads, self.head_dim, self.dtype).scales_bytes
        return tir.opaque(T.shift_right(start - scales_bytes, tir.i64(2)))


def as_scales(cache: Buffer) -> Buffer:
    """The cache as float32, to read and write its scales."""
    return tir.view_as(cache, "float32")
