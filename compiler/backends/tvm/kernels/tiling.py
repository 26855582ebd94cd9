"""The order in which a linear kernel passes over weights and rows. Measurements choose it; it does not change results."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from belle_compile.compiler.backends.tvm.isa import Isa

TILES_OF_ONE_PLANE_FROM = 12  # rows from which a product of one AMX tile of tokens, which has 16, beats vectors
LINE = 64  # bytes of a cache line, and of one step of a panel of int8 weights


@dataclass(frozen=True)
class Walk:
    """The order of work for a range of row counts.

    A group is `wide` panels of 16 outputs; a block is a group times `tall` rows, whose sums are in registers. Weights are
    prefetched `prefetch` bytes ahead (0: not), into every cache level or, without `temporal`, with the hint that they are read
    once; with `chain`, a prefetch past a panel's end goes to the same panel of the next group. The loop over the inputs is
    unrolled `unroll` times, and reads each panel at `places` places at once, since some memories are faster with more streams.
    A parallel task is `task_groups` groups; threads get contiguous runs of tasks or, with `interleave`, every n-th one. A task
    passes over its groups for `row_blocks` blocks of rows at a time (0: all) and over `depth` inputs at a time (0: all, always
    so for two planes), so that activations and weights stay in a cache.
    """

    wide: int
    tall: int
    prefetch: int = 0
    temporal: bool = True
    chain: bool = False
    unroll: int = 1
    places: int = 1
    interleave: bool = False
    task_groups: int = 1
    row_blocks: int = 0
    depth: int = 0

    def __post_init__(self) -> None:
        if self.wide < 1 or self.tall < 1 or self.task_groups < 1 or self.row_blocks < 0:
            raise ValueError(f"{self}: wide, tall and task_groups are 1 or more, row_blocks 0 or more")
        if self.unroll not in (1, 2, 4) or self.prefetch % (4 * LINE) or self.prefetch < 0:
            raise ValueError(f"{self}: unroll is 1, 2 or 4 and prefetch a multiple of {4 * LINE}")
        if self.places not in (1, 2, 4, 8) or self.places * self.unroll > LINE // 4 or (self.depth and self.places > 1):
            raise ValueError(f"{self}: places is 1, 2, 4 or 8, at most {LINE // 4} with unroll, and 1 with depth")
        if self.depth < 0 or self.depth % LINE:
            raise ValueError(f"{self}: depth is a multiple of {LINE}")

    def to_plain(self) -> dict[str, Any]:
        """The walk as JSON values: `wide`, `tall` and the fields that differ from their defaults."""
        defaults = Walk(self.wide, self.tall)
        return {k: v for k, v in asdict(self).items() if k in ("wide", "tall") or v != getattr(defaults, k)}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Walk:
        """The reverse of `to_plain`. Raises ValueError or TypeError for a field that is unknown or has the wrong type."""
        types = {field.name: bool if field.type == "bool" else int for field in fields(cls)}
        if wrong := [name for name, value in plain.items() if type(value) is not types.get(name)]:
            raise ValueError(f"walk field {wrong[0]} is unknown or has the wrong type")
        return cls(**plain)


@dataclass(frozen=True)
class LinearTiling:
    """A walk for every row count: (largest row count or None for any, walk), ascending; the first whose bound holds is taken.

    With AMX, tile products take over from `tiles_from` rows on, `tile_panels` panels a task and `tile_wide` of them at a time.
    A trial that will run with certain row counts only names them in `trial_rows`, so that no code is generated for others.
    """

    walks: tuple[tuple[int | None, Walk], ...]
    tiles_from: int = 16
    tile_wide: int = 3
    tile_panels: int = 6
    trial_rows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        bounds = [bound for bound, _ in self.walks]
        if not bounds or bounds[-1] is not None or None in bounds[:-1] or sorted(set(bounds[:-1])) != bounds[:-1]:  # type: ignore[type-var]
            raise ValueError(f"row bounds {bounds}: they ascend and the last is None")
        if self.tiles_from < 1 or self.tile_wide not in (2, 3) or self.tile_panels < 1 or self.tile_panels % self.tile_wide:
            found = f"tiles from {self.tiles_from} rows, {self.tile_panels} panels a task, {self.tile_wide} at a time"
            raise ValueError(f"{found}: 1 or more rows, 2 or 3 at a time, a multiple of it a task")

    def walk_for(self, rows: int) -> Walk:
        """The walk for `rows` rows."""
        return next(walk for bound, walk in self.walks if bound is None or bound >= rows)


def built_in(isa: Isa, planes: int = 1) -> LinearTiling:
    """The tiling of shapes that have not been measured.

    AVX512 has 32 registers, AVX2 has 16 of half the width, and a row of two planes takes twice as many. Rows that do not fill a
    block are limited by memory, so weights are prefetched for them, and always where a block is one row.
    """
    wide, tall = (4, 6 // planes) if isa.dot == "vnni" else (2, 2 // planes)
    few = Walk(wide, tall, prefetch=2048)
    walks = ((tall - 1, few), (None, Walk(wide, tall))) if tall > 1 else ((None, few),)
    return LinearTiling(walks, tiles_from=LinearTiling.tiles_from if planes > 1 else TILES_OF_ONE_PLANE_FROM)
