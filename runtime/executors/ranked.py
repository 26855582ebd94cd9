"""Runs one program over several ranks: rank 0 is an executor as any other, the other ranks do as it says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.distributed.collectives import Collectives
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors import Executor, StepBatch
from belle_compile.runtime.program import Program
from belle_compile.runtime.serving import candidates

if TYPE_CHECKING:
    from belle_compile.runtime.profiling import Recorder

_HEADER = 3  # tokens, logit rows, rows of the block table that changed; no tokens: the end


class RankedExecutor:
    """Rank 0: tells the other ranks of a step, runs its own part of it, and puts their logits together.

    A step that fails here leaves the others in the middle of it, so it is the last one.
    """

    def __init__(self, own: Executor, collectives: Collectives, spans: list[tuple[int, int]], num_blocks: int) -> None:
        """`own` runs this rank's part; `spans` are (first token, count) of ranks' logits, `num_blocks` is the least of all."""
        self.program, self.vocab_size, self.isa, self.threads = own.program, own.vocab_size, own.isa, own.threads
        self.num_blocks = num_blocks
        self._own, self._collectives, self._spans = own, collectives, spans
        shared, rows = own.batch, own.batch.max_rows
        self.batch = StepBatch(
            shared.token_ids,
            shared.positions,
            shared.sequences,
            shared.block_table,
            shared.logit_rows,
            np.zeros(rows, np.int32),
        )
        self._known = np.full_like(shared.block_table, -1)  # the block table as the other ranks have it
        self._message = np.empty(_message_size(self.batch), np.int32)
        self._results = [np.empty(candidates.message_size(rows, count), np.int32) for _, count in spans]
        self._open, self._failed = False, False

    def step(self) -> candidates.Rows:
        """Run the batch on all ranks; the logits that `batch.candidates` asks for."""
        if self._failed:
            remedy = "load the engine again in a new process"
            raise EngineError("ranks", "an earlier step failed, and the ranks are out of step since", remedy=remedy)
        batch, wanted = self.batch, self.batch.candidates
        assert wanted is not None, "made with it"
        self._failed = True  # until the step is through
        self._collectives.broadcast(self._message, _write(batch, wanted, self._known, self._message))
        self._own.batch.tokens, self._own.batch.rows = batch.tokens, batch.rows
        _tell(self._own, wanted)
        logits, rows = self._own.step(), batch.rows
        found: list[candidates.Row] = []
        if rows:
            own = self._results[0]
            length = candidates.pack(logits, self._spans[0][1], wanted[:rows], own)
            self._collectives.gather(own, length, self._results)
            found = candidates.unpack(self._results, self._spans, rows)
        self._failed = False
        return found

    def join(self, collectives: Collectives) -> None:
        """It has."""

    def record(self, recorder: Recorder | None) -> None:
        """Time every kernel call of this rank from the next step on, or stop doing so. Sums count with their waiting."""
        self._own.record(recorder)

    def read_bandwidth(self) -> float:
        """Bytes a second that this rank reads from memory."""
        return self._own.read_bandwidth()

    def close(self) -> None:
        """End the other ranks and free the memory."""
        if not self._failed:
            self._failed = True
            self._message[:_HEADER] = 0
            self._collectives.broadcast(self._message, _HEADER)
            self._collectives.close()
        self._own.close()


def serve(own: Executor, collectives: Collectives) -> None:
    """The life of any other rank: run the steps that rank 0 tells of, until it says that there are no more."""
    batch = own.batch
    rows = batch.max_rows
    message = np.empty(_message_size(batch), np.int32)
    wanted = np.zeros(rows, np.int32)
    result = np.empty(candidates.message_size(rows, own.program.logits.count), np.int32)
    while True:
        collectives.broadcast(message)
        if not message[0]:
            break
        _read(message, batch, wanted)
        _tell(own, wanted)
        logits = own.step()
        if batch.rows:
            length = candidates.pack(logits, own.program.logits.count, wanted[: batch.rows], result)
            collectives.gather(result, length, [])
    collectives.close()
    own.close()


def _tell(own: Executor, wanted: NDArray[np.int32]) -> None:
    """How many logits matter, to an executor that asks."""
    if own.batch.candidates is not None:
        own.batch.candidates[:] = wanted


def sums_of(program: Program) -> list[tuple[str, int]]:
    """The sums of a program in order, as (rows, width): those of all ranks must be the same."""
    return [(call.rows, call.all_reduce.width) for call in program.calls if call.all_reduce]


def _message_size(batch: StepBatch) -> int:
    return _HEADER + 3 * batch.max_tokens + 2 * batch.max_rows + batch.max_sequences + batch.block_table.size


def _arrays(batch: StepBatch, wanted: NDArray[np.int32]) -> list[tuple[NDArray[np.int32], int]]:
    """What a step needs besides the block table, with the sizes that count."""
    tokens, rows = batch.tokens, batch.rows
    of_tokens = [(array, tokens) for array in (batch.token_ids, batch.positions, batch.sequences)]
    return [*of_tokens, (batch.logit_rows, rows), (wanted, rows)]


def _write(batch: StepBatch, wanted: NDArray[np.int32], known: NDArray[np.int32], message: NDArray[np.int32]) -> int:
    """Write the step to `message`; returns its length. Of the block table go the rows that are not `known`."""
    changed = np.flatnonzero((batch.block_table != known).any(axis=1))
    known[changed] = rows = batch.block_table[changed]
    message[:_HEADER] = batch.tokens, batch.rows, len(changed)
    end = _HEADER
    table = [(changed.astype(np.int32), len(changed)), (rows.reshape(-1), rows.size)]
    for array, size in _arrays(batch, wanted) + table:
        message[end : end + size] = array[:size]
        end += size
    return end


def _read(message: NDArray[np.int32], batch: StepBatch, wanted: NDArray[np.int32]) -> None:
    """Fill `batch` and `wanted` from what `_write` wrote."""
    batch.tokens, batch.rows, changed = (int(count) for count in message[:_HEADER])
    start = _HEADER
    for array, size in _arrays(batch, wanted):
        array[:size] = message[start : start + size]
        start += size
    rows = message[start + changed : start + changed * (1 + batch.block_table.shape[1])]
    batch.block_table[message[start : start + changed]] = rows.reshape(changed, -1) if changed else 0
