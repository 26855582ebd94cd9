"""Drafts from the sequence itself: what followed the last place where its last tokens stood before.

Prompt-lookup decoding after Saxena (github.com/apoorvumang/prompt-lookup-decoding): answers that quote their prompt are guessed
several tokens at a time and verified in one step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NGRAMS = (3, 2)  # tokens that must match, longest first; single tokens match everywhere and foretell little
LONGEST_PAUSE = 32  # tokens without a draft after many that failed
_TOKEN_BITS = 21  # of a token in a key: three make an int64, for vocabularies up to two million


class PromptLookup:
    """Finds drafts of at most `most` tokens for one sequence, and rests while they fail.

    The n-grams seen so far are kept in a hash map per length, each with the place after its last occurrence, and only new
    tokens are added: a draft costs a few microseconds at any length of context.

    A draft whose first token is wrong is followed by a pause, of one token at first and twice as long after each further one
    in a row, up to LONGEST_PAUSE; a draft that is accepted in part or whole ends that. So a sequence that repeats
    nothing pays for about one draft in 32 tokens, and one that begins to quote later is still sped up.
    """

    def __init__(self, tokens: NDArray[np.int32], length: int, most: int) -> None:
        """`tokens` is the buffer of the sequence, which holds `length` tokens now."""
        self.most = most
        self.drafted = 0  # tokens given to verify
        self.accepted = 0  # of them, tokens that turned out right
        self._tokens = tokens
        self._places: dict[int, dict[int, int]] = {n: _places(tokens[:length], n) for n in NGRAMS}
        self._indexed = length  # n-grams whose following token lies below are in the map
        self._pause = 0
        self._resume_at = 0  # length of the sequence from which on drafts are made
        self._open = False  # a draft was made whose fate has not been looked at
        self._accepted_before = 0

    def draft(self, length: int, room: int) -> int:
        """Write up to `room` guesses after the first `length` tokens of the buffer; returns their number."""
        if self._open:
            self._open = False
            self._pause = 0 if self.accepted > self._accepted_before else min(max(1, 2 * self._pause), LONGEST_PAUSE)
            self._resume_at = length + self._pause
        count = min(self.most, room)
        if count < 1 or length < self._resume_at:
            return 0
        self._index(length)
        place = self._find(length)
        if place is None:
            return 0
        tokens = self._tokens
        if place + count <= length:
            tokens[length : length + count] = tokens[place : place + count]
        else:
            for i in range(count):  # reaches into what it writes, and so continues a repetition
                tokens[length + i] = tokens[place + i]
        self._open, self._accepted_before = True, self.accepted
        self.drafted += count
        return count

    def _index(self, length: int) -> None:
        for place in range(self._indexed, length):
            for n, places in self._places.items():
                if place >= n:
                    places[self._key(place, n)] = place
        self._indexed = length

    def _find(self, length: int) -> int | None:
        """The place after the last earlier occurrence of the last tokens, None if there is none."""
        for n, places in self._places.items():
            if length >= n:
                place = places.get(self._key(length, n))
                if place is not None:
                    return place
        return None

    def _key(self, stop: int, n: int) -> int:
        key = 0
        for token in self._tokens[stop - n : stop].tolist():
            key = key << _TOKEN_BITS | token
        return key


def _places(tokens: NDArray[np.int32], n: int) -> dict[int, int]:
    """Key of every n-gram that a token follows -> index of the token after its last occurrence."""
    count = max(0, len(tokens) - n)
    keys = np.zeros(count, np.int64)
    for i in range(n):
        keys = keys << _TOKEN_BITS | tokens[i : i + count]
    return dict(zip(keys.tolist(), range(n, n + count), strict=True))
