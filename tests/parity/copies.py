"""Sequences that go on in shared and copied blocks of another one, beside sequences that computed all of their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from belle_compile.runtime import Engine
from belle_compile.runtime.program import BLOCK_SIZE

Floats = npt.NDArray[np.float32]
Logits = dict[int, Floats]
TOKENS = 3 * BLOCK_SIZE  # of the longest sequence below


class Copies:
    """Four sequences over an engine's executor: two that compute everything, and two that begin with copies."""

    def __init__(self, engine: Engine) -> None:
        self.executor = engine.executor
        self.batch = engine.executor.batch
        per_sequence = TOKENS // BLOCK_SIZE
        order = np.random.default_rng(5).permutation(4 * per_sequence)
        self.batch.block_table[:4, :per_sequence] = order.reshape(4, per_sequence)

    def step(self, tokens: Mapping[int, tuple[int, Sequence[int]]], copies: list[tuple[int, int]] | None = None) -> Logits:
        """Copy blocks, then compute tokens of sequences, each from a position on; returns logits [its tokens, vocabulary]."""
        batch, at = self.batch, 0
        for sequence, (start, given) in tokens.items():
            batch.token_ids[at : at + len(given)] = given
            batch.positions[at : at + len(given)] = np.arange(start, start + len(given))
            batch.sequences[at : at + len(given)] = sequence
            at += len(given)
        batch.logit_rows[:at] = np.arange(at)
        batch.tokens = batch.rows = at
        batch.copies = copies or []
        logits = np.array(self.executor.step(batch))
        ends = np.cumsum([len(given) for _, given in tokens.values()])[:-1]
        return dict(zip(tokens, np.split(logits, ends), strict=True))

    def block(self, sequence: int, index: int) -> int:
        """The block of a sequence's positions from `index * BLOCK_SIZE` on."""
        return int(self.batch.block_table[sequence, index])


def logits_over_copies(engine: Engine, ids: Sequence[int], common: int) -> list[tuple[Floats, Floats]]:
    """Return pairs of logits that have the same bits: of sequences that computed all of their tokens, and of the same ones over
    blocks of others. The first `common` tokens come from another sequence's blocks, of which the last is copied in the middle;
    then from a copy of that copy; the third pair is of the first sequence itself, whose block was copied."""
    first, other = list(ids[:TOKENS]), [*ids[:common], *ids[TOKENS : 2 * TOKENS - common]]
    whole, end = common // BLOCK_SIZE, TOKENS - 2
    made = Copies(engine)
    expected = {
        0: np.concatenate([made.step({0: (0, first[:end])})[0], made.step({0: (end, first[end:])})[0]]),
        1: np.concatenate([made.step({1: (0, other[:end])})[1], made.step({1: (end, other[end:])})[1]]),
    }
    for sequence in (2, 3):  # so that their blocks hold something else
        made.step({sequence: (0, ids[-TOKENS:])})
    made.step({0: (0, first[:end])})
    made.batch.block_table[2:4, :whole] = made.batch.block_table[0, :whole]
    # The second copy takes what the first one brings; the first one's source is written to in the same step.
    copies = [(made.block(0, whole), made.block(2, whole)), (made.block(2, whole), made.block(3, whole))]
    rest = other[common:end]
    found = made.step({0: (end, first[end:]), 2: (common, rest), 3: (common, rest)}, copies)
    last = made.step({2: (end, other[end:]), 3: (end, other[end:])})
    reused = [np.concatenate([found[sequence], last[sequence]]) for sequence in (2, 3)]
    return [*((expected[1][common:], logits) for logits in reused), (expected[0][end:], found[0])]
