"""Embedding lookups in tables packed like the weights of a linear layer, so that a tied LM head shares them."""

from __future__ import annotations

from dataclasses import dataclass

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.program.kernel import round_up
from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.base import Kernel
from belle_compile.compiler.backends.tvm.kernels.panels import PANEL
from belle_compile.compiler.backends.tvm.kernels.quantized_linear import INPUT_ALIGNMENT
from belle_compile.compiler.backends.tvm.tir import Buffer, Expr, T


def _token(token_ids: Buffer, row: Expr, vocab: int, first: Buffer | None) -> tuple[Expr, Expr]:
    """The row of the table for a token, clamped to the table for any input; for a partial table also 1.0 if it has the token,
    else 0.0."""
    wanted = token_ids[row] if first is None else T.bind(token_ids[row] - first[0])
    inside = T.max(T.min(wanted, T.int32(vocab - 1)), T.int32(0))
    known = None if first is None else T.bind(T.Select(wanted == inside, T.float32(1), T.float32(0)))
    return tir.bind(tir.i64(inside)), known


@dataclass(frozen=True)
class FloatEmbedding(Kernel, kernels.FloatEmbedding):
    """The table is packed [vocab/16][width][16]."""

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        rows, token_ids, table, *first, out = buffers

        def lookup(row: Expr) -> None:
            token, known = _token(token_ids, row, self.vocab, *(first or [None]))
            source = tir.bind(T.floordiv(token, PANEL) * (self.width * PANEL) + T.floormod(token, PANEL))
            target = tir.bind(self.out.row(row))

            def copy(k: Expr) -> None:
                value = table[source + k * PANEL]
                tir.store(out, target + k, value if known is None else value * known, 1)

            tir.for_range(self.width, copy)

        tir.for_rows(tir.rows_of(rows), lookup)


@dataclass(frozen=True)
class QuantizedEmbedding(Kernel, kernels.QuantizedEmbedding):
    """The table is packed [vocab/16][width/4][16][4]."""

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        rows, token_ids, table, scales, *first, out = buffers
        depth = round_up(self.width, INPUT_ALIGNMENT)

        def lookup(row: Expr) -> None:
            token, known = _token(token_ids, row, self.vocab, *(first or [None]))
            source = tir.bind(T.floordiv(token, PANEL) * (depth * PANEL) + T.floormod(token, PANEL) * 4)
            target = tir.bind(self.out.row(row))
            scale = tir.bind(scales[token] if known is None else scales[token] * known)

            def group(start: Expr, lanes: int) -> None:
                """Copy `lanes` elements of one group of four, which are neighbours in the table."""
                values = tir.load(table, source + start * PANEL, lanes)
                floats = T.cast(values, tir.float_type(lanes)) * tir.splat(scale, lanes)
                tir.store(out, target + start, floats, lanes)

            tir.for_range(self.width // 4, lambda g: group(g * 4, 4))
            for k in range(self.width % 4):
                start = self.width // 4 * 4
                tir.store(out, target + start + k, T.cast(table[source + start * PANEL + k], "float32") * scale, 1)

        tir.for_rows(tir.rows_of(rows), lookup)
