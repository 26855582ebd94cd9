"""Log probabilities of tokens: natural logarithms of the model's own distribution, before temperature, biases, penalties
and grammars.

This is what vLLM calls `raw_logprobs`. They do not depend on how a request is sampled. They are computed in float32 from the
whole row of logits, one row at a time, so that they have the same bits whatever is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.serving.sampling import require_finite


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its log probability, and the most likely tokens in its place: (token id, log probability), best first.

    Of tokens that are equally likely, those with lower ids come first. The values are float32 numbers.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprob(logits: NDArray[np.float32], token: int, top: int) -> TokenLogprob:
    """Return the log probability of `token` and the `top` best, given the model's logits [vocabulary].

    Raises `EngineError` when the logits are not finite.
    """
    largest = logits.max()
    require_finite(largest)
    shifted = logits - largest
    log_sum = np.float32(np.log(np.exp(shifted).sum(dtype=np.float64)))
    best = [(token_id, float(shifted[token_id] - log_sum)) for token_id in _best(logits, top).tolist()]
    return TokenLogprob(token, float(shifted[token] - log_sum), tuple(best))


def _best(logits: NDArray[np.float32], number: int) -> NDArray[np.int64]:
    """Return the tokens of the largest logits in descending order, ties in ascending order of ids."""
    if number == 0:
        return np.empty(0, np.int64)
    number = min(number, len(logits))
    ids = np.flatnonzero(logits >= np.partition(logits, -number)[-number])
    return ids[np.argsort(-logits[ids], kind="stable")][:number]
