"""Block pool: every block is free or referenced, and no sequence runs out of what it reserved."""

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


def test_blocks_for() -> None:
    assert [blocks_for(tokens) for tokens in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]


def test_table_is_written_as_it_grows() -> None:
    pool, written = BlockPool(4), row()
    table = BlockTable(pool, written, 40)
    assert pool.available == 1 and set(written) == {-1}
    table.grow(16)
    assert list(written[:2]) == [0, -1]
    table.grow(17)
    assert list(written[:3]) == [0, 1, -1] and table.blocks == [0, 1]
    table.free()
    assert pool.available == 4 and table.blocks == []
    table.free()
    assert pool.available == 4


def test_blocks_freed_last_are_taken_first_and_in_their_order() -> None:
    pool = BlockPool(6)
    tables = [BlockTable(pool, row(), 2 * BLOCK_SIZE) for _ in range(2)]
    for table in tables:
        table.grow(2 * BLOCK_SIZE)
    tables[0].free()
    again = BlockTable(pool, row(), 3 * BLOCK_SIZE)
    again.grow(3 * BLOCK_SIZE)
    assert again.blocks == [0, 1, 4]


def test_references_are_counted() -> None:
    pool = BlockPool(2)
    pool.reserve(1)
    block = pool.take()
    pool.acquire(block)
    assert pool.references(block) == 2 and pool.available == 1
    pool.release(block)
    assert pool.references(block) == 1 and pool.available == 1
    pool.release(block)
    assert pool.references(block) == 0 and pool.available == 2


def test_misuse_is_refused() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="a block is taken without a reservation"):
        pool.take()
    with pytest.raises(AssertionError, match="3 blocks reserved, 2 of 2 available"):
        pool.reserve(3)
    pool.reserve(1)
    with pytest.raises(AssertionError, match="2 reserved blocks cancelled, 1 are reserved"):
        pool.cancel(2)
    block = pool.take()
    pool.release(block)
    with pytest.raises(AssertionError, match="free block 0 is released"):
        pool.release(block)
    with pytest.raises(AssertionError, match="free block 0 is shared"):
        pool.acquire(block)
    assert pool.available == 2


def test_fork_shares_blocks_until_both_are_freed() -> None:
    pool, written = BlockPool(8), row()
    parent = BlockTable(pool, row(), 40)
    parent.grow(20)
    assert not parent.is_shared(0)
    child = parent.fork(written, 60)
    assert child.blocks == parent.blocks == [0, 1] and list(written[:3]) == [0, 1, -1]
    assert all(table.is_shared(position) for table in (parent, child) for position in (0, 15, 16, 31))
    assert pool.available == 8 - 3 - 2  # the parent's worst case, and two blocks that the child may add
    child.grow(60)
    assert child.blocks == [0, 1, 2, 3] and not child.is_shared(32) and list(written[:4]) == child.blocks
    parent.free()
    assert not child.is_shared(0) and pool.references(0) == 1 and pool.available == 4
    child.free()
    assert pool.available == 8


def test_fork_for_fewer_tokens_than_the_blocks_hold_reserves_nothing() -> None:
    pool = BlockPool(4)
    parent = BlockTable(pool, row(), 40)
    parent.grow(40)
    child = parent.fork(row(), 33)
    assert pool.available == 1
    parent.free()
    child.free()
    assert pool.available == 4


class PoolMachine(RuleBasedStateMachine):
    """Sequences come, grow, fork and go in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS)
        self.tables: list[tuple[BlockTable, np.ndarray, int]] = []  # with row and most tokens

    def draw(self, data: st.DataObject) -> tuple[BlockTable, np.ndarray, int]:
        return self.tables[data.draw(st.integers(0, len(self.tables) - 1))]

    @rule(tokens=st.integers(1, BLOCKS * BLOCK_SIZE))
    def admit(self, tokens: int) -> None:
        written = row()
        if blocks_for(tokens) > self.pool.available:
            with pytest.raises(AssertionError):
                BlockTable(self.pool, written, tokens)
        else:
            self.tables.append((BlockTable(self.pool, written, tokens), written, tokens))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        table, written, most = self.draw(data)
        tokens = data.draw(st.integers(1, most))
        before = list(table.blocks)
        table.grow(tokens)
        assert table.capacity == BLOCK_SIZE * len(table.blocks) >= tokens
        assert table.blocks[: len(before)] == before and list(written[: len(table.blocks)]) == table.blocks

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), tokens=st.integers(1, BLOCKS * BLOCK_SIZE))
    def fork(self, data: st.DataObject, tokens: int) -> None:
        table, _, _ = self.draw(data)
        if blocks_for(max(0, tokens - table.capacity)) <= self.pool.available:
            written = row()
            self.tables.append((table.fork(written, tokens), written, tokens))
            assert list(written[: len(table.blocks)]) == table.blocks

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.tables.pop(index)[0].free()

    @invariant()
    def every_block_is_free_or_counted(self) -> None:
        counted = Counter(block for table, _, _ in self.tables for block in table.blocks)
        assert [self.pool.references(block) for block in range(BLOCKS)] == [counted[block] for block in range(BLOCKS)]
        missing = sum(blocks_for(max(0, most - table.capacity)) for table, _, most in self.tables)
        assert self.pool.available == BLOCKS - len(counted) - missing
        for table, _, _ in self.tables:
            assert len(set(table.blocks)) == len(table.blocks)
            for index, block in enumerate(table.blocks):
                assert table.is_shared(index * BLOCK_SIZE) == (counted[block] > 1)

    def teardown(self) -> None:
        for table, _, _ in self.tables:
            table.free()
        assert self.pool.available == BLOCKS
        self.pool.reserve(BLOCKS)
        assert sorted(self.pool.take() for _ in range(BLOCKS)) == list(range(BLOCKS)), "a block is lost or there twice"


TestPool = PoolMachine.TestCase
TestPool.settings = settings(deadline=None, max_examples=50)
