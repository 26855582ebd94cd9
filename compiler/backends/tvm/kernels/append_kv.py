"""Writes the keys and values of a step into the paged cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compiler.backends.tvm import tir
from compiler.backends.tvm.isa import Isa
from compiler.backends.tvm.kernels.base import Kernel, View
from compiler.backends.tvm.kernels.rotary import rotate_head
from compiler.backends.tvm.kernels.rowwise import each
from compiler.backends.tvm.tir import Buffer, Expr, T

BLOCK = 16  # tokens per block of the cache
SERIAL_BELOW = 2048  # elements of k that one thread writes sooner than it wakes another


@dataclass(frozen=True)
class AppendKV(Kernel):
    """k and v of every row to the slot of its position: k [block][kv head][head_dim][16], v [block][kv head][16][head_dim].

    Keys are stored transposed, so that attention multiplies one element of q with 16 tokens at a time. They are
    rotated first when `rotary`.
    """

    kind: ClassVar[str] = "append_kv"
    num_kv_heads: int
    head_dim: int
    k: View
    v: View
    max_blocks: int
    cache_dtype: str
    rotary: bool

    def pointers(self) -> tuple[tuple[str, str], ...]:
        cos_sin = (("cos_sin", "float32"),) if self.rotary else ()
        return (("rows", "int32"), ("k", "float32"), ("v", "float32"), ("positions", "int32"), ("sequences", "int32"),
                ("block_table", "int32"), *cos_sin, ("kcache", self.cache_dtype), ("vcache", self.cache_dtype))  # fmt: skip

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        named = dict(zip((name for name, _ in self.pointers()), buffers, strict=True))
        rows = tir.rows_of(named["rows"])

        def task(index: Expr) -> None:
            """Heads are outermost: a thread writes whole cache lines, and is the one that will read them."""
            self._append(tir.bind(T.floormod(index, rows)), tir.bind(T.floordiv(index, rows)), named)

        tasks = tir.bind(rows * self.num_kv_heads)
        serial = tasks * self.head_dim < tir.i64(SERIAL_BELOW)
        tir.either(serial, lambda: tir.for_range(tasks, task), lambda: tir.parallel(tasks, task))

    def _append(self, row: Expr, head: Expr, named: dict[str, Buffer]) -> None:
        dim = self.head_dim
        position = tir.bind(tir.i64(named["positions"][row]))
        entry = tir.i64(named["sequences"][row]) * self.max_blocks + T.floordiv(position, BLOCK)
        block = tir.bind((tir.i64(named["block_table"][entry]) * self.num_kv_heads + head) * (dim * BLOCK))
        slot = tir.bind(T.floormod(position, BLOCK))

        def stored(value: Expr, lanes: int) -> Expr:
            return T.cast(value, tir.with_lanes(self.cache_dtype, lanes))

        source = tir.bind(self.k.row(row) + head * dim)
        rotated = tir.local(dim, self.cache_dtype)
        rotate_head(dim, lambda c, lanes: tir.load(named["k"], source + c, lanes), named.get("cos_sin"), row,
                    lambda c, lanes, value: tir.store(rotated, c, stored(value, lanes), lanes))  # fmt: skip
        tir.for_range(dim, lambda d: tir.store(named["kcache"], block + d * BLOCK + slot, rotated[d], 1))

        values, start = tir.bind(self.v.row(row) + head * dim), tir.bind(block + slot * dim)
        each(dim, lambda c, lanes: tir.store(
            named["vcache"], start + c, stored(tir.load(named["v"], values + c, lanes), lanes), lanes))  # fmt: skip
