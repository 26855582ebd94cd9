"""Kernels that move, add or look up whole rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.program.kernel import round_up
from belle_compile.compiler.backends.triton.kernels.base import Kernel, Start, of_view, power_of_two, warps_for
from belle_compile.compiler.backends.triton.kernels.device import begin

_COLUMNS = 1024  # of a block of threads; wider rows have several
DEPTH_ALIGNMENT = 64  # rows of matrices start at multiples of so many bytes


@triton.jit
def gather_rows(rows_ptr, indices_ptr, x_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, X_STRIDE: tl.constexpr,
                X_OFFSET: tl.constexpr, OUT_STRIDE: tl.constexpr, OUT_OFFSET: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    rows = begin(rows_ptr, OVERLAP)
    row = tl.program_id(0)
    if row < rows:
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        source = tl.load(indices_ptr + row).to(tl.int64) * X_STRIDE + X_OFFSET
        value = tl.load(x_ptr + source + cols, mask=cols < WIDTH)
        tl.store(out_ptr + row.to(tl.int64) * OUT_STRIDE + OUT_OFFSET + cols, value, mask=cols < WIDTH)


@triton.jit
def add_rows(rows_ptr, x_ptr, r_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, X_STRIDE: tl.constexpr,
             X_OFFSET: tl.constexpr, R_STRIDE: tl.constexpr, R_OFFSET: tl.constexpr, OUT_STRIDE: tl.constexpr,
             OUT_OFFSET: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    rows = begin(rows_ptr, OVERLAP)
    row = tl.program_id(0)
    if row < rows:
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at = row.to(tl.int64)
        x = tl.load(x_ptr + at * X_STRIDE + X_OFFSET + cols, mask=cols < WIDTH)
        r = tl.load(r_ptr + at * R_STRIDE + R_OFFSET + cols, mask=cols < WIDTH)
        tl.store(out_ptr + at * OUT_STRIDE + OUT_OFFSET + cols, x + r, mask=cols < WIDTH)


@triton.jit
def embed_rows(rows_ptr, token_ids_ptr, table_ptr, scales_ptr, first_ptr, out_ptr, VOCAB: tl.constexpr, WIDTH: tl.constexpr,
               DEPTH: tl.constexpr, BLOCK: tl.constexpr, OUT_STRIDE: tl.constexpr, OUT_OFFSET: tl.constexpr,
               OVERLAP: tl.constexpr):  # fmt: skip
    rows = begin(rows_ptr, OVERLAP)
    row = tl.program_id(0)
    if row < rows:
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        wanted = tl.load(token_ids_ptr + row)
        if first_ptr is not None:
            wanted -= tl.load(first_ptr)
        # Kept inside the table whatever the caller sent; a token that a partial table does not have is zeros.
        token = tl.minimum(tl.maximum(wanted, 0), VOCAB - 1)
        value = tl.load(table_ptr + token.to(tl.int64) * DEPTH + cols, mask=cols < WIDTH).to(tl.float32)
        if scales_ptr is not None:
            value *= tl.load(scales_ptr + token)
        if first_ptr is not None:
            value = tl.where(token == wanted, value, 0.0)
        tl.store(out_ptr + row.to(tl.int64) * OUT_STRIDE + OUT_OFFSET + cols, value, mask=cols < WIDTH)


def _block(width: int) -> int:
    """Columns of a program."""
    return min(_COLUMNS, power_of_two(width))


def _start(width: int) -> Start:
    """A program has `_block(width)` columns of a row."""
    block = _block(width)
    return Start((1, -(-width // block), 1), 1, warps_for(block))


@dataclass(frozen=True)
class GatherRows(Kernel, kernels.GatherRows):
    """A program copies some columns of a row."""

    function = gather_rows

    def start(self) -> Start:
        return _start(self.width)

    def constants(self) -> Mapping[str, Any]:
        return {"WIDTH": self.width, "BLOCK": _block(self.width), **of_view("X", self.x), **of_view("OUT", self.out)}


@dataclass(frozen=True)
class Add(Kernel, kernels.Add):
    """A program adds some columns of a row."""

    function = add_rows

    def start(self) -> Start:
        return _start(self.width)

    def constants(self) -> Mapping[str, Any]:
        views = {**of_view("X", self.x), **of_view("R", self.r), **of_view("OUT", self.out)}
        return {"WIDTH": self.width, "BLOCK": _block(self.width), **views}


@dataclass(frozen=True)
class _Embedding(Kernel, kernels.Embedding):
    """A program looks up some columns of a token."""

    function = embed_rows

    def start(self) -> Start:
        return _start(self.width)

    def constants(self) -> Mapping[str, Any]:
        size = {"int8": 1, "float32": 4}[self.table]
        sizes = {"VOCAB": self.vocab, "WIDTH": self.width, "DEPTH": round_up(self.width * size, DEPTH_ALIGNMENT) // size}
        return {"scales_ptr": None, "first_ptr": None, **sizes, "BLOCK": _block(self.width), **of_view("OUT", self.out)}


@dataclass(frozen=True)
class FloatEmbedding(_Embedding, kernels.FloatEmbedding):
    """Rows of a float32 table."""


@dataclass(frozen=True)
class QuantizedEmbedding(_Embedding, kernels.QuantizedEmbedding):
    """Rows of an int8 table, times the scale of the token."""
