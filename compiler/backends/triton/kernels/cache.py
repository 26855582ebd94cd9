"""The paged KV cache of a GPU: where heads of blocks lie, reading them, and writing the keys and values of a step.

A block of a layer has k[kv_heads][16][head_dim], then v likewise; with int8 each [16][head_dim] comes after its 16 float32
scales. `CACHE` constants: BLOCK_STRIDE and HEAD_STRIDE count elements, SCALES those that the scales take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import triton
import triton.language as tl

from compiler.backends.kernel import View
from compiler.backends.triton.kernels.base import Kernel, Start, of_view, power_of_two
from compiler.backends.triton.kernels.device import rint
from compiler.errors import CompileError
from runtime.program import BLOCK_SIZE, KV_DTYPES, KVLayout

_SLOTS = tl.constexpr(BLOCK_SIZE)


@triton.jit
def _slot(block, slot, head, HEAD_DIM: tl.constexpr, BLOCK_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr,
          SCALES: tl.constexpr):  # fmt: skip
    """The place of a token's first element of a head."""
    return block.to(tl.int64) * BLOCK_STRIDE + head * HEAD_STRIDE + SCALES + slot * HEAD_DIM


@triton.jit
def tokens_of(block_table_ptr, sequence, tokens, inside, head, HEAD_DIM: tl.constexpr, MAX_BLOCKS: tl.constexpr,
              BLOCK_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr, SCALES: tl.constexpr):  # fmt: skip
    """The places of a head of tokens of a sequence, and of their scales in float32."""
    blocks = tl.load(block_table_ptr + sequence * MAX_BLOCKS + tokens // _SLOTS, mask=inside, other=0)
    places = _slot(blocks, tokens % _SLOTS, head, HEAD_DIM, BLOCK_STRIDE, HEAD_STRIDE, SCALES)
    scales = blocks.to(tl.int64) * (BLOCK_STRIDE // 4) + head * (HEAD_STRIDE // 4) + tokens % _SLOTS
    return places, scales


@triton.jit
def read_tokens(cache_ptr, places, scales, cols, inside, wide, SCALES: tl.constexpr):
    """[tokens, cols] in the type that products are computed in: float32 of a float32 cache, else float16."""
    found = tl.load(cache_ptr + places[:, None] + cols[None, :], mask=inside[:, None] & wide[None, :], other=0.0)
    if SCALES:
        steps = tl.load(cache_ptr.to(tl.pointer_type(tl.float32)) + scales, mask=inside, other=0.0)
        found = (found.to(tl.float32) * steps[:, None]).to(tl.float16)
    return found


@triton.jit
def _write(cache_ptr, place, scale_place, first, second, pairs, inside, HALF: tl.constexpr, SCALES: tl.constexpr):
    """Both halves of a head."""
    if SCALES:
        absmax = tl.maximum(tl.max(tl.abs(first), axis=0), tl.max(tl.abs(second), axis=0))
        inverse = tl.where(absmax > 0, tl.div_rn(127.0, tl.where(absmax > 0, absmax, 1.0)), 0.0)
        tl.store(cache_ptr.to(tl.pointer_type(tl.float32)) + scale_place, tl.div_rn(absmax, 127.0))
        first, second = rint(first * inverse).to(tl.int32), rint(second * inverse).to(tl.int32)
    tl.store(cache_ptr + place + pairs, first.to(cache_ptr.dtype.element_ty), mask=inside)
    tl.store(cache_ptr + place + HALF + pairs, second.to(cache_ptr.dtype.element_ty), mask=inside)


@triton.jit
def append_heads(rows_ptr, k_ptr, v_ptr, positions_ptr, sequences_ptr, block_table_ptr, cos_sin_ptr, kcache_ptr, vcache_ptr,
                 HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, MAX_BLOCKS: tl.constexpr,
                 BLOCK_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr, SCALES: tl.constexpr, TABLE_STRIDE: tl.constexpr,
                 K_STRIDE: tl.constexpr, K_OFFSET: tl.constexpr, V_STRIDE: tl.constexpr, V_OFFSET: tl.constexpr):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    if row < tl.load(rows_ptr):
        pairs = tl.arange(0, BLOCK)
        inside = pairs < HALF
        at = row.to(tl.int64)
        k = k_ptr + at * K_STRIDE + K_OFFSET + head * HEAD_DIM + pairs
        v = v_ptr + at * V_STRIDE + V_OFFSET + head * HEAD_DIM + pairs
        first = tl.load(k, mask=inside, other=0.0)
        second = tl.load(k + HALF, mask=inside, other=0.0)
        if cos_sin_ptr is not None:
            cos = tl.load(cos_sin_ptr + at * TABLE_STRIDE + pairs, mask=inside, other=0.0)
            sin = tl.load(cos_sin_ptr + at * TABLE_STRIDE + HALF + pairs, mask=inside, other=0.0)
            rotated = first * cos - second * sin
            second = second * cos + first * sin
            first = rotated
        position = tl.load(positions_ptr + row)
        place, scale = tokens_of(block_table_ptr, tl.load(sequences_ptr + row), position, True, head, HEAD_DIM, MAX_BLOCKS,
                                 BLOCK_STRIDE, HEAD_STRIDE, SCALES)  # fmt: skip
        _write(kcache_ptr, place, scale, first, second, pairs, inside, HALF, SCALES)
        first = tl.load(v, mask=inside, other=0.0)
        second = tl.load(v + HALF, mask=inside, other=0.0)
        _write(vcache_ptr, place, scale, first, second, pairs, inside, HALF, SCALES)


def of_cache(num_layers: int, kv_heads: int, head_dim: int, dtype: str) -> dict[str, int]:
    """The constants of where things lie. Raises CompileError for heads that have no halves."""
    if head_dim % 2:
        raise CompileError("triton", "head dimension", found=str(head_dim), expected="an even number")
    layout, size = KVLayout(num_layers, kv_heads, head_dim, dtype, transposed_keys=False), KV_DTYPES[dtype]
    places = {"BLOCK_STRIDE": layout.block_bytes // size, "HEAD_STRIDE": layout.head_block_bytes // size}
    return {"HEAD_DIM": head_dim, **places, "SCALES": layout.scales_bytes // size}


@dataclass(frozen=True)
class AppendKV(Kernel):
    """k and v of every row to the slot of its position; keys are rotated first when `rotary`. In an int8 cache each head of a
    token has a scale, absmax / 127."""

    kind: ClassVar[str] = "append_kv"
    num_layers: int
    num_kv_heads: int
    head_dim: int
    k: View
    v: View
    max_blocks: int
    cache_dtype: str
    rotary: bool

    function = append_heads

    def pointers(self) -> tuple[tuple[str, str], ...]:
        cos_sin = (("cos_sin", "float32"),) if self.rotary else ()
        return (("rows", "int32"), ("k", "float32"), ("v", "float32"), ("positions", "int32"), ("sequences", "int32"),
                ("block_table", "int32"), *cos_sin, ("kcache", self.cache_dtype), ("vcache", self.cache_dtype))  # fmt: skip

    def start(self) -> Start:
        return Start((1, self.num_kv_heads, 1), 1, 1)

    def constants(self) -> Mapping[str, Any]:
        half = self.head_dim // 2
        sizes = {"HALF": half, "BLOCK": power_of_two(half), "MAX_BLOCKS": self.max_blocks}
        sizes["TABLE_STRIDE"] = View.of_width(self.head_dim).stride
        cache = of_cache(self.num_layers, self.num_kv_heads, self.head_dim, self.cache_dtype)
        return {"cos_sin_ptr": None, **cache, **sizes, **of_view("K", self.k), **of_view("V", self.v)}
