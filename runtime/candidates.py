"""The best logits of each rank in place of all of them: what sampling needs, in a row of the whole vocabulary.

A request that samples among its k likeliest tokens (greedy: 1), and has m tokens whose logits a repetition penalty of at
least 1 lowers, needs of every rank the n = k + m largest logits and those equal to the n-th. Proof. Penalised logits p are
never above raw ones l, and equal for all but m tokens. Let t be the k-th largest p of the whole vocabulary, v a token with
p(v) >= t, and say that its rank has n tokens with l above l(v). Of these at least k are not penalised, and have
p = l > l(v) >= p(v) >= t: so k tokens are above the k-th largest, which cannot be. Hence every token with p(v) >= t, ties with
the k-th included, is among what its rank sends. The rest is -inf in the row: the k-th largest of the row is t, and those that
reach it are the same tokens in the same order, with the same values. With k = 1 they are those equal to the maximum, of which
argmax takes the lowest id.

Where that saves nothing, or logits are not finite, all are sent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_CHUNK = 64  # values that share a maximum
ALL = -1  # in place of a count: the row's logits, without ids


def message_size(rows: int, count: int) -> int:
    """Numbers in the longest message of a rank with `count` logits a row."""
    return rows * (1 + count)


def pack(logits: NDArray[np.float32], wanted: NDArray[np.int32], message: NDArray[np.int32]) -> int:
    """Write what rank 0 needs of `logits` [rows, count]: of row i the `wanted[i]` best, 0 for all. Returns the length.

    A row is the number of candidates, their places and their values; or `ALL` and the values.
    """
    end = 0
    for row, most in zip(logits, wanted.tolist(), strict=True):
        places = _best(row, most)
        if places is None:
            message[end] = ALL
            message[end + 1 : end + 1 + len(row)] = row.view(np.int32)
            end += 1 + len(row)
        else:
            size = len(places)
            message[end] = size
            message[end + 1 : end + 1 + size] = places
            message[end + 1 + size : end + 1 + 2 * size] = row[places].view(np.int32)
            end += 1 + 2 * size
    return end


def unpack(messages: Sequence[NDArray[np.int32]], spans: Sequence[tuple[int, int]], logits: NDArray[np.float32]) -> None:
    """Write ranks' messages to `logits` [rows, vocabulary]; `spans` are (first token, count) of each rank."""
    ends = [0] * len(messages)
    for row in logits:
        row.fill(-np.inf)
        for rank, (message, (first, count)) in enumerate(zip(messages, spans, strict=True)):
            start = ends[rank] + 1
            size = int(message[start - 1])
            if size == ALL:
                row[first : first + count] = message[start : start + count].view(np.float32)
                ends[rank] = start + count
            else:
                places, values = message[start : start + size], message[start + size : start + 2 * size]
                row[first + places] = values.view(np.float32)
                ends[rank] = start + 2 * size


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
