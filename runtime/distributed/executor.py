"""Runs an engine of several ranks: rank 0 is an executor like any other, the other ranks run the steps that it sends them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.distributed.agreement import Agreement
from belle_compile.runtime.distributed.collectives import Collectives
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.base import ProfilableExecutor, RankExecutor
from belle_compile.runtime.executors.batch import StepBatch
from belle_compile.runtime.serving import candidates

if TYPE_CHECKING:
    from belle_compile.runtime.profiling import Recorder

# A message is int32: tokens (0: there are no more steps), logit rows, copies of blocks, and how many rows of the block table
# changed; then the inputs of the step (`_inputs`), the copies, the numbers of those rows of the block table, and the rows.
_HEADER = 4


class RankedExecutor:
    """Rank 0: sends the other ranks each step, runs its own part of it, and joins the logits of all ranks.

    A step that fails here leaves the other ranks in the middle of it, so no step can follow it.
    """

    def __init__(self, local: RankExecutor, collectives: Collectives, agreement: Agreement) -> None:
        """`local` runs this rank's part."""
        self.vocab_size, self.kv_block_bytes = local.vocab_size, local.kv_block_bytes
        self.num_blocks, self.kernels = agreement.blocks, ", ".join(agreement.kernels)
        self.batch = _with_candidates(local.batch)
        self._local, self._collectives, self._spans = local, collectives, agreement.spans
        self._sent_table = np.full_like(self.batch.block_table, -1)  # the block table as the other ranks have it
        self._message = np.empty(_message_size(self.batch), np.int32)
        rows = self.batch.max_rows
        self._results = [np.empty(candidates.message_size(rows, count), np.int32) for _, count in agreement.spans]
        self._failed = False

    def step(self, batch: StepBatch) -> candidates.Rows:
        """Run `batch` on all ranks; return the logits that its `candidates` request."""
        if self._failed:
            remedy = "load the engine again in a new process"
            raise EngineError("ranks", "an earlier step failed, and the ranks are out of step since", remedy=remedy)
        self._failed = True  # until the step has succeeded
        self._collectives.broadcast(self._message, _write(batch, self._sent_table, self._message))
        logits = self._local.step(batch)
        rows: list[candidates.Row] = []
        if batch.rows:
            local_result = self._results[0]
            length = candidates.pack(logits, self._spans[0][1], _requested(batch), local_result)
            self._collectives.gather(local_result, length, self._results)
            rows = candidates.unpack(self._results, self._spans, batch.rows)
        self._failed = False
        return rows

    def close(self) -> None:
        """End the other ranks and free the memory."""
        if not self._failed:
            self._failed = True
            self._message[:_HEADER] = 0
            self._collectives.broadcast(self._message, _HEADER)
            self._collectives.close()
        self._local.close()


class ProfilableRankedExecutor(RankedExecutor):
    """Rank 0 of an engine whose executors can be profiled. A profile shows this rank; the time of a sum includes waiting."""

    def __init__(self, local: RankExecutor, collectives: Collectives, agreement: Agreement) -> None:
        super().__init__(local, collectives, agreement)
        assert isinstance(local, ProfilableExecutor), "checked by `ranked_executor`"
        self.program, self.isa, self.threads = local.program, local.isa, local.threads
        self._profilable = local

    def record(self, recorder: Recorder | None) -> None:
        """Report every kernel call of this rank to `recorder` from the next step on; with None, stop."""
        self._profilable.record(recorder)

    def read_bandwidth(self) -> float:
        """Bytes a second that this rank reads from memory."""
        return self._profilable.read_bandwidth()


def ranked_executor(local: RankExecutor, collectives: Collectives, agreement: Agreement) -> RankedExecutor:
    """Rank 0's executor over all ranks. It can be profiled if `local` can."""
    kind = ProfilableRankedExecutor if isinstance(local, ProfilableExecutor) else RankedExecutor
    return kind(local, collectives, agreement)


def serve(local: RankExecutor, collectives: Collectives) -> None:
    """Run the steps that rank 0 sends, on any other rank, until rank 0 sends that there are no more."""
    batch, count = _with_candidates(local.batch), local.span[1]
    message = np.empty(_message_size(batch), np.int32)
    result = np.empty(candidates.message_size(batch.max_rows, count), np.int32)
    while True:
        collectives.broadcast(message)
        if not message[0]:
            break
        _read(message, batch)
        logits = local.step(batch)
        if batch.rows:
            collectives.gather(result, candidates.pack(logits, count, _requested(batch), result), [])
    collectives.close()
    local.close()


def _with_candidates(batch: StepBatch) -> StepBatch:
    """A batch over the same buffers that always has one for candidates: these shorten the messages between ranks even where the
    executor computes whole rows."""
    requested = np.zeros(batch.max_rows, np.int32) if batch.candidates is None else batch.candidates
    return StepBatch(batch.token_ids, batch.positions, batch.sequences, batch.block_table, batch.logit_rows, requested)


def _requested(batch: StepBatch) -> NDArray[np.int32]:
    """The numbers of candidates that a step requests, int32 [rows]."""
    assert batch.candidates is not None, "made by `_with_candidates`"
    return batch.candidates[: batch.rows]


def _message_size(batch: StepBatch) -> int:
    return _HEADER + 3 * batch.max_tokens + 2 * batch.max_rows + 3 * batch.max_sequences + batch.block_table.size


def _inputs(batch: StepBatch) -> list[NDArray[np.int32]]:
    """The used parts of a step's input buffers, without the block table."""
    token_inputs = [array[: batch.tokens] for array in (batch.token_ids, batch.positions, batch.sequences)]
    return [*token_inputs, batch.logit_rows[: batch.rows], _requested(batch)]


def _write(batch: StepBatch, sent_table: NDArray[np.int32], message: NDArray[np.int32]) -> int:
    """Write a step to `message`; returns its length. Rows of the block table that equal those of `sent_table` are left out."""
    changed = np.flatnonzero((batch.block_table != sent_table).any(axis=1))
    sent_table[changed] = rows = batch.block_table[changed]
    message[:_HEADER] = batch.tokens, batch.rows, len(batch.copies), len(changed)
    copies = np.array(batch.copies, np.int32)
    end = _HEADER
    for array in [*_inputs(batch), copies.reshape(-1), changed.astype(np.int32), rows.reshape(-1)]:
        message[end : end + array.size] = array
        end += array.size
    return end


def _read(message: NDArray[np.int32], batch: StepBatch) -> None:
    """Fill `batch` from what `_write` wrote."""
    batch.tokens, batch.rows, copies, changed = (int(count) for count in message[:_HEADER])
    start = _HEADER
    for array in _inputs(batch):
        array[:] = message[start : start + array.size]
        start += array.size
    batch.copies = [(int(source), int(block)) for source, block in message[start : start + 2 * copies].reshape(-1, 2)]
    start += 2 * copies
    rows = message[start + changed : start + changed * (1 + batch.block_table.shape[1])]
    batch.block_table[message[start : start + changed]] = rows.reshape(changed, -1) if changed else 0
