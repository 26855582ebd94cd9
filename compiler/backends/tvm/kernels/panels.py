"""How the linear kernels walk weights stored in panels of 16 outputs: groups of panels in parallel, blocks of rows inside."""

from __future__ import annotations

from collections.abc import Callable

from compiler.backends.tvm import tir
from compiler.backends.tvm.tir import Expr

PANEL = 16


def for_blocks(rows: Expr, panels: int, wide: int, tall: int, block: Callable[[Expr, int, Expr, int], None]) -> None:
    """`block(first panel, number of panels, first row, number of rows)` over `rows` x `panels`; both numbers are static.

    A group of `wide` panels stays in the core's cache while all rows pass it, `tall` at a time; fewer rows (decode)
    are one block of exactly that many, so each weight is read once.
    """
    full, rest = divmod(panels, wide)

    def group(index: Expr) -> None:
        first = tir.bind(index * wide)

        def all_rows(width: int) -> None:
            whole = tir.bind(tir.T.floordiv(rows, tir.i64(tall)))
            tir.for_range(whole, lambda b: block(first, width, tir.bind(b * tall), tall))
            left = tir.bind(rows - whole * tall)
            for height in range(1, tall):
                with tir.when(left == tir.i64(height)):
                    block(first, width, tir.bind(whole * tall), height)

        if not rest:
            all_rows(wide)
        elif not full:
            all_rows(rest)
        else:
            tir.either(index < tir.i64(full), lambda: all_rows(wide), lambda: all_rows(rest))

    tir.parallel(full + bool(rest), group)
