"""Addresses in the key and value cache: those of one head of one block, and those of the scales of an int8 cache."""

from __future__ import annotations

from dataclasses import dataclass

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.tir import Buffer, Expr, T
from belle_compile.runtime.program import BLOCK_SIZE, KV_DTYPES, KVLayout

BLOCK = BLOCK_SIZE  # tokens


@dataclass(frozen=True)
class CacheBlocks:
    """The addresses of `runtime.program.KVLayout` for kernels, counted in elements from where a layer's keys or values of block
    0 begin."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str

    @classmethod
    def of(cls, kernel: kernels.AppendKV | kernels.Attention) -> CacheBlocks:
        """The layout of the cache that a kernel reads or writes."""
        return cls(kernel.num_layers, kernel.num_kv_heads, kernel.head_dim, kernel.cache_dtype)

    @property
    def _layout(self) -> KVLayout:
        return KVLayout(self.layers, self.kv_heads, self.head_dim, self.dtype)

    @property
    def quantized(self) -> bool:
        """Whether the cache has scales."""
        return self.dtype == "int8"

    @property
    def paired(self) -> bool:
        """Whether two neighbouring bfloat16 are stored as one int32."""
        return self.dtype == "bfloat16"

    @property
    def line(self) -> int:
        """Elements of a cache line."""
        return 64 // KV_DTYPES[self.dtype]

    def start(self, block: Expr, head: Expr) -> Expr:
        """The index at which the values of a head of a physical block begin."""
        layout, itemsize = self._layout, KV_DTYPES[self.dtype]
        sizes = (layout.block_bytes, layout.head_block_bytes, layout.scales_bytes)
        of_block, of_head, first = (size // itemsize for size in sizes)
        return tir.opaque(tir.i64(block) * of_block + (head * of_head + first))

    def scales_before(self, start: Expr) -> Expr:
        """The index, counted in float32, at which the 16 scales of the values at `start` begin."""
        return tir.opaque(T.shift_right(start - self._layout.scales_bytes, tir.i64(2)))


def as_pairs(cache: Buffer) -> Buffer:
    """The cache as int32, each a pair of bfloat16."""
    return tir.view_as(cache, "int32")


def as_scales(cache: Buffer) -> Buffer:
    """The cache as float32, for access to its scales."""
    return tir.view_as(cache, "float32")
