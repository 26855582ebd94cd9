"""What the search tries, as data: per range of row counts, blocks of panels x rows, then changes to the best of them.

A block's sums, one token and its weights must fit in the registers: panels * rows + panels + 1 <= 32 with AVX512, where
a panel of 16 sums is a register (a single row takes its weights from memory); AVX2 has 16, a panel takes two, and a token
takes three.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.tiling import Walk

Change = dict[str, Any]
LEAST_TASKS = 16  # of a row count that waits for the memory: a host may have more threads than the one that measures
PANELS_OF_TASK = 8  # that are tried whatever the number of tasks
TILES = ((2, 4), (2, 8), (3, 3), (3, 6), (3, 12))  # of tile products: panels at a time, and of a parallel task


@dataclass(frozen=True)
class Bucket:
    """Row counts up to `most` (None: any) that share a walk, judged by those in `rows`.

    `blocks` are (panels, rows) tried with `prefetch` and without; each of `stages` is tried on the best walk so far.
    """

    most: int | None
    rows: tuple[int, ...]
    blocks: tuple[tuple[int, int], ...]
    prefetch: int
    stages: tuple[tuple[Change, ...], ...]

    def first(self) -> tuple[Walk, ...]:
        """The walks of the first stage: some processors fetch ahead better by themselves."""
        return tuple(dict.fromkeys(Walk(wide, tall, ahead) for ahead in (self.prefetch, 0) for wide, tall in self.blocks))

    def following(self, stage: int, best: Walk) -> tuple[Walk, ...]:
        """The best walk with each of a stage's changes."""
        return tuple(dict.fromkeys(replace(best, **change) for change in self.stages[stage]))


# Streams for one row: some processors fetch ahead best by themselves, and more the more streams there are.
_STREAMS: tuple[Change, ...] = (
    {"places": 2, "prefetch": 0},
    {"places": 4, "prefetch": 0},
    {"places": 8, "prefetch": 0},
    {"places": 2},
)
# Prefetches for few rows, where the weights come from memory; "chain" matters where panels are short.
_PREFETCH: tuple[Change, ...] = (
    {"prefetch": 0},
    {"prefetch": 512},
    {"prefetch": 1024},
    {"prefetch": 2048},
    {"prefetch": 4096},
    {"prefetch": 1024, "chain": True},
    {"prefetch": 2048, "chain": True},
    {"prefetch": 2048, "temporal": False},
    {"prefetch": 1024, "chain": True, "temporal": False},
)
_FEW_PREFETCHES: tuple[Change, ...] = ({"prefetch": 0}, {"prefetch": 1024}, {"prefetch": 1024, "chain": True})
_LOOPS: tuple[Change, ...] = ({"unroll": 2}, {"unroll": 4}, {"interleave": True}, {"task_groups": 4}, {"task_groups": 16})
_FEW_LOOPS: tuple[Change, ...] = ({"unroll": 2}, {"interleave": True})
# For prefill: rows in passes that keep their activations in the L2 cache, inputs in passes that keep the weights in L1.
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
    Bucket(4, (2, 4), ((2, 4), (3, 4), (4, 4), (6, 4)), 2048, (_PREFETCH, _FEW_LOOPS)),
    Bucket(8, (8,), ((2, 8), (3, 8), (4, 4), (4, 6), (6, 4)), 2048, (_PREFETCH, _FEW_LOOPS)),
    Bucket(32, (16, 32), ((2, 8), (2, 12), (3, 8), (4, 4), (4, 6)), 0, (_FEW_PREFETCHES, _FEW_LOOPS)),
    Bucket(None, (128, 512), ((2, 8), (2, 12), (3, 8), (4, 4), (4, 6)), 0, (_FEW_PREFETCHES, _PASSES)),
)
# With AVX2 an unrolled loop over more than one row spills, and so does a row over four panels unrolled by four.
AVX2 = (
    Bucket(1, (1,), ((1, 1), (2, 1), (3, 1), (4, 1)), 2048, (_PREFETCH, _without(_LOOPS, {"unroll": 4}))),
    Bucket(8, (2, 4, 8), ((1, 2), (1, 4), (2, 1), (2, 2)), 2048, (_PREFETCH, _without(_FEW_LOOPS, {"unroll": 2}))),
    Bucket(None, (16, 32, 128, 512), ((1, 2), (1, 3), (1, 4), (2, 2)), 0, (_FEW_PREFETCHES, _without(_PASSES, {"unroll": 2}))),
)
AMX = (*AVX512[:3], replace(AVX512[3], most=None, rows=(16,)))  # tile products take the larger counts
TILE_ROWS = (4, 8, 16, 32, 128, 512)


def leaves_tasks(walk: Walk, panels: int) -> bool:
    """Whether a walk shares out so many panels well enough among more threads than those that measure it."""
    at_once = walk.wide * walk.task_groups
    return bool(walk.row_blocks) or at_once <= PANELS_OF_TASK or -(-panels // at_once) >= LEAST_TASKS


def buckets(isa: Isa, planes: int, max_rows: int) -> tuple[Bucket, ...]:
    """The buckets for kernels that get at most `max_rows` rows. With two planes each row counts twice: blocks come with half
    the rows too, those that have too many sums are left out, and inputs come in one pass."""
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
