"""The inputs of a step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.program import BLOCK_SIZE

NO_ADAPTER = -1


class StepBatch:
    """The inputs of one step: int32 buffers of the executor, allocated once and filled in place by the scheduler.

    `token_ids`, `positions`, `sequences` [max_tokens]: the first `tokens` entries count. The sequence of a token is its row of
    `block_table` [max_sequences, max_blocks]; its position counts from 0. The tokens of a sequence lie side by side, in
    ascending positions.
    `logit_rows` [max_rows]: the first `rows` entries are indices of the tokens whose logits are requested.
    `candidates` [max_rows], None where the executor always returns whole rows: how many of a row's largest logits are needed,
    together with those equal to the smallest of them; the executor may leave out the others. 0 requests the whole row.
    `prompt_lengths` [max_sequences]: how many of the first tokens of each sequence are its prompt; the others are its answer.
    With `answers_apart`, the bits that the executor computes for a token may differ by whether it is in a prompt or in an
    answer, though never by the step; the executor computes tokens of an answer one at a time. Then blocks with tokens of an
    answer must not be used for the prompt of another sequence.
    With `blocks_per_row`, the executor has memory for as many blocks of all rows of the block table together as the cache has:
    one that several rows share counts for each of them.
    `adapters` [max_sequences], None where the executor has no slots for adapters: the slot of each sequence's adapter, or
    `NO_ADAPTER`.
    `copies` are pairs (source, destination) of blocks of the KV cache, at most `max_sequences`. The executor copies them, one
    after the other, before it writes the keys and values of the step's tokens.
    """

    def __init__(
        self,
        token_ids: NDArray[np.int32],
        positions: NDArray[np.int32],
        sequences: NDArray[np.int32],
        block_table: NDArray[np.int32],
        logit_rows: NDArray[np.int32],
        candidates: NDArray[np.int32] | None = None,
        answers_apart: bool = False,
        blocks_per_row: bool = False,
        adapters: NDArray[np.int32] | None = None,
    ) -> None:
        self.token_ids = token_ids
        self.positions = positions
        self.sequences = sequences
        self.block_table = block_table
        self.logit_rows = logit_rows
        self.candidates = candidates
        self.prompt_lengths = np.zeros(len(block_table), np.int32)
        self.answers_apart = answers_apart
        self.blocks_per_row = blocks_per_row
        self.adapters = adapters
        self.copies: list[tuple[int, int]] = []
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
