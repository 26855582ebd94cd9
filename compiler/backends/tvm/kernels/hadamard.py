"""The Walsh-Hadamard transform of a row's blocks, in registers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.base import Kernel
from belle_compile.compiler.backends.tvm.tir import LANES, Buffer, Expr, T
from belle_compile.compiler.ir.meanings import golay_signs

_AT_ONCE = 4  # vectors in registers; 8 save 0.1 us in a row of 1,536 with AVX-512 and take three times as long to compile


@dataclass(frozen=True)
class BlockHadamard(Kernel, kernels.BlockHadamard):
    """Computes belle::BlockHadamard bit for bit as its meaning does."""

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        rows, x, out = buffers

        def transform(row: Expr) -> None:
            start, target = tir.bind(self.x.row(row)), tir.bind(self.out.row(row))
            transform_row(self.width, self.block, lambda c: tir.load(x, start + c), out, target)

        tir.for_rows(tir.rows_of(rows), transform)


def transform_row(
    width: int,
    block: int,
    read: Callable[[Expr], Expr],
    out: Buffer,
    target: Expr,
    on_result: Callable[[Expr], None] | None = None,
) -> None:
    """Transform a row and write it to `out` from `target`.

    `read(column)` gives 16 values of the row, each of which is read once and before its place in the row is written;
    `on_result` is called with every 16 results.

    The butterflies are those of the op's meaning; how many stages are done between two visits to memory changes no bit.
    """
    assert block >= LANES and not block & (block - 1) and not width % block, f"{width} in blocks of {block}"
    vectors = block // LANES  # number of vectors of a block
    scale = tir.splat(block**-0.5)

    def store(values: list[Expr], first: Expr, stride: int) -> None:
        """Do the stages across vectors that lie `stride` apart, scale after the last one, and store."""
        last = stride * len(values) == vectors
        for number, value in enumerate(_across(values)):
            result = tir.bind(value * scale) if last else value
            tir.store(out, first + number * stride * LANES, result)
            if last and on_result:
                on_result(result)

    radix = min(_AT_ONCE, vectors)

    def begin(group: Expr) -> None:
        column = tir.bind(group * radix * LANES)
        signs = _group_signs(group, vectors // radix, radix)
        signed = [read(column + u * LANES) * sign for u, sign in enumerate(signs)]
        store([_within(vector) for vector in signed], target + column, 1)

    tir.for_range(width // (radix * LANES), begin)
    stride = radix
    while stride < vectors:
        radix = min(_AT_ONCE, vectors // stride)

        def combine(index: Expr, stride: int = stride, radix: int = radix) -> None:
            outer, inner = T.floordiv(index, tir.i64(stride)), T.floormod(index, tir.i64(stride))
            first = tir.bind(target + (outer * stride * radix + inner) * LANES)
            store([tir.load(out, first + k * stride * LANES) for k in range(radix)], first, stride)

        tir.for_range(width // (radix * LANES), combine)
        stride *= radix


def _group_signs(group: Expr, groups: int, vectors: int) -> list[Expr]:
    """Golay's signs of the vectors in a group, one of `groups` (a power of two) in a block.

    They are those of the first group, with the second half negated if the group's number is odd, and all negated if the
    sequence has -1 at that number.
    """
    first = [tir.constants(signs) for signs in golay_signs(vectors * LANES).reshape(-1, LANES).tolist()]
    if groups == 1:
        return first
    number = tir.bind(T.bitwise_and(group, tir.i64(groups - 1)))
    neighbours = T.popcount(T.bitwise_and(number, T.shift_right(number, tir.i64(1))))
    sign, parity = (
        T.float32(1.0) - T.cast(T.bitwise_and(n, tir.i64(1)), "float32") * T.float32(2.0) for n in (neighbours, number)
    )
    halves = [tir.bind(tir.splat(tir.bind(half))) for half in (sign, sign * parity)]
    return [constants * halves[2 * v >= vectors] for v, constants in enumerate(first)]


def _within(vector: Expr) -> Expr:
    """The stages inside of a vector: each lane becomes the sum or the difference of both partners."""
    for half in (1, 2, 4, 8):
        vector = tir.bind(vector)
        partner = T.Shuffle([vector], [T.int32(lane ^ half) for lane in range(LANES)])
        signs = tir.constants([-1.0 if lane & half else 1.0 for lane in range(LANES)])
        vector = tir.fma(vector, signs, partner)  # the product is exact
    return vector


def _across(vectors: list[Expr]) -> list[Expr]:
    """The stages between vectors."""
    half, vectors = 1, [tir.bind(vector) for vector in vectors]
    while half < len(vectors):
        for i in (i for i in range(len(vectors)) if i & half == 0):
            low, high = vectors[i], vectors[i + half]
            vectors[i], vectors[i + half] = tir.bind(low + high), tir.bind(low - high)
        half *= 2
    return vectors
