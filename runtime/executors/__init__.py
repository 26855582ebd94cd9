"""What runs a step: the protocol between scheduler and executor, and the buffers they share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.program import BLOCK_SIZE, Program
from belle_compile.runtime.serving.candidates import Rows

if TYPE_CHECKING:
    from belle_compile.runtime.distributed.collectives import Collectives
    from belle_compile.runtime.profiling import Recorder


class StepBatch:
    """The inputs of one step: int32 buffers of the executor, allocated once, filled in place by the scheduler.

    `token_ids`, `positions`, `sequences` [max_tokens]: the first `tokens` entries count; a token's sequence is its row of
    `block_table` [max_sequences, max_blocks], its position counts from 0. A sequence's tokens lie side by side, in ascending
    positions.
    `logit_rows` [max_rows]: the first `rows` entries are indices of the tokens whose logits are wanted.
    `candidates` [max_rows], where the executor asks for it: how many of a row's best logits matter, with those equal to the
    last; others may not come. 0: all matter.
    """

    def __init__(
        self,
        token_ids: NDArray[np.int32],
        positions: NDArray[np.int32],
        sequences: NDArray[np.int32],
        block_table: NDArray[np.int32],
        logit_rows: NDArray[np.int32],
        candidates: NDArray[np.int32] | None = None,
    ) -> None:
        self.token_ids = token_ids
        self.positions = positions
        self.sequences = sequences
        self.block_table = block_table
        self.logit_rows = logit_rows
        self.candidates = candidates
        self.tokens = 0
        self.rows = 0

    @property
    def max_tokens(self) -> int:
        """Tokens of the largest step."""
        return len(self.token_ids)

    @property
    def max_rows(self) -> int:
        """Logit rows of the largest step."""
        return len(self.logit_rows)

    @property
    def max_sequences(self) -> int:
        """Sequences that can have a row of the block table at the same time."""
        return len(self.block_table)

    @property
    def max_context(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.block_table.shape[1]) * BLOCK_SIZE


class Executor(Protocol):
    """Runs steps over a paged KV cache of `num_blocks` blocks that it owns; used by one thread at a time."""

    batch: StepBatch
    program: Program
    vocab_size: int
    num_blocks: int
    isa: str
    threads: int

    def step(self) -> Rows:
        """Run what `batch` holds; logits of `batch.rows` rows, scratch that is valid until the next step."""
        ...

    def join(self, collectives: Collectives) -> None:
        """Be one of several ranks, which all call it when all are there, before the first step."""
        ...

    def record(self, recorder: Recorder | None) -> None:
        """Tell `recorder` of every kernel call from the next step on, or nobody."""
        ...

    def read_bandwidth(self) -> float:
        """Bytes a second that memory gives now: the limit of steps that read much and compute little."""
        ...

    def close(self) -> None:
        """Give the memory back; the executor is not used afterwards."""
        ...
