"""The best logits in place of all of them: what sampling needs of a GPU, and of each rank.

A request that samples among its k likeliest tokens (greedy: 1), and has m tokens whose logits a repetition penalty of at
least 1 lowers, needs of every rank the n = k + m largest logits and those equal to the n-th. Proof. Penalised logits p are
never above raw ones l, and equal for all but m tokens. Let t be the k-th largest p of the whole vocabulary, v a token with
p(v) >= t, and say that its rank has n tokens with l above l(v). Of these at least k are not penalised, and have
p = l > l(v) >= p(v) >= t: so k tokens are above the k-th largest, which cannot be. Hence every token with p(v) >= t, ties with
the k-th included, is among what its rank sends. Of those alone the k-th largest p is t too, and those that
reach it are the same tokens in the same order, with the same values. With k = 1 they are those equal to the maximum, of which
argmax takes the lowest id.

Where that saves nothing, or logits are not finite, all are sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Few(NamedTuple):
    """Float32 logits of some tokens, in ascending order; those of the others do not matter."""

    tokens: NDArray[np.int64]
    values: NDArray[np.float32]


Row = NDArray[np.float32] | Few  # logits after a token: of all tokens, or of those that matter
Rows = NDArray[np.float32] | list[Row]
_CHUNK = 64  # values that share a maximum
ALL = -1  # in place of a count: the row's logits, without ids


def message_size(rows: int, count: int) -> int:
    """Numbers in the longest message of a rank with `count` logits a row."""
    return rows * (1 + count)


def pack(logits: Rows, count: int, wanted: NDArray[np.int32], message: NDArray[np.int32]) -> int:
    """Write what rank 0 needs of `logits`, of a part of `count` tokens: of row i the `wanted[i]` best, 0 for all. Returns the
    length.

    A row is the number of candidates, their places and their values; or `ALL` and the values.
    """
    end = 0
    for row, most in zip(logits, wanted.tolist(), strict=True):
        if isinstance(row, Few) and 4 * len(row.tokens) > count:
            whole = np.full(count, -np.inf, np.float32)
            whole[row.tokens] = row.values
            row = whole
        places: NDArray[np.int64] | None
        if isinstance(row, Few):
            kept = row.values >= _largest(row.values, min(most, len(row.values)))
            places, values = row.tokens[kept], row.values[kept]
        else:
            places = _best(row, most)
            values = row if places is None else row[places]
        if places is None:
            message[end] = ALL
            message[end + 1 : end + 1 + len(values)] = values.view(np.int32)
            end += 1 + len(values)
        else:
            size = len(places)
            message[end] = size
            message[end + 1 : end + 1 + size] = places
            message[end + 1 + size : end + 1 + 2 * size] = values.view(np.int32)
            end += 1 + 2 * size
    return end


def unpack(messages: Sequence[NDArray[np.int32]], spans: Sequence[tuple[int, int]], rows: int) -> list[Row]:
    """The rows that ranks' messages make; `spans` are (first token, count) of each rank."""
    vocabulary = spans[-1][0] + spans[-1][1]
    found: list[Row] = []
    ends = [0] * len(messages)
    for _ in range(rows):
        parts: list[Few] = []
        for rank, (message, (first, count)) in enumerate(zip(messages, spans, strict=True)):
            start = ends[rank] + 1
            size = int(message[start - 1])
            if size == ALL:
                tokens, size = np.arange(first, first + count), count
                ends[rank] = start + count
            else:
                tokens = first + message[start : start + size].astype(np.int64)
                start += size
                ends[rank] = start + size
            parts.append(Few(tokens, message[start : start + size].view(np.float32)))
        tokens, values = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        found.append(values if len(values) == vocabulary else Few(tokens, values))
    return found


def _best(row: NDArray[np.float32], most: int) -> NDArray[np.int64] | None:
    """Places of the `most` largest values and of those equal to the last; None if all are to be sent."""
    if not 0 < 2 * most < len(row) or not np.isfinite(best := row.max()):  # the maximum of a row with NaN is NaN
        return None
    if most == 1:
        places = np.flatnonzero(row == best)
        return places if 2 * len(places) < len(row) else None
    # As many chunks have a maximum that reaches a value as there are values, or fewer: few values are left to be sorted out.
    maxima = np.maximum.reduceat(row, np.arange(0, len(row), _CHUNK))
    places = np.flatnonzero(row >= _largest(maxima, most)) if most <= len(maxima) else np.arange(len(row))
    values = row[places]
    places = places[values >= _largest(values, most)]
    return places if 2 * len(places) < len(row) else None


def _largest(values: NDArray[np.float32], number: int) -> np.float32:
    """The value that `number` values reach."""
    found: np.float32 = values.max() if number == 1 else np.partition(values, len(values) - number)[len(values) - number]
    return found
