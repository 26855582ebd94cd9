"""The paged KV cache of a GPU: addresses of the heads of blocks, reading them, and writing the keys and values of a step.

A block of a layer has k[kv_heads][16][head_dim], then v likewise; with int8 each [16][head_dim] comes after its 16 float32
scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.program.kernel import View
from belle_compile.compiler.backends.triton.kernels.base import Kernel, Start, power_of_two, warps_for
from belle_compile.compiler.backends.triton.kernels.device import begin, rint
from belle_compile.compiler.errors import CompileError
from belle_compile.runtime.program import BLOCK_SIZE, KV_DTYPES, KVLayout

_SLOTS = tl.constexpr(BLOCK_SIZE)
_HEADS = 16  # the most heads that one program appends


class PagedKernel(Kernel):
    """The sizes and strides for kernels that read or write the cache; strides are counted in elements."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_blocks: int
    cache_dtype: str

    def shape(self) -> Any:
        """The description; raises CompileError for heads of an odd size, which have no halves to rotate."""
        if self.head_dim % 2:
            raise CompileError("triton", "head dimension", found=str(self.head_dim), expected="an even number")
        return super().shape()

    @property
    def _layout(self) -> KVLayout:
        return KVLayout(self.num_layers, self.num_kv_heads, self.head_dim, self.cache_dtype, transposed_keys=False)

    @property
    def half(self) -> int:
        """The number of pairs of elements of a head that are rotated together."""
        return self.head_dim // 2

    @property
    def table_stride(self) -> int:
        """The distance from one token of the rotary table to the next."""
        return View.of_width(self.head_dim).stride

    @property
    def block_stride(self) -> int:
        """The distance from one block of the cache to the next."""
        return self._layout.block_bytes // KV_DTYPES[self.cache_dtype]

    @property
    def head_stride(self) -> int:
        """The distance from one head of a block to the next."""
        return self._layout.head_block_bytes // KV_DTYPES[self.cache_dtype]

    @property
    def scales(self) -> int:
        """The elements that the scales of a head of a block take; 0 if the cache has no scales."""
        return self._layout.scales_bytes // KV_DTYPES[self.cache_dtype]


class Cache(NamedTuple):
    """The pointers of a layer's cache."""

    k: Any
    v: Any
    table: Any  # the block table


class KeysValues(NamedTuple):
    """A head of some tokens, or some heads of a token: both halves of keys [rows, pairs], and values [rows, columns]."""

    first: Any
    second: Any
    v: Any


