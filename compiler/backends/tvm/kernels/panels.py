"""How the linear kernels walk weights stored in panels of 16 outputs: groups of panels in parallel, blocks of rows inside."""

from __future__ import annotations

from collections.abc import Callable, Collection

from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.kernels.tiling import Walk
from belle_compile.compiler.backends.tvm.tir import Expr

PANEL = 16
Block = Callable[[Expr, int, Expr, int, Expr], None]


def for_blocks(rows: Expr, panels: int, walk: Walk, block: Block, counts: Collection[int] | None = None,
               slices: int = 1) -> None:  # fmt: skip
    """`block(first panel, number of panels, first row, number of rows, slice)` over `rows` x `panels` in the order of `walk`;
    both numbers are static.

    A group of panels stays in the core's cache while the rows pass it, `walk.tall` at a time; fewer rows (decode) are one
    block of exactly that many, so each weight is read once. `rows` is known to be one of `counts`, if given: blocks of
    heights that cannot occur are left out. The inputs come in `slices`, each of which passes all rows before the next.
    """
    full, rest = divmod(panels, walk.wide)
    groups = full + bool(rest)
    whole_blocks = counts is None or max(counts) >= walk.tall
    every = counts is None or len(counts) >= walk.tall * 2
    heights = range(1, walk.tall) if every else sorted({count % walk.tall for count in counts or ()} - {0})

    def all_rows(first: Expr, width: int, start: Expr, count: Expr, part: Expr) -> None:
        whole: Expr = tir.i64(0)
        if whole_blocks:
            whole = tir.bind(tir.T.floordiv(count, tir.i64(walk.tall)))
            tir.for_range(whole, lambda b: block(first, width, tir.bind(start + b * walk.tall), walk.tall, part))
        left = tir.bind(count - whole * walk.tall)
        for height in heights:
            with tir.when(left == tir.i64(height)):
                block(first, width, tir.bind(start + whole * walk.tall), height, part)

    def group(index: Expr, start: Expr, count: Expr) -> None:
        first = tir.bind(index * walk.wide)

        def panels_of(width: int) -> None:
            if slices == 1:
                all_rows(first, width, start, count, tir.i64(0))
            else:
                tir.for_range(slices, lambda part: all_rows(first, width, start, count, part))

        if not rest:
            panels_of(walk.wide)
        elif not full:
            panels_of(rest)
        else:
            tir.either(index < tir.i64(full), lambda: panels_of(walk.wide), lambda: panels_of(rest))

    def task(index: Expr) -> None:
        first = tir.bind(index * walk.task_groups)
        last = tir.bind(tir.T.min(first + walk.task_groups, tir.i64(groups)))

        def groups_for(start: Expr, count: Expr) -> None:
            tir.for_range(last, lambda g: group(g, start, count), start=first)

        if not walk.row_blocks:
            groups_for(tir.i64(0), rows)
            return
        at_once = walk.row_blocks * walk.tall

        def one_pass(index: Expr) -> None:
            start = tir.bind(index * at_once)
            groups_for(start, tir.bind(tir.T.min(rows - start, tir.i64(at_once))))

        tir.for_range(tir.T.floordiv(rows + (at_once - 1), tir.i64(at_once)), one_pass)

    if walk.task_groups == 1 and not walk.row_blocks:
        tir.parallel(groups, lambda index: group(index, tir.i64(0), rows), walk.interleave)
    else:
        tir.parallel(-(-groups // walk.task_groups), task, walk.interleave)
