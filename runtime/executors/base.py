"""The protocol of an executor, which runs the steps of an engine, and two further ones: for profiles and for several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.program import BLOCK_SIZE, Program
from belle_compile.runtime.serving.candidates import Rows

if TYPE_CHECKING:
    from belle_compile.runtime.distributed.collectives import Collectives
    from belle_compile.runtime.profiling import Recorder


class StepBatch:
    """The inputs of one step: int32 buffers of the executor, allocated once and filled in place by the scheduler.

    `token_ids`, `positions`, `sequences` [max_tokens]: the first `tokens` entries count. The sequence of a token is its row of
    `block_table` [max_sequences, max_blocks]; its position counts from 0. The tokens of a sequence lie side by side, in
    ascending positions.
    `logit_rows` [max_rows]: the first `rows` entries are indices of the tokens whose logits are requested.
    `candidates` [max_rows], None where the executor always returns whole rows: how many of a row's largest logits are needed,
    together with those equal to the smallest of them; the executor may leave out the others. 0 requests the whole row.
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
    """Runs steps over a paged KV cache that it owns; used by one thread at a time.

    The shapes of `batch` are its limits (`StepBatch.max_tokens` and so on); the cache has `num_blocks` blocks of
    `kv_block_bytes` bytes, keys and values of all layers.

    `kernels` names everything that the bits of logits depend on beside the engine's files: the instruction set, and what was
    chosen among kernels that the engine carries. Executors of one engine with the same `kernels` compute the same bits, so
    that answers of one may be given in place of the other's.
    """

    batch: StepBatch
    vocab_size: int
    num_blocks: int
    kv_block_bytes: int
    kernels: str

    def step(self, batch: StepBatch) -> Rows:
        """Compute the logits of `batch.rows` rows, valid until the next step.

        `batch` is the executor's `batch`, or another one over the same buffers with other counts.
        """
        ...

    def close(self) -> None:
        """Free the memory. The executor is not used afterwards."""
        ...


@runtime_checkable
class ProfilableExecutor(Executor, Protocol):
    """An executor that runs a program and can time its kernel calls."""

    program: Program
    isa: str
    threads: int

    def record(self, recorder: Recorder | None) -> None:
        """Report every kernel call to `recorder` from the next step on; with None, stop."""
        ...

    def read_bandwidth(self) -> float:
        """Bytes a second that memory delivers: the limit of steps that read much and compute little."""
        ...


@runtime_checkable
class RankExecutor(Executor, Protocol):
    """An executor that can be one of several ranks. It computes the logits of a part of the vocabulary.

    `sums` are the sums over ranks in the order of a step, the same on all ranks: their rows ("T" or "R") and width.
    """

    span: tuple[int, int]  # the part of the vocabulary: its first token, and the number of its tokens
    sums: Sequence[tuple[str, int]]

    def join(self, collectives: Collectives) -> None:
        """Connect to the other ranks. All ranks call it before the first step, once all are ready."""
        ...
