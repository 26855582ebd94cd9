"""The walk of the linear kernels over weights in panels of 16 outputs: groups of panels in parallel, blocks of rows inside."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.kernels.tiling import Walk
from belle_compile.compiler.backends.tvm.tir import Expr, T

PANEL = 16


@dataclass(frozen=True)
class Block:
    """The sums that are in registers at once: `height` rows from `row` by `width` panels from `panel`, for one slice of the
    inputs. Height and width are static, the other numbers are expressions."""

    panel: Expr
    width: int
    row: Expr
    height: int
    part: Expr  # number of the slice


@dataclass(frozen=True)
class BlockLoop:
    """The loops that emit a block for all `rows` x `panels` in the order of `walk`.

    A group of panels stays in the core's cache while the rows pass it, `walk.tall` at a time; fewer rows (decode) are one
    block of exactly that many, so each weight is read once. If `counts` is given, `rows` is one of them, and blocks of heights
    that cannot occur are left out. The inputs come in `slices`, each of which passes all rows before the next.
    """

    rows: Expr
    panels: int
    walk: Walk
    emit: Callable[[Block], None]
    counts: Collection[int] | None = None
    slices: int = 1

    @property
    def _groups(self) -> int:
        return -(-self.panels // self.walk.wide)

    def run(self) -> None:
        """Emit the loops."""
        walk = self.walk
        if walk.task_groups == 1 and not walk.row_blocks:
            tir.parallel(self._groups, lambda index: self._group(index, tir.i64(0), self.rows), walk.interleave)
        else:
            tir.parallel(-(-self._groups // walk.task_groups), self._task, walk.interleave)

    def _task(self, index: Expr) -> None:
        """Emit the groups of a parallel task, for all rows or for some blocks of rows after the other."""
        walk = self.walk
        first = tir.bind(index * walk.task_groups)
        last = tir.bind(T.min(first + walk.task_groups, tir.i64(self._groups)))

        def groups_for(start: Expr, count: Expr) -> None:
            tir.for_range(last, lambda group: self._group(group, start, count), start=first)

        if not walk.row_blocks:
            groups_for(tir.i64(0), self.rows)
            return
        at_once = walk.row_blocks * walk.tall

        def one_pass(index: Expr) -> None:
            start = tir.bind(index * at_once)
            groups_for(start, tir.bind(T.min(self.rows - start, tir.i64(at_once))))

        tir.for_range(T.floordiv(self.rows + (at_once - 1), tir.i64(at_once)), one_pass)

    def _group(self, index: Expr, start: Expr, count: Expr) -> None:
        """One group of panels for `count` rows from `start`; the last group may be narrower."""
        panel = tir.bind(index * self.walk.wide)
        full, rest = divmod(self.panels, self.walk.wide)

        def of_width(width: int) -> None:
            if self.slices == 1:
                self._all_rows(panel, width, start, count, tir.i64(0))
            else:
                tir.for_range(self.slices, lambda part: self._all_rows(panel, width, start, count, part))

        if not rest:
            of_width(self.walk.wide)
        elif not full:
            of_width(rest)
        else:
            tir.either(index < tir.i64(full), lambda: of_width(self.walk.wide), lambda: of_width(rest))

    def _all_rows(self, panel: Expr, width: int, start: Expr, count: Expr, part: Expr) -> None:
        """Emit whole blocks, then one block of the rows that are left."""
        tall = self.walk.tall
        whole: Expr = tir.i64(0)
        if self.counts is None or max(self.counts) >= tall:
            whole = tir.bind(T.floordiv(count, tir.i64(tall)))
            tir.for_range(whole, lambda b: self.emit(Block(panel, width, tir.bind(start + b * tall), tall, part)))
        left = tir.bind(count - whole * tall)
        for height in self._heights_left():
            with tir.when(left == tir.i64(height)):
                self.emit(Block(panel, width, tir.bind(start + whole * tall), height, part))

    def _heights_left(self) -> Collection[int]:
        """Heights that the last block can have."""
        tall = self.walk.tall
        if self.counts is None or len(self.counts) >= tall * 2:
            return range(1, tall)
        return sorted({count % tall for count in self.counts} - {0})
