"""Kernels that move, add or look up whole rows."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.program.kernel import round_up
from belle_compile.compiler.backends.triton.kernels.base import Kernel, Start, power_of_two, warps_for
from belle_compile.compiler.backends.triton.kernels.device import begin

_COLUMNS = 1024  # the most columns of a program; wider rows have several programs
DEPTH_ALIGNMENT = 64  # rows of matrices start at multiples of this many bytes


class _Columns(Kernel):
    """Each program computes some columns of one row."""

    width: int

    @property
    def columns(self) -> int:
        """Columns that a program computes."""
        return min(_COLUMNS, power_of_two(self.width))

    def start(self) -> Start:
        return Start((1, -(-self.width // self.columns), 1), 1, warps_for(self.columns))


@triton.jit
def gather_rows(rows_ptr, indices_ptr, x_ptr, out_ptr, SHAPE: tl.constexpr, OVERLAP: tl.constexpr):
    rows = begin(rows_ptr, OVERLAP)
    row = tl.program_id(0)
    if row < rows:
        cols = tl.program_id(1) * SHAPE.columns + tl.arange(0, SHAPE.columns)
        source = tl.load(indices_ptr + row).to(tl.int64) * SHAPE.x.stride + SHAPE.x.offset
        value = tl.load(x_ptr + source + cols, mask=cols < SHAPE.width)
        tl.store(out_ptr + row.to(tl.int64) * SHAPE.out.stride + SHAPE.out.offset + cols, value, mask=cols < SHAPE.width)


@dataclass(frozen=True)
class GatherRows(_Columns, kernels.GatherRows):
    function = gather_rows


@triton.jit
def add_rows(rows_ptr, x_ptr, r_ptr, out_ptr, SHAPE: tl.constexpr, OVERLAP: tl.constexpr):
    rows = begin(rows_ptr, OVERLAP)
    row = tl.program_id(0)
    if row < rows:
        cols = tl.program_id(1) * SHAPE.columns + tl.arange(0, SHAPE.columns)
        at = row.to(tl.int64)
        x = tl.load(x_ptr + at * SHAPE.x.stride + SHAPE.x.offset + cols, mask=cols < SHAPE.width)
        r = tl.load(r_ptr + at * SHAPE.r.stride + SHAPE.r.offset + cols, mask=cols < SHAPE.width)
        tl.store(out_ptr + at * SHAPE.out.stride + SHAPE.out.offset + cols, x + r, mask=cols < SHAPE.width)


@dataclass(frozen=True)
class Add(_Columns, kernels.Add):
    function = add_rows


@triton.jit
def embed_rows(rows_ptr, token_ids_ptr, table_ptr, scales_ptr, first_ptr, out_ptr, SHAPE: tl.constexpr, OVERLAP: tl.constexpr):
    rows = begin(rows_ptr, OVERLAP)
    row = tl.program_id(0)
    if row < rows:
        cols = tl.program_id(1) * SHAPE.columns + tl.arange(0, SHAPE.columns)
        wanted = tl.load(token_ids_ptr + row)
        if first_ptr is not None:
            wanted -= tl.load(first_ptr)
        # The index is kept inside the table for any input; a token that a partial table does not have gets zeros.
        token = tl.minimum(tl.maximum(wanted, 0), SHAPE.vocab - 1)
        value = tl.load(table_ptr + token.to(tl.int64) * SHAPE.depth + cols, mask=cols < SHAPE.width).to(tl.float32)
        if scales_ptr is not None:
            value *= tl.load(scales_ptr + token)
        if first_ptr is not None:
            value = tl.where(token == wanted, value, 0.0)
        tl.store(out_ptr + row.to(tl.int64) * SHAPE.out.stride + SHAPE.out.offset + cols, value, mask=cols < SHAPE.width)


@dataclass(frozen=True)
class _Embedding(_Columns, kernels.Embedding):
    """Rows of the table are padded with zeros."""

    function = embed_rows

    @property
    def depth(self) -> int:
        """The distance in elements from one token of the table to the next."""
        size = {"int8": 1, "float32": 4}[self.table]
        return round_up(self.width * size, DEPTH_ALIGNMENT) // size


@dataclass(frozen=True)
class FloatEmbedding(_Embedding, kernels.FloatEmbedding):
    pass


@dataclass(frozen=True)
class QuantizedEmbedding(_Embedding, kernels.QuantizedEmbedding):
    pass
