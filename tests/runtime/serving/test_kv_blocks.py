"""Block allocator: nobody shares a block, nobody runs out of what was reserved."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.kv_blocks import BLOCK_SIZE, BlockAllocator, BlockTable, blocks_for

BLOCKS = 12


def test_blocks_for() -> None:
    assert [blocks_for(tokens) for tokens in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]


def test_table_is_written_as_it_grows() -> None:
    allocator, row = BlockAllocator(4), np.full(4, -1, np.int32)
    table = BlockTable(allocator, row, 40)
    assert allocator.available == 1 and list(row) == [-1] * 4
    table.grow(16)
    assert list(row) == [0, -1, -1, -1]
    table.grow(17)
    assert list(row) == [0, 1, -1, -1] and table.blocks == [0, 1]
    table.free()
    assert allocator.available == 4 and table.blocks == []


def test_out_of_blocks_is_one_sentence() -> None:
    allocator = BlockAllocator(3)
    BlockTable(allocator, np.zeros(3, np.int32), 2 * BLOCK_SIZE)
    with pytest.raises(EngineError, match="out of blocks: found 1 available of 3, expected 2 blocks of 16 tokens; wait"):
        BlockTable(allocator, np.zeros(3, np.int32), BLOCK_SIZE + 1)
    assert allocator.available == 1


class AllocatorMachine(RuleBasedStateMachine):
    """Sequences come, grow and go in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(BLOCKS)
        self.tables: list[tuple[BlockTable, np.ndarray, int]] = []

    @rule(tokens=st.integers(1, BLOCKS * BLOCK_SIZE))
    def admit(self, tokens: int) -> None:
        row = np.full(BLOCKS, -1, np.int32)
        if blocks_for(tokens) > self.allocator.available:
            with pytest.raises(EngineError, match="out of blocks"):
                BlockTable(self.allocator, row, tokens)
        else:
            self.tables.append((BlockTable(self.allocator, row, tokens), row, tokens))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        table, row, most = data.draw(st.sampled_from(self.tables))
        tokens = data.draw(st.integers(1, most))
        table.grow(tokens)
        assert table.capacity >= tokens
        assert list(row[: len(table.blocks)]) == table.blocks

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.tables.pop(index)[0].free()

    @invariant()
    def blocks_have_one_owner(self) -> None:
        taken = [block for table, _, _ in self.tables for block in table.blocks]
        assert len(taken) == len(set(taken)) and set(taken) <= set(range(BLOCKS))
        promised = sum(blocks_for(tokens) for _, _, tokens in self.tables)
        assert self.allocator.available == BLOCKS - promised


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(deadline=None, max_examples=50)
