"""The slots of a KV cache against blocks in a list: a row reads what was written, whatever is shared, copied or moved."""

from __future__ import annotations

import numpy as np
import pytest

from belle_compile.runtime.executors.kv_slots import Geometry, KvSlots
from belle_compile.runtime.program import BLOCK_SIZE

GEOMETRY = Geometry(layers=2, kv_heads=2, head_dim=3, capacity=5 * BLOCK_SIZE)
ROWS, BLOCKS, PLACES = 4, 14, 4


class Written:
    """A cache in which each token that is written has a number of its own, and the numbers that each block should hold."""

    def __init__(self) -> None:
        self.cache = KvSlots(GEOMETRY, ROWS, BLOCKS)
        self.expected = np.zeros((BLOCKS, BLOCK_SIZE))
        self.next = 1

    def write(self, row: int, table: np.ndarray, start: int, count: int) -> None:
        """Compute `count` tokens of a row, after checking that its slot has what was written before them."""
        slot = self.cache.prepare(row, table, start, count)
        found = self.cache.slots[:, :, slot, :, :start]
        before = self.expected[table].reshape(-1)[:start]
        np.testing.assert_array_equal(found, np.broadcast_to(before[:, None], found.shape))
        for position in range(start, start + count):
            self.cache.slots[:, :, slot, :, position] = self.next
            self.expected[table[position // BLOCK_SIZE], position % BLOCK_SIZE] = self.next
            self.next += 1

    def copy(self, source: int, destination: int) -> None:
        self.cache.copy_block(source, destination)
        self.expected[destination] = self.expected[source]


@pytest.mark.parametrize("seed", range(12))
def test_a_row_reads_what_was_written_to_its_blocks(seed: int) -> None:
    random, written = np.random.default_rng(seed), Written()
    tables = [random.permutation(BLOCKS)[:PLACES].astype(np.int32) for _ in range(ROWS)]
    lengths = [0] * ROWS
    for _ in range(300):
        row = int(random.integers(ROWS))
        table, others = tables[row], {int(block) for other in range(ROWS) if other != row for block in tables[other]}
        kind = random.random()
        if kind < 0.1:  # another sequence in this row, which begins with blocks of a row, or with copies of them
            source = int(random.integers(ROWS))
            shared = int(random.integers(0, lengths[source] // BLOCK_SIZE + 1))
            begin = tables[source][:shared].copy()
            table[:] = random.permutation([b for b in range(BLOCKS) if b not in begin])[:PLACES]
            table[:shared] = begin
            if shared and random.random() < 0.5:
                table[shared - 1] = next(b for b in range(BLOCKS) if b not in table)
                written.copy(int(begin[-1]), int(table[shared - 1]))
            lengths[row] = shared * BLOCK_SIZE
        elif kind < 0.15:
            made = {row: int(random.integers(PLACES)) for row in random.permutation(ROWS)[:2].tolist()}
            written.cache.make_room(made)
        elif kind < 0.25:
            members = random.permutation(ROWS)[: int(random.integers(1, ROWS + 1))].tolist()
            first, span = written.cache.gather(members)
            assert {written.cache.slot(member) for member in members} <= set(range(first, first + span))
            assert span <= 2 * len(members)
        elif lengths[row] < PLACES * BLOCK_SIZE:
            count = int(random.integers(1, min(40, PLACES * BLOCK_SIZE - lengths[row]) + 1))
            places = range(lengths[row] // BLOCK_SIZE, -(-(lengths[row] + count) // BLOCK_SIZE))
            for place in places:  # a block that others read is not written to
                if int(table[place]) in others:
                    fresh = next((b for b in range(BLOCKS) if b not in others and b not in table), None)
                    if fresh is None:
                        break
                    if place * BLOCK_SIZE < lengths[row]:
                        written.copy(int(table[place]), fresh)
                    table[place] = fresh
            else:
                written.write(row, table, lengths[row], count)
                lengths[row] += count
        else:
            lengths[row] = 0
    for row in range(ROWS):
        written.write(row, tables[row], lengths[row], 0)


def test_a_step_in_order_copies_nothing() -> None:
    written = Written()
    table = np.array([3, 1, 2, 0], np.int32)
    written.write(0, table, 0, 20)
    written.cache.slots[:, :, written.cache.slot(0), :, :20] = -1  # it would be lost if it was loaded again
    written.expected[table[:2]] = np.where(written.expected[table[:2]] > 0, -1, 0)
    for position in range(20, 60):
        written.write(0, table, position, 1)


def test_slots_hold_no_more_than_the_pool() -> None:
    geometry = Geometry(layers=1, kv_heads=1, head_dim=64, capacity=8 * BLOCK_SIZE)  # a block of a head is a page
    cache, tables = KvSlots(geometry, 4, 8), np.arange(8, dtype=np.int32).reshape(4, 2)
    for row in range(4):  # as many as the pool has
        cache.make_room({row: 2})
        slot = cache.prepare(row, tables[row], 0, 32)
        cache.slots[:, :, slot, :, :32] = row + 1
    others = tables[[1, 0, 3, 2]]
    cache.make_room({0: 2, 1: 1})  # these are in their slots already
    assert [int(cache.slots[0, 0, cache.slot(row), 0, 31, 0]) for row in range(4)] == [1, 2, 3, 4]
    cache.make_room({0: 2, 2: 3})
    held = [[int(cache.slots[0, 0, cache.slot(row), 0, at, 0]) for at in (0, 31)] for row in range(4)]
    assert held == [[1, 1], [0, 0], [3, 3], [0, 0]], "memory that was given back holds zeros"
    for row in range(4):
        slot = cache.prepare(row, others[row], 32, 0)
        assert (cache.slots[:, :, slot, :, :32] == others[row][0] // 2 + 1).all()


def test_rows_that_lie_apart_move_together() -> None:
    written = Written()
    tables = np.arange(8, dtype=np.int32).reshape(4, 2)
    for row in (0, 3):
        written.write(row, tables[row], 0, 20)
    assert written.cache.gather([3]) == (3, 1) and written.cache.gather([1, 2]) == (1, 2)
    assert written.cache.gather([0, 3])[1] <= 4
    for row in (0, 3):
        written.write(row, tables[row], 20, 1)
