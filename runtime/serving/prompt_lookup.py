"""Prompt lookup: drafts the tokens that followed the last earlier occurrence of a sequence's last tokens.

Prompt-lookup decoding after Saxena (github.com/apoorvumang/prompt-lookup-decoding): in answers that quote their prompt, several
tokens are guessed at a time and verified in one step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NGRAMS = (3, 2)  # numbers of tokens that must match, tried in this order; single tokens match often and predict little
LONGEST_PAUSE = 32  # tokens that pass without a draft after many wrong ones
_TOKEN_BITS = 21  # bits of a token in a key: three tokens fit an int64, for vocabularies of up to two million


class PromptLookup:
    """Drafts at most `most` tokens at a time for one sequence, and pauses while the drafts are wrong.

    A hash map for each length of n-grams holds the position after the last occurrence of each n-gram. Only new tokens are
    added to it, so that a draft costs a few microseconds at any length of the context.

    A draft whose first token is wrong is followed by a pause: of one token at first, twice as long after each further wrong
    draft in a row, up to LONGEST_PAUSE. A draft that is accepted in part or in full resets the pause. So a sequence that
    repeats nothing pays for about one draft in 32 tokens, and one that begins to quote later is still sped up.
    """

    def __init__(self, tokens: NDArray[np.int32], length: int, most: int) -> None:
        """`tokens` is the buffer of the sequence, which holds `length` tokens now and grows in place."""
        self.most = most
        self.drafted = 0  # tokens drafted so far
        self.accepted = 0  # of them, tokens that were right: counted by the sequence
        self._tokens = tokens
        self._positions: dict[int, dict[int, int]] = {n: _positions(tokens[:length], n) for n in NGRAMS}
        self._indexed = length  # n-grams that are followed by a token below this position are in the maps
        self._pause = 0
        self._resume_at = 0  # length of the sequence at which drafts are made again
        self._pending = False  # whether the outcome of the last draft has not been looked at yet
        self._accepted_before = 0  # value of `accepted` when the last draft was made

    def finds(self, length: int) -> bool:
        """Whether `draft` with room for a guess will make one after the first `length` tokens."""
        self._look_back(length)
        if length < self._resume_at:
            return False
        self._index(length)
        return self._find(length) is not None

    def draft(self, length: int, room: int) -> int:
        """Write up to `room` guesses after the first `length` tokens of the buffer; returns their number."""
        self._look_back(length)
        count = min(self.most, room)
        if count < 1 or length < self._resume_at:
            return 0
        self._index(length)
        position = self._find(length)
        if position is None:
            return 0
        tokens = self._tokens
        if position + count <= length:
            tokens[length : length + count] = tokens[position : position + count]
        else:
            for i in range(count):  # copies guesses written by this loop too, and so continues a repetition
                tokens[length + i] = tokens[position + i]
        self._pending, self._accepted_before = True, self.accepted
        self.drafted += count
        return count

    def _look_back(self, length: int) -> None:
        """Begin or end a pause by the outcome of the last draft."""
        if self._pending:
            self._pending = False
            self._pause = 0 if self.accepted > self._accepted_before else min(max(1, 2 * self._pause), LONGEST_PAUSE)
            self._resume_at = length + self._pause

    def _index(self, length: int) -> None:
        for position in range(self._indexed, length):
            for n, positions in self._positions.items():
                if position >= n:
                    positions[self._key(position, n)] = position
        self._indexed = length

    def _find(self, length: int) -> int | None:
        """Return the position after the last earlier occurrence of the last tokens, None if there is none."""
        for n, positions in self._positions.items():
            if length >= n:
                position = positions.get(self._key(length, n))
                if position is not None:
                    return position
        return None

    def _key(self, stop: int, n: int) -> int:
        key = 0
        for token in self._tokens[stop - n : stop].tolist():
            key = key << _TOKEN_BITS | token
        return key


def _positions(tokens: NDArray[np.int32], n: int) -> dict[int, int]:
    """Map the key of every n-gram that a token follows to the position of the token after its last occurrence."""
    count = max(0, len(tokens) - n)
    keys = np.zeros(count, np.int64)
    for i in range(n):
        keys = keys << _TOKEN_BITS | tokens[i : i + count]
    return dict(zip(keys.tolist(), range(n, n + count), strict=True))
