"""Block pool: every block is free, used or cached, and tables get all the blocks that they ask for or none."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from belle_compile.runtime.program import BLOCK_SIZE
from belle_compile.runtime.serving.kv_blocks import BlockPool, BlockTable, blocks_for

BLOCKS = 12


def row() -> np.ndarray:
    return np.full(BLOCKS, -1, np.int32)


def grown(pool: BlockPool, blocks: int) -> BlockTable:
    table = BlockTable(pool, row())
    assert table.grow(blocks * BLOCK_SIZE)
    return table


def test_blocks_for() -> None:
    assert [blocks_for(tokens) for tokens in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]


def test_table_is_written_as_it_grows() -> None:
    pool, written = BlockPool(4), row()
    table = BlockTable(pool, written)
    assert pool.available == 4 and set(written) == {-1}
    assert table.grow(16) and list(written[:2]) == [0, -1]
    assert table.grow(17) and list(written[:3]) == [0, 1, -1] and table.blocks == [0, 1] and table.capacity == 32
    assert table.grow(5) and table.blocks == [0, 1]
    assert (pool.available, pool.used, pool.cached) == (2, 2, 0)
    table.free()
    assert pool.available == 4 and table.blocks == [] and table.capacity == 0
    table.free()
    assert pool.available == 4


def test_a_table_takes_all_blocks_that_it_needs_or_none() -> None:
    pool = BlockPool(4)
    first, second = grown(pool, 2), grown(pool, 1)
    assert not second.grow(4 * BLOCK_SIZE) and second.blocks == [2] and pool.available == 1
    assert second.grow(2 * BLOCK_SIZE)
    first.free()
    assert second.grow(4 * BLOCK_SIZE) and pool.available == 0


def test_blocks_freed_last_are_taken_first_and_in_their_order() -> None:
    pool = BlockPool(6)
    tables = [grown(pool, 2) for _ in range(2)]
    tables[0].free()
    assert grown(pool, 3).blocks == [0, 1, 4]


def test_kept_blocks_are_evicted_in_the_order_in_which_they_were_released() -> None:
    pool, evicted = BlockPool(4), []
    pool.on_eviction(evicted.append)
    table = grown(pool, 3)
    for block in (0, 2):
        pool.keep(block)
    table.free()
    assert (pool.used, pool.cached, pool.available) == (0, 2, 4)
    pool.acquire(2)
    pool.release(2)  # now block 0 is evicted first
    assert grown(pool, 3).blocks == [1, 3, 0] and evicted == [0]
    pool.discard(2)
    assert pool.cached == 0 and grown(pool, 1).blocks == [2]
    assert evicted == [0] and pool.evictions == 1


def test_shared_and_replaced_blocks_are_counted() -> None:
    pool, written = BlockPool(4), row()
    first, second = grown(pool, 2), BlockTable(pool, written)
    second.share(0)
    assert second.grow(2 * BLOCK_SIZE) and second.blocks == [0, 2]
    second.replace(1, 1)
    assert second.blocks == [0, 1] and list(written[:3]) == [0, 1, -1]
    assert [pool.references(block) for block in range(4)] == [2, 2, 0, 0]
    first.free()
    assert pool.used == 2
    second.free()
    assert pool.available == 4 and sorted(grown(pool, 4).blocks) == [0, 1, 2, 3]


def test_misuse_is_refused() -> None:
    pool = BlockPool(1)
    for misuse in (pool.release, pool.keep):
        with pytest.raises(AssertionError, match="without a reference"):
            misuse(0)
    with pytest.raises(AssertionError, match="free block 0 is shared"):
        pool.acquire(0)
    pool.take()
    with pytest.raises(AssertionError, match="none is available"):
        pool.take()


class PoolMachine(RuleBasedStateMachine):
    """Tables grow, share, keep and free blocks in any order; `cached` is the order in which blocks are to be evicted."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS)
        self.pool.on_eviction(self.evict)
        self.tables: list[tuple[BlockTable, np.ndarray]] = []
        self.kept: set[int] = set()
        self.cached: list[int] = []
        self.evictions = 0

    def evict(self, block: int) -> None:
        assert block == self.cached.pop(0), "the block that was released first"
        self.kept.remove(block)
        self.evictions += 1

    def used(self) -> Counter[int]:
        return Counter(block for table, _ in self.tables for block in table.blocks)

    @rule()
    def start(self) -> None:
        written = row()
        self.tables.append((BlockTable(self.pool, written), written))

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), tokens=st.integers(1, BLOCKS * BLOCK_SIZE))
    def grow(self, data: st.DataObject, tokens: int) -> None:
        table, _ = data.draw(st.sampled_from(self.tables))
        before, available = list(table.blocks), self.pool.available
        fits = blocks_for(tokens) - len(before) <= available
        assert table.grow(tokens) == fits
        assert table.blocks[: len(before)] == before
        assert len(table.blocks) == (max(blocks_for(tokens), len(before)) if fits else len(before))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        table, _ = data.draw(st.sampled_from(self.tables))
        if candidates := sorted({*self.used(), *self.cached} - set(table.blocks)):
            block = data.draw(st.sampled_from(candidates))
            table.share(block)
            if block in self.cached:
                self.cached.remove(block)

    @precondition(lambda self: self.used())
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.used())))
        self.pool.keep(block)
        self.kept.add(block)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.kept)))
        self.pool.discard(block)
        self.kept.remove(block)
        if block in self.cached:
            self.cached.remove(block)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        table, _ = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        blocks = list(table.blocks)
        table.free()
        used = self.used()
        self.cached += [block for block in reversed(blocks) if block in self.kept and not used[block]]

    @invariant()
    def every_block_is_free_or_used_or_cached(self) -> None:
        used = self.used()
        assert [self.pool.references(block) for block in range(BLOCKS)] == [used[block] for block in range(BLOCKS)]
        assert self.pool.used == len(used) and self.pool.cached == len(self.cached) and not used.keys() & set(self.cached)
        assert self.pool.available == BLOCKS - len(used) and self.pool.evictions == self.evictions
        for table, written in self.tables:
            assert len(set(table.blocks)) == len(table.blocks) and list(written[: len(table.blocks)]) == table.blocks

    def teardown(self) -> None:
        for table, _ in self.tables:
            table.free()
        self.pool.on_eviction(lambda block: None)
        assert sorted(self.pool.take() for _ in range(BLOCKS)) == list(range(BLOCKS)), "a block is lost or there twice"


TestPool = PoolMachine.TestCase
TestPool.settings = settings(deadline=None, max_examples=50)


def test_references_can_be_limited() -> None:
    pool = BlockPool(6, most_references=6)
    first, second = (BlockTable(pool, np.zeros(8, np.int32)) for _ in range(2))
    assert first.grow(4 * BLOCK_SIZE) and (pool.available, pool.used) == (2, 4)
    second.share(first.blocks[0])
    assert (pool.available, pool.used, pool.references_left) == (1, 4, 1), "a shared block counts twice"
    assert not second.grow(3 * BLOCK_SIZE) and second.grow(2 * BLOCK_SIZE) and pool.available == 0
    second.free()
    assert (pool.available, pool.references_left) == (2, 2)
