"""Embedding lookups in tables packed like the weights of a linear layer, so that a tied LM head shares them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compiler.backends.tvm import tir
from compiler.backends.tvm.isa import Isa
from compiler.backends.tvm.kernels.base import Kernel, View, round_up
from compiler.backends.tvm.kernels.panels import PANEL
from compiler.backends.tvm.kernels.quantized_linear import INPUT_ALIGNMENT
from compiler.backends.tvm.tir import Buffer, Expr, T


def _token(token_ids: Buffer, row: Expr, vocab: int) -> Expr:
    """The token of a row, kept inside the table whatever the caller sent."""
    return tir.bind(tir.i64(T.max(T.min(token_ids[row], T.int32(vocab - 1)), T.int32(0))))


@dataclass(frozen=True)
class FloatEmbedding(Kernel):
    """out[t] = table[token_ids[t]], table packed [vocab/16][width][16]"""

    kind: ClassVar[str] = "embedding"
    vocab: int
    width: int
    out: View

    def pointers(self) -> tuple[tuple[str, str], ...]:
        return (("rows", "int32"), ("token_ids", "int32"), ("table", "float32"), ("out", "float32"))

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        rows, token_ids, table, out = buffers

        def lookup(row: Expr) -> None:
            token = _token(token_ids, row, self.vocab)
            source = tir.bind(T.floordiv(token, PANEL) * (self.width * PANEL) + T.floormod(token, PANEL))
            target = tir.bind(self.out.row(row))
            tir.for_range(self.width, lambda k: tir.store(out, target + k, table[source + k * PANEL], 1))

        tir.for_rows(tir.rows_of(rows), lookup)


@dataclass(frozen=True)
class QuantizedEmbedding(Kernel):
    """out[t] = table[token_ids[t]] * scales[token_ids[t]], table packed [vocab/16][width/4][16][4]"""

    kind: ClassVar[str] = "qembedding"
    vocab: int
    width: int
    out: View

    def pointers(self) -> tuple[tuple[str, str], ...]:
        return (("rows", "int32"), ("token_ids", "int32"), ("table", "int8"), ("scales", "float32"), ("out", "float32"))

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        rows, token_ids, table, scales, out = buffers
        depth = round_up(self.width, INPUT_ALIGNMENT)

        def lookup(row: Expr) -> None:
            token = _token(token_ids, row, self.vocab)
            source = tir.bind(T.floordiv(token, PANEL) * (depth * PANEL) + T.floormod(token, PANEL) * 4)
            target = tir.bind(self.out.row(row))
            scale = tir.bind(scales[token])

            def group(start: Expr, lanes: int) -> None:
                """`lanes` inputs of one group of four, which are neighbours."""
                values = tir.load(table, source + start * PANEL, lanes)
                floats = T.cast(values, tir.float_type(lanes)) * tir.splat(scale, lanes)
                tir.store(out, target + start, floats, lanes)

            tir.for_range(self.width // 4, lambda g: group(g * 4, 4))
            for k in range(self.width % 4):
                start = self.width // 4 * 4
                tir.store(out, target + start + k, T.cast(table[source + start * PANEL + k], "float32") * scale, 1)

        tir.for_rows(tir.rows_of(rows), lookup)
