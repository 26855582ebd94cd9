"""The rows of a step that have adapters."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from belle_compile.runtime.adapters.factors import AdapterSlots, BetweenSteps, Factors
from belle_compile.runtime.executors.adapted import AdaptedRows
from belle_compile.runtime.executors.batch import NO_ADAPTER, StepBatch
from belle_compile.runtime.program import BLOCK_ROWS, AdapterLayout

MOST = 8


class Slots(AdapterSlots):
    """Slots without memory."""

    def address(self, target: str) -> int:
        raise AssertionError(target)

    def _store(self, slot: int, changes: Mapping[str, Factors], between_steps: BetweenSteps) -> None:
        pass


def steps() -> tuple[StepBatch, AdaptedRows, np.ndarray, Slots]:
    """A batch of a row for each sequence, and the input that is written."""
    ints = [np.zeros(MOST, np.int32) for _ in range(4)]
    batch = StepBatch(
        ints[0], ints[1], ints[2], np.zeros((MOST, 1), np.int32), ints[3], adapters=np.full(MOST, NO_ADAPTER, np.int32)
    )
    batch.sequences[:], batch.tokens = range(MOST), MOST
    adapted, memory = np.zeros(1 + MOST * BLOCK_ROWS, np.int32), Slots(AdapterLayout(1, 0, {}), 4)
    nothing = np.zeros((1, 1), np.float32)
    for slot in range(4):
        memory.write(slot, {f"linear{slot}": Factors(nothing, nothing[0], nothing)})
    return batch, AdaptedRows(memory, adapted), adapted, memory


def rows_of(adapted: np.ndarray) -> list[list[int]]:
    """The rows of each block."""
    blocks = adapted[1 : 1 + adapted[0] * BLOCK_ROWS].reshape(-1, BLOCK_ROWS)
    return [[row for row in block if row >= 0] for block in blocks.tolist()]


def test_rows_follow_the_adapters_of_their_sequences() -> None:
    batch, rows, adapted, _ = steps()
    assert rows.changed_linears(batch) == frozenset()
    batch.adapters[:] = [0, 1] * 4
    assert rows.changed_linears(batch) == {"linear0", "linear1"}
    assert rows_of(adapted) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    batch.adapters[:] = [0, 1, NO_ADAPTER, 1, 0, 1, NO_ADAPTER, 1]
    assert rows.changed_linears(batch) == {"linear0", "linear1"}
    assert rows_of(adapted) == [[0, 4], [1, 3, 5, 7]]
    batch.adapters[:] = NO_ADAPTER
    assert rows.changed_linears(batch) == frozenset()
    batch.adapters[:] = [0, 1, NO_ADAPTER, 1, 0, 1, NO_ADAPTER, 1]
    assert rows.changed_linears(batch) == {"linear0", "linear1"}
    assert rows_of(adapted) == [[0, 4], [1, 3, 5, 7]]


@pytest.mark.parametrize(("order", "blocks", "linears"), [([3, 2], [[0]], {"linear2"}), ([2, 1], [], set())])
def test_rows_follow_the_sequences_of_the_step(order: list[int], blocks: list[list[int]], linears: set[str]) -> None:
    batch, rows, adapted, _ = steps()
    batch.adapters[3] = 2
    batch.tokens, batch.sequences[:2] = 2, [2, 3]
    assert rows.changed_linears(batch) == {"linear2"}
    assert rows_of(adapted) == [[1]]
    batch.sequences[:2] = order
    assert rows.changed_linears(batch) == linears
    assert rows_of(adapted) == blocks


def test_an_adapter_may_replace_another_in_its_slot() -> None:
    batch, rows, _, memory = steps()
    batch.adapters[:] = 1
    assert rows.changed_linears(batch) == {"linear1"}
    nothing = np.zeros((1, 1), np.float32)
    memory.write(1, {"other": Factors(nothing, nothing[0], nothing)})
    assert rows.changed_linears(batch) == {"other"}
