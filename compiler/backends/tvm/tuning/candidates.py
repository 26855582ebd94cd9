"""The candidates of the search as data: for each range of row counts, blocks of panels x rows, then changes to the best one.

The sums of a block, one token and its weights must fit in the registers. AVX512 has 32, and a panel of 16 sums takes one:
panels * rows + panels + 1 <= 32 (a single row takes its weights from memory). AVX2 has 16; a panel takes two, a token three.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.tiling import LINE, Walk

Change = dict[str, Any]
LEAST_TASKS = 16  # a walk must leave this many tasks, since other hosts may have more threads than the one that measures
PANELS_OF_TASK = 8  # a walk with at most this many panels a task is tried whatever the number of tasks
TILES = ((2, 4), (2, 8), (3, 3), (3, 6), (3, 12))  # tile products: (panels at a time, panels of a parallel task)


@dataclass(frozen=True)
class Bucket:
    """A range of row counts up to `most` (None: any) that share a walk, which is measured at the counts in `rows`.

    `blocks` are (panels, rows), each tried with the prefetch distance `prefetch`, which goes on into the next group, and
    without. Then the changes of each of `stages` are tried on the best walk so far.
    """

    most: int | None
    rows: tuple[int, ...]
    blocks: tuple[tuple[int, int], ...]
    prefetch: int
    stages: tuple[tuple[Change, ...], ...]

    def first(self) -> tuple[Walk, ...]:
        """The walks that are tried first, with and without prefetch: some processors prefetch better by themselves."""
        every = (Walk(wide, tall, ahead, chain=ahead > 0) for ahead in (self.prefetch, 0) for wide, tall in self.blocks)
        return tuple(dict.fromkeys(every))

    def following(self, stage: int, best: Walk) -> tuple[Walk, ...]:
        """The best walk so far with each change of a stage that it allows."""
        allowed = (c for c in self.stages[stage] if c.get("places", best.places) * c.get("unroll", best.unroll) <= LINE // 4)
        return tuple(dict.fromkeys(replace(best, **change) for change in allowed))


# Streams for one row: some processors prefetch best by themselves, and more so with more streams.
_STREAMS: tuple[Change, ...] = (
    {"places": 2, "prefetch": 0},
    {"places": 4, "prefetch": 0},
    {"places": 8, "prefetch": 0},
    {"places": 2},
)
# Prefetches for few rows, whose weights come from memory; "chain" matters if panels are short. Where several blocks of rows
# pass over a panel, only the first one waits for memory, and only a distance about as long as a panel or longer lets the others
# prefetch meanwhile.
_PREFETCH: tuple[Change, ...] = (
    {"prefetch": 0},
    {"prefetch": 512},
    {"prefetch": 1024},
    {"prefetch": 2048},
    {"prefetch": 4096},
    {"prefetch": 1024, "chain": True},
    {"prefetch": 2048, "chain": True},
    {"prefetch": 4096, "chain": True},
    {"prefetch": 8192, "chain": True},
    {"prefetch": 16384, "chain": True},
    {"prefetch": 2048, "temporal": False},
    {"prefetch": 1024, "chain": True, "temporal": False},
    {"prefetch": 8192, "chain": True, "temporal": False},
)
_FEW_PREFETCHES: tuple[Change, ...] = (
    {"prefetch": 0},
    {"prefetch": 1024},
    {"prefetch": 1024, "chain": True},
    {"prefetch": 4096, "chain": True},
    {"prefetch": 16384, "chain": True},
)
_LOOPS: tuple[Change, ...] = ({"unroll": 2}, {"unroll": 4}, {"interleave": True}, {"task_groups": 4}, {"task_groups": 16})
_FEW_LOOPS: tuple[Change, ...] = ({"unroll": 2}, {"interleave": True})
# Passes for prefill: over rows, so that their activations stay in the L2 cache; over inputs, so that weights stay in L1.
_PASSES: tuple[Change, ...] = (
    {"unroll": 2},
    {"task_groups": 8, "row_blocks": 8},
    {"task_groups": 32, "row_blocks": 16},
    {"depth": 512},
    {"depth": 1024},
    {"depth": 2048},
)


def _without(changes: tuple[Change, ...], left_out: Change) -> tuple[Change, ...]:
    return tuple(change for change in changes if change != left_out)


AVX512 = (
    Bucket(1, (1,), ((1, 1), (2, 1), (4, 1), (6, 1), (8, 1), (16, 1)), 2048, (_STREAMS, _PREFETCH, _LOOPS)),
    Bucket(4, (2, 4), ((1, 4), (2, 4), (3, 4), (4, 4), (6, 4)), 8192, (_PREFETCH, _FEW_LOOPS)),
    Bucket(8, (8,), ((1, 8), (2, 8), (3, 8), (4, 4), (4, 6), (6, 4)), 8192, (_PREFETCH, _FEW_LOOPS)),
    Bucket(16, (12, 16), ((1, 16), (2, 8), (2, 12), (3, 8), (4, 6)), 8192, (_FEW_PREFETCHES, _FEW_LOOPS)),
    Bucket(32, (24, 32), ((1, 16), (2, 8), (2, 12), (3, 8), (4, 4), (4, 6)), 8192, (_FEW_PREFETCHES, _FEW_LOOPS)),
    Bucket(None, (128, 512), ((2, 8), (2, 12), (3, 8), (4, 4), (4, 6)), 8192, (_FEW_PREFETCHES, _PASSES)),
)
# With AVX2, an unrolled loop over more than one row spills registers, and so does one row, unrolled by four, over four panels.
AVX2 = (
    Bucket(1, (1,), ((1, 1), (2, 1), (3, 1), (4, 1)), 2048, (_PREFETCH, _without(_LOOPS, {"unroll": 4}))),
    Bucket(8, (2, 4, 8), ((1, 2), (1, 4), (2, 1), (2, 2)), 2048, (_PREFETCH, _without(_FEW_LOOPS, {"unroll": 2}))),
    Bucket(None, (16, 32, 128, 512), ((1, 2), (1, 3), (1, 4), (2, 2)), 0, (_FEW_PREFETCHES, _without(_PASSES, {"unroll": 2}))),
)
AMX = (*AVX512[:3], replace(AVX512[3], most=None))  # tile products take larger row counts
TILE_ROWS = (4, 8, 12, 16, 32, 128, 512)


def leaves_tasks(walk: Walk, panels: int) -> bool:
    """Whether a walk divides `panels` panels into enough tasks for hosts with more threads than this one."""
    at_once = walk.wide * walk.task_groups
    return bool(walk.row_blocks) or at_once <= PANELS_OF_TASK or -(-panels // at_once) >= LEAST_TASKS


def buckets(isa: Isa, planes: int, max_rows: int) -> tuple[Bucket, ...]:
    """The buckets for kernels that get at most `max_rows` rows.

    With two planes each row counts twice: blocks with half the rows are added, those with too many sums are left out, and
    changes of `depth` are not tried.
    """
    every = AMX if isa.amx else AVX512 if isa.dot == "vnni" else AVX2
    kept = [replace(b, rows=rows) for b in every if (rows := tuple(r for r in b.rows if r <= max_rows))]
    kept[-1] = replace(kept[-1], most=None)
    if planes == 1:
        return tuple(kept)
    most_sums = 24 if isa.dot == "vnni" else 4

    def adapted(bucket: Bucket) -> Bucket:
        every = dict.fromkeys((wide, max(1, tall // part)) for wide, tall in bucket.blocks for part in (planes, 1))
        blocks = tuple((wide, tall) for wide, tall in every if wide * tall * planes <= most_sums)
        stages = tuple(tuple(change for change in stage if "depth" not in change) for stage in bucket.stages)
        return replace(bucket, blocks=blocks, stages=stages)

    return tuple(map(adapted, kept))