@triton.jit
def tokens_of(block_table_ptr, sequence, tokens, inside, head, SHAPE: tl.constexpr):
    """The index at which a head of each of some tokens of a sequence starts in the cache, and the index of its scale in
    float32."""
    blocks = tl.load(block_table_ptr + sequence * SHAPE.max_blocks + tokens // _SLOTS, mask=inside, other=0)
    slot = tokens % _SLOTS
    places = blocks.to(tl.int64) * SHAPE.block_stride + head * SHAPE.head_stride + SHAPE.scales + slot * SHAPE.head_dim
    scales = blocks.to(tl.int64) * (SHAPE.block_stride // 4) + head * (SHAPE.head_stride // 4) + tokens % _SLOTS
    return places, scales


@triton.jit
def read_tokens(cache_ptr, places, scales, cols, inside, wide, SCALES: tl.constexpr):
    """Read [tokens, cols] in the type that products are computed in: float32 from a float32 cache, else float16."""
    values = tl.load(cache_ptr + places[:, None] + cols[None, :], mask=inside[:, None] & wide[None, :], other=0.0)
    if SCALES:
        steps = tl.load(cache_ptr.to(tl.pointer_type(tl.float32)) + scales, mask=inside, other=0.0)
        values = (values.to(tl.float32) * steps[:, None]).to(tl.float16)
    return values


@triton.jit
def turned(x_ptr, cos_sin_ptr, place, table, inside, pairs, HALF: tl.constexpr):
    """Read both halves of query or key heads [rows, pairs] as float32, and rotate them if there is a table."""
    mask = inside[:, None] & (pairs < HALF)[None, :]
    first = tl.load(x_ptr + place[:, None] + pairs[None, :], mask=mask, other=0.0)
    second = tl.load(x_ptr + place[:, None] + HALF + pairs[None, :], mask=mask, other=0.0)
    if cos_sin_ptr is not None:
        cos = tl.load(cos_sin_ptr + table[:, None] + pairs[None, :], mask=mask, other=0.0)
        sin = tl.load(cos_sin_ptr + table[:, None] + HALF + pairs[None, :], mask=mask, other=0.0)
        rotated = first * cos - second * sin
        second = second * cos + first * sin
        first = rotated
    return first, second


@triton.jit
def _step(absmax):
    """The scale of a head, and the factor that converts its values to integers."""
    return tl.div_rn(absmax, 127.0), tl.where(absmax > 0, tl.div_rn(127.0, tl.where(absmax > 0, absmax, 1.0)), 0.0)


@triton.jit
def append(cache, new, sequence, position, heads, inside, SHAPE: tl.constexpr):
    """Write keys and values of heads of a token to their slots; returns them as the cache holds them, in float32."""
    first, second, v = new
    pairs, cols = tl.arange(0, first.shape[1]), tl.arange(0, v.shape[1])
    places, scales = tokens_of(cache.table, sequence, position + heads * 0, inside, heads, SHAPE)
    if SHAPE.scales:
        k_step, k_inverse = _step(tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1)))
        v_step, v_inverse = _step(tl.max(tl.abs(v), axis=1))
        tl.store(cache.k.to(tl.pointer_type(tl.float32)) + scales, k_step, mask=inside)
        tl.store(cache.v.to(tl.pointer_type(tl.float32)) + scales, v_step, mask=inside)
        first, second = rint(first * k_inverse[:, None]).to(tl.int32), rint(second * k_inverse[:, None]).to(tl.int32)
        v = rint(v * v_inverse[:, None]).to(tl.int32)
    kind: tl.constexpr = cache.k.dtype.element_ty
    first, second, v = first.to(kind), second.to(kind), v.to(kind)
    wide = inside[:, None] & (pairs < SHAPE.half)[None, :]
    tl.store(cache.k + places[:, None] + pairs[None, :], first, mask=wide)
    tl.store(cache.k + places[:, None] + SHAPE.half + pairs[None, :], second, mask=wide)
    tl.store(cache.v + places[:, None] + cols[None, :], v, mask=inside[:, None] & (cols < SHAPE.head_dim)[None, :])
    first, second, v = first.to(tl.float32), second.to(tl.float32), v.to(tl.float32)
    if SHAPE.scales:
        first, second, v = first * k_step[:, None], second * k_step[:, None], v * v_step[:, None]
        first, second = first.to(tl.float16).to(tl.float32), second.to(tl.float16).to(tl.float32)
        v = v.to(tl.float16).to(tl.float32)
    return KeysValues(first, second, v)


@triton.jit
def append_heads(rows_ptr, k_ptr, v_ptr, positions_ptr, sequences_ptr, block_table_ptr, cos_sin_ptr, kcache_ptr, vcache_ptr,
                 SHAPE: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    rows = begin(rows_ptr, OVERLAP)
    row = tl.program_id(0)
    if row < rows:
        at = row.to(tl.int64)
        heads = tl.program_id(1) * SHAPE.heads + tl.arange(0, SHAPE.heads)
        pairs, cols, inside = tl.arange(0, SHAPE.padded), tl.arange(0, 2 * SHAPE.padded), heads < SHAPE.num_kv_heads
        place = at * SHAPE.k.stride + SHAPE.k.offset + heads * SHAPE.head_dim
        first, second = turned(k_ptr, cos_sin_ptr, place, at * SHAPE.table_stride + heads * 0, inside, pairs, SHAPE.half)
        v = tl.load(v_ptr + at * SHAPE.v.stride + SHAPE.v.offset + heads[:, None] * SHAPE.head_dim + cols[None, :],
                    mask=inside[:, None] & (cols < SHAPE.head_dim)[None, :], other=0.0)  # fmt: skip
        append(Cache(kcache_ptr, vcache_ptr, block_table_ptr), KeysValues(first, second, v), tl.load(sequences_ptr + row),
               tl.load(positions_ptr + row), heads, inside, SHAPE)  # fmt: skip


@dataclass(frozen=True)
class AppendKV(PagedKernel, kernels.AppendKV):
    """Each program appends several heads of one token."""

    function = append_heads

    @property
    def heads(self) -> int:
        """Heads that a program appends, at most `_HEADS`."""
        return min(_HEADS, power_of_two(self.num_kv_heads))

    @property
    def padded(self) -> int:
        """Pairs of a head that a program holds, a power of two."""
        return power_of_two(self.half)

    def start(self) -> Start:
        return Start((1, -(-self.num_kv_heads // self.heads), 1), 1, warps_for(self.heads * self.padded))
