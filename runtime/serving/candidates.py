"""The largest logits in place of all: what sampling needs from a GPU, and from each rank.

A request that samples among its k likeliest tokens (greedy: 1), and has m tokens whose logits are lowered, needs from every
rank the n = k + m largest logits and those equal to the n-th. What lowers a logit is a repetition penalty of at least 1, a
frequency or presence penalty of at least 0, a negative bias, and -inf for a token that must not end the answer yet; rounding to
float32 raises none above where it was. Proof. Penalised logits p are never above raw ones l, and equal for all but m tokens.
Let t be the k-th largest p of the whole vocabulary, v a token with p(v) >= t, and say that its rank has n tokens with l above
l(v). Of these at least k are not penalised, and have p = l > l(v) >= p(v) >= t: so k tokens are above the k-th largest, which
cannot be. Hence every token with p(v) >= t, ties with the k-th included, is among what its rank sends. Of those alone the k-th
largest p is t too, and those that reach it are the same tokens in the same order, with the same values. With k = 1 they are
those equal to the maximum, of which argmax takes the lowest id. Top-p and min-p choose among these tokens by their values only.
Should t be -inf, fewer than k tokens are not lowered, so that n is above the size of the vocabulary and everything is sent.

All logits are needed where one may rise (a repetition penalty below 1, a frequency or presence penalty below 0, a positive
bias), for a token from far behind may come to the front; for a grammar, which lowers the logits of any number of tokens to
-inf, perhaps of all the best; and for log probabilities, which divide by a sum over the vocabulary.

A rank sends its whole row where candidates would be as long, and where logits are not finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Few(NamedTuple):
    """Float32 logits of the candidates among the tokens, in ascending order of token ids."""

    tokens: NDArray[np.int64]
    values: NDArray[np.float32]


Row = NDArray[np.float32] | Few  # the logits after one token: of the whole vocabulary, or of candidates
Rows = NDArray[np.float32] | list[Row]
_CHUNK = 64  # logits of which one maximum is taken, to find the chunks that hold candidates
ALL = -1  # stands in a message for a number of candidates where the whole row follows, without ids


def message_size(rows: int, count: int) -> int:
    """Length in int32 numbers of the longest message of a rank with `count` logits a row."""
    return rows * (1 + count)


def pack(logits: Rows, count: int, requested: NDArray[np.int32], message: NDArray[np.int32]) -> int:
    """Write what rank 0 needs from a rank whose part of the vocabulary has `count` tokens; returns the message's length.

    Of row i these are the `requested[i]` largest logits and those equal to the smallest of them; 0 requests the whole row. A
    row is written as the number of candidates, their indices in the part, and their values; or as `ALL` and all values.
    """
    end = 0
    for row, most in zip(logits, requested.tolist(), strict=True):
        if isinstance(row, Few) and 4 * len(row.tokens) > count:
            whole = np.full(count, -np.inf, np.float32)
            whole[row.tokens] = row.values
            row = whole
        indices: NDArray[np.int64] | None
        if isinstance(row, Few):
            kept = row.values >= _largest(row.values, min(most, len(row.values)))
            indices, values = row.tokens[kept], row.values[kept]
        else:
            indices = _largest_indices(row, most)
            values = row if indices is None else row[indices]
        if indices is None:
            message[end] = ALL
            message[end + 1 : end + 1 + len(values)] = values.view(np.int32)
            end += 1 + len(values)
        else:
            size = len(indices)
            message[end] = size
            message[end + 1 : end + 1 + size] = indices
            message[end + 1 + size : end + 1 + 2 * size] = values.view(np.int32)
            end += 1 + 2 * size
    return end


def unpack(messages: Sequence[NDArray[np.int32]], spans: Sequence[tuple[int, int]], rows: int) -> list[Row]:
    """Join the messages of all ranks into `rows` rows; `spans` are the (first token, number of tokens) of each rank's part."""
    vocabulary = spans[-1][0] + spans[-1][1]
    joined: list[Row] = []
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
        joined.append(values if len(values) == vocabulary else Few(tokens, values))
    return joined


def _largest_indices(row: NDArray[np.float32], most: int) -> NDArray[np.int64] | None:
    """Return the indices of the `most` largest values and of those equal to the smallest of them; None for the whole row."""
    if not 0 < 2 * most < len(row) or not np.isfinite(largest := row.max()):  # the maximum of a row with NaN is NaN
        return None
    if most == 1:
        indices = np.flatnonzero(row == largest)
        return indices if 2 * len(indices) < len(row) else None
    # At least `most` values reach the `most`-th largest maximum of a chunk, so it is not above the `most`-th largest value.
    # Values below it are no candidates, and few are left to find the candidates among.
    maxima = np.maximum.reduceat(row, np.arange(0, len(row), _CHUNK))
    indices = np.flatnonzero(row >= _largest(maxima, most)) if most <= len(maxima) else np.arange(len(row))
    values = row[indices]
    indices = indices[values >= _largest(values, most)]
    return indices if 2 * len(indices) < len(row) else None


def _largest(values: NDArray[np.float32], number: int) -> np.float32:
    """Return the `number`-th largest value."""
    value: np.float32 = values.max() if number == 1 else np.partition(values, len(values) - number)[len(values) - number]
    return value
