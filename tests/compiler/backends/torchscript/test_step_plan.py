"""The plan of a step's attention: each token's tile, keys and blocks, whatever else is in the step."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from belle_compile.runtime.executors import StepBatch
from belle_compile.runtime.executors.torchscript_model import query_tile
from belle_compile.runtime.executors.torchscript_plan import GATHERED_BYTES, StepPlan, padded_keys, plan_step
from belle_compile.runtime.program import BLOCK_SIZE

BLOCKS = 80  # of a row of the block table


def batch_of(tokens: Mapping[int, tuple[int, int]]) -> StepBatch:
    """A step of sequences, each with its first position and the number of its tokens."""
    counts = [count for _, count in tokens.values()]
    positions = np.concatenate([np.arange(start, start + count) for start, count in tokens.values()])
    table = np.arange(8 * BLOCKS).reshape(8, BLOCKS).astype(np.int32) + 100
    batch = StepBatch(
        np.zeros(sum(counts), np.int32), positions.astype(np.int32), np.repeat([*tokens], counts).astype(np.int32), table,
        np.zeros(1, np.int32),
    )  # fmt: skip
    batch.tokens = sum(counts)
    return batch


def views(batch: StepBatch, plan: StepPlan, tile: int) -> list[tuple[int, int, list[int]]]:
    """For each token: the row of its tile, the number of keys, and the blocks that they are read from."""
    found: dict[int, tuple[int, int, list[int]]] = {}
    cell = block = 0
    for tiles, sequences, keys in plan.groups.tolist():
        for number in range(tiles):
            at = block + (number if sequences > 1 else 0) * (keys // BLOCK_SIZE)
            for row in range(tile):
                token = int(plan.cells[cell + row])
                if plan.cell_of[token] == cell + row:
                    assert plan.cell_positions[cell + row] == batch.positions[token]
                    found[token] = row, keys, plan.blocks[at : at + keys // BLOCK_SIZE].tolist()
            cell += tile
        block += sequences * (keys // BLOCK_SIZE)
    assert cell == len(plan.cells) == len(plan.cell_positions) and block == len(plan.blocks)
    return [found[token] for token in range(batch.tokens)]


STEPS = [
    {0: (0, 1)},
    {0: (0, 40), 3: (77, 1)},
    {5: (300, 1), 0: (299, 1), 3: (1000, 30), 2: (0, 100)},
    {number: (7 * number, 1) for number in range(8)},
]


@pytest.mark.parametrize("tokens", STEPS)
@pytest.mark.parametrize("tile", [1, 4, 8])
def test_a_token_is_computed_alike_in_every_step(tokens: Mapping[int, tuple[int, int]], tile: int) -> None:
    batch = batch_of(tokens)
    plan = plan_step(batch, tile, 2, 64)
    for token, (row, keys, blocks) in enumerate(views(batch, plan, tile)):
        position, sequence = int(batch.positions[token]), int(batch.sequences[token])
        end = position // tile * tile + tile
        assert (row, keys) == (position % tile, padded_keys(end)) and keys >= end
        needed = position // BLOCK_SIZE + 1
        own = batch.block_table[sequence].tolist()
        assert blocks[:needed] == own[:needed] and set(blocks) <= set(own)
        assert plan.slots[token] == own[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        assert plan.lengths[token] == sum(tokens[sequence])


def test_no_block_behind_the_end_is_read() -> None:
    """Its row of the table may hold the number of another sequence's block."""
    batch = batch_of({0: (20, 1)})
    plan = plan_step(batch, 8, 4, 64)
    assert plan.blocks.tolist() == [100, 101, 100, 100]


def test_a_single_product_is_computed_twice() -> None:
    """With one head of keys, a tile alone would be divided among threads in itself."""
    assert plan_step(batch_of({0: (20, 1)}), 8, 1, 64).groups.tolist() == [[2, 2, 64]]
    assert plan_step(batch_of({0: (20, 1)}), 8, 2, 64).groups.tolist() == [[1, 1, 64]]


def test_many_long_sequences_are_read_in_parts() -> None:
    plan = plan_step(batch_of({number: (1000, 1) for number in range(8)}), 4, 8, 128)
    assert len(plan.groups) > 1 and plan.groups[:, 0].sum() == 8
    assert all(
        sequences * keys * 8 * 128 * 4 <= GATHERED_BYTES or sequences == 1 for _, sequences, keys in plan.groups.tolist()
    )


@pytest.mark.parametrize(("heads", "tile"), [(1, 8), (2, 4), (3, 4), (4, 2), (8, 1), (9, 1)])
def test_tiles_have_eight_rows_or_more(heads: int, tile: int) -> None:
    assert query_tile(heads) == tile
