"""The rows of a step that have adapters, as executors tell them to kernels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.adapters.blocks import adapter_blocks
from belle_compile.runtime.adapters.factors import AdapterSlots
from belle_compile.runtime.executors.batch import StepBatch
from belle_compile.runtime.program import Adapter, Call

NO_LINEARS: frozenset[str] = frozenset()


class AdaptedRows:
    """Writes the blocks of a step's rows with adapters to the input `adapted`. Rows that are those of the last such step are
    not written again."""

    def __init__(self, memory: AdapterSlots, adapted: NDArray[np.int32], threads: int = 1) -> None:
        """Blocks are small enough for so many threads."""
        self._memory, self._adapted, self._threads = memory, adapted, threads
        self._slots, self._any = b"", False  # those of all sequences in the last step, and whether any had an adapter
        self._rows, self._used = (b"", b""), frozenset[int]()  # of the last step with adapters

    def changed_linears(self, batch: StepBatch) -> frozenset[str]:
        """The linears that adapters of the step's sequences change."""
        if batch.adapters is None:
            return NO_LINEARS
        # Comparing bytes takes a microsecond; NumPy's reductions and indexing take ten to thirty between two steps.
        all_slots = batch.adapters.tobytes()
        if all_slots != self._slots:
            self._slots, self._any = all_slots, bool(batch.adapters.max() >= 0)
        if not self._any:
            return NO_LINEARS
        sequences = batch.sequences[: batch.tokens]
        rows = all_slots, sequences.tobytes()
        if rows != self._rows:
            slots = batch.adapters[sequences]
            blocks = adapter_blocks(slots, self._threads)
            self._adapted[0], self._adapted[1 : 1 + blocks.size] = len(blocks), blocks.reshape(-1)
            self._rows, self._used = rows, frozenset(slots[slots >= 0].tolist())
        return self._memory.targets(self._used)


def is_needed(call: Call, changed: frozenset[str]) -> bool:
    """Whether a call is needed in a step whose adapters change these linears."""
    if call.when != "adapted":
        return True
    return any(isinstance(arg, Adapter) and arg.target in changed for arg in call.args)
