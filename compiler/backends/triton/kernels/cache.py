"""The paged KV cache of a GPU: where heads of blocks lie, reading them, and writing the keys and values of a step.

A block of a layer has k[kv_heads][16][head_dim], then v likewise; with int8 each [16][head_dim] comes after its 16 float32
scales. `CACHE` constants: BLOCK_STRIDE and HEAD_STRIDE count elements, SCALES those that the scales take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.program.kernel import View
from belle_compile.compiler.backends.triton.kernels.base import Kernel, Start, of_view, power_of_two, warps_for
from belle_compile.compiler.backends.triton.kernels.device import begin, rint
from belle_compile.compiler.errors import CompileError
from belle_compile.runtime.program import BLOCK_SIZE, KV_DTYPES, KVLayout

_SLOTS = tl.constexpr(BLOCK_SIZE)
_HEADS = 16  # of a program that appends


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
def turned(x_ptr, cos_sin_ptr, place, table, inside, pairs, wide, HALF: tl.constexpr):
    """Both halves of query or key heads [rows, pairs], rotated, float32."""
    mask = inside[:, None] & wide[None, :]
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
    """The scale of a head, and what it is multiplied with."""
    return tl.div_rn(absmax, 127.0), tl.where(absmax > 0, tl.div_rn(127.0, tl.where(absmax > 0, absmax, 1.0)), 0.0)


@triton.jit
def append(kcache_ptr, vcache_ptr, block_table_ptr, first, second, v, sequence, position, heads, pairs, cols, inside,
           HEAD_DIM: tl.constexpr, HALF: tl.constexpr, MAX_BLOCKS: tl.constexpr, BLOCK_STRIDE: tl.constexpr,
           HEAD_STRIDE: tl.constexpr, SCALES: tl.constexpr):  # fmt: skip
    """Keys, by halves, and values of heads of a token to their slots; returns them as they are read, in float32."""
    places, scales = tokens_of(block_table_ptr, sequence, position + heads * 0, inside, heads, HEAD_DIM, MAX_BLOCKS,
                               BLOCK_STRIDE, HEAD_STRIDE, SCALES)  # fmt: skip
    if SCALES:
        k_step, k_inverse = _step(tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1)))
        v_step, v_inverse = _step(tl.max(tl.abs(v), axis=1))
        tl.store(kcache_ptr.to(tl.pointer_type(tl.float32)) + scales, k_step, mask=inside)
        tl.store(vcache_ptr.to(tl.pointer_type(tl.float32)) + scales, v_step, mask=inside)
        first, second = rint(first * k_inverse[:, None]).to(tl.int32), rint(second * k_inverse[:, None]).to(tl.int32)
        v = rint(v * v_inverse[:, None]).to(tl.int32)
    kind: tl.constexpr = kcache_ptr.dtype.element_ty
    first, second, v = first.to(kind), second.to(kind), v.to(kind)
    wide = inside[:, None] & (pairs < HALF)[None, :]
    tl.store(kcache_ptr + places[:, None] + pairs[None, :], first, mask=wide)
    tl.store(kcache_ptr + places[:, None] + HALF + pairs[None, :], second, mask=wide)
    tl.store(vcache_ptr + places[:, None] + cols[None, :], v, mask=inside[:, None] & (cols < HEAD_DIM)[None, :])
    first, second, v = first.to(tl.float32), second.to(tl.float32), v.to(tl.float32)
    if SCALES:
        first, second, v = first * k_step[:, None], second * k_step[:, None], v * v_step[:, None]
        first, second = first.to(tl.float16).to(tl.float32), second.to(tl.float16).to(tl.float32)
        v = v.to(tl.float16).to(tl.float32)
    return first, second, v


@triton.jit
def append_heads(rows_ptr, k_ptr, v_ptr, positions_ptr, sequences_ptr, block_table_ptr, cos_sin_ptr, kcache_ptr, vcache_ptr,
                 KV_HEADS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
                 MAX_BLOCKS: tl.constexpr, BLOCK_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr, SCALES: tl.constexpr,
                 TABLE_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, K_OFFSET: tl.constexpr, V_STRIDE: tl.constexpr,
                 V_OFFSET: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    rows = begin(rows_ptr, OVERLAP)
    row = tl.program_id(0)
    if row < rows:
        at = row.to(tl.int64)
        heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        pairs, cols, inside = tl.arange(0, BLOCK), tl.arange(0, 2 * BLOCK), heads < KV_HEADS
        first, second = turned(k_ptr, cos_sin_ptr, at * K_STRIDE + K_OFFSET + heads * HEAD_DIM, at * TABLE_STRIDE + heads * 0,
                               inside, pairs, pairs < HALF, HALF)  # fmt: skip
        v = tl.load(v_ptr + at * V_STRIDE + V_OFFSET + heads[:, None] * HEAD_DIM + cols[None, :],
                    mask=inside[:, None] & (cols < HEAD_DIM)[None, :], other=0.0)  # fmt: skip
        append(kcache_ptr, vcache_ptr, block_table_ptr, first, second, v, tl.load(sequences_ptr + row),
               tl.load(positions_ptr + row), heads, pairs, cols, inside, HEAD_DIM, HALF, MAX_BLOCKS, BLOCK_STRIDE, HEAD_STRIDE,
               SCALES)  # fmt: skip


def of_cache(num_layers: int, kv_heads: int, head_dim: int, dtype: str) -> dict[str, int]:
    """The constants of where things lie. Raises CompileError for heads that have no halves."""
    if head_dim % 2:
        raise CompileError("triton", "head dimension", found=str(head_dim), expected="an even number")
    layout, size = KVLayout(num_layers, kv_heads, head_dim, dtype, transposed_keys=False), KV_DTYPES[dtype]
    places = {"BLOCK_STRIDE": layout.block_bytes // size, "HEAD_STRIDE": layout.head_block_bytes // size}
    return {"HEAD_DIM": head_dim, **places, "SCALES": layout.scales_bytes // size}


@dataclass(frozen=True)
class AppendKV(Kernel, kernels.AppendKV):
    """A block of threads has several heads of a token."""

    function = append_heads

    @property
    def heads(self) -> int:
        """Of a program."""
        return min(_HEADS, power_of_two(self.num_kv_heads))

    def start(self) -> Start:
        block = power_of_two(self.head_dim // 2)
        return Start((1, -(-self.num_kv_heads // self.heads), 1), 1, warps_for(self.heads * block))

    def constants(self) -> Mapping[str, Any]:
        half = self.head_dim // 2
        sizes = {"HALF": half, "BLOCK": power_of_two(half), "MAX_BLOCKS": self.max_blocks}
        sizes |= {"KV_HEADS": self.num_kv_heads, "HEADS": self.heads}
        sizes["TABLE_STRIDE"] = View.of_width(self.head_dim).stride
        cache = of_cache(self.num_layers, self.num_kv_heads, self.head_dim, self.cache_dtype)
        return {"cos_sin_ptr": None, **cache, **sizes, **of_view("K", self.k), **of_view("V", self.v)}
