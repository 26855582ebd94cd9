"""Samples the next token: the logits processors of Hugging Face Transformers, in their order, in NumPy."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.candidates import Few, Row
from belle_compile.runtime.serving.request import Request

_FIRST_NUCLEUS = 512  # tokens that top-p sorts at first; more when their mass is not enough
_GREEDY_BELOW = 1e-6  # below this temperature one token is left, and dividing by it would overflow float32


class Sampler:
    """The sampling state of one request: its parameters, its random generator, and the tokens of prompt and answer so far."""

    def __init__(self, request: Request) -> None:
        self.temperature = request.temperature
        self.top_k = request.top_k
        self.top_p = request.top_p
        self.repetition_penalty = request.repetition_penalty
        self._random = np.random.default_rng(request.seed)
        # What the penalty counts: tokens as a set, and the same in the first `_seen_count` entries of an array that grows.
        self._seen = set(request.prompt) if self.repetition_penalty != 1 else set()
        self._seen_ids = np.fromiter(self._seen, np.int64, len(self._seen))
        self._seen_count = len(self._seen)

    def sample(self, logits: Row) -> int:
        """Choose the next token from `logits`, into which the repetition penalty is written."""
        token = self._choose(logits)
        if self.repetition_penalty != 1 and token not in self._seen:
            self._seen.add(token)
            if self._seen_count == len(self._seen_ids):
                self._seen_ids = np.resize(self._seen_ids, 2 * self._seen_count + 64)
            self._seen_ids[self._seen_count] = token
            self._seen_count += 1
        return token

    def candidates(self, more: int = 0) -> int:
        """Return n such that the n largest raw logits, and those equal to the n-th, decide the next token; 0 if all may.

        `more` is the number of tokens that are sampled before that one. The proof is in runtime/serving/candidates.py.
        """
        best = 1 if self.temperature < _GREEDY_BELOW else self.top_k
        if best == 0 or self.repetition_penalty < 1:
            return 0
        return best + (self._seen_count + more if self.repetition_penalty > 1 else 0)

    def _choose(self, logits: Row) -> int:
        if self.temperature < _GREEDY_BELOW:
            values = self._penalized(logits)
            best = int(values.argmax())
            _require_finite(values[best])
            return int(logits.tokens[best]) if isinstance(logits, Few) else best
        ids, weights = self.distribution(logits)
        cumulative = weights.astype(np.float64).cumsum()
        index = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        index = min(index, len(weights) - 1)
        return index if ids is None else int(ids[index])

    def distribution(self, logits: Row) -> tuple[NDArray[np.int64] | None, NDArray[np.float32]]:
        """Return what the token is drawn from: ids (None for the whole vocabulary in order) and float32 weights, whose sum is
        not 1.

        The order is that of Transformers: repetition penalty, temperature, top-k, top-p.
        """
        values = self._penalized(logits)
        ids = self._top_k(values)
        scores = values if ids is None else values[ids]
        if isinstance(logits, Few):
            ids = logits.tokens if ids is None else logits.tokens[ids]
        scores = (scores - scores.max()) / np.float32(self.temperature)
        weights = np.exp(scores)
        if self.top_p >= 1:
            return ids, weights
        kept = _nucleus(weights, self.top_p)
        return (kept if ids is None else ids[kept]), weights[kept]

    def _penalized(self, logits: Row) -> NDArray[np.float32]:
        """Apply the repetition penalty to the logits of tokens seen, in place, and return all logits."""
        values = logits.values if isinstance(logits, Few) else logits
        if self.repetition_penalty == 1:
            return values
        seen = self._seen_ids[: self._seen_count]
        if isinstance(logits, Few):
            places = np.searchsorted(logits.tokens, seen)
            places[places == len(values)] = 0
            seen = places[logits.tokens[places] == seen]
        else:
            seen = seen[seen < len(values)]  # an embedding may have more rows than there are logits
        scores = values[seen]
        penalty = np.float32(self.repetition_penalty)
        values[seen] = np.where(scores < 0, scores * penalty, scores / penalty)
        return values

    def _top_k(self, logits: NDArray[np.float32]) -> NDArray[np.int64] | None:
        """Return the tokens whose logits are not below the k-th largest (ties stay, as in Transformers); None for all."""
        vocabulary = len(logits)
        if self.top_k == 0 or self.top_k >= vocabulary:
            _require_finite(logits.max())
            return None
        least = np.partition(logits, vocabulary - self.top_k)[vocabulary - self.top_k]
        ids = np.flatnonzero(logits >= least)
        _require_finite(logits[ids].max(initial=-math.inf))
        return ids


def _nucleus(weights: NDArray[np.float32], top_p: float) -> NDArray[np.int64]:
    """Return the indices of the smallest set of largest weights whose share of the sum reaches `top_p`, largest first."""
    needed = top_p * weights.sum(dtype=np.float64)
    size = min(_FIRST_NUCLEUS, len(weights))
    while True:
        top = np.flatnonzero(weights >= np.partition(weights, -size)[-size])
        top = top[np.argsort(-weights[top])]
        mass = weights[top].astype(np.float64).cumsum()
        if mass[-1] >= needed or len(top) == len(weights):
            break
        size = min(size * 8, len(weights))
    # An entry stays while the mass of the larger ones is below top_p.
    return top[: max(1, int(np.searchsorted(mass, needed, side="left")) + 1)]


def _require_finite(best: np.float32) -> None:
    if not math.isfinite(best):
        raise EngineError(
            "sampling", "the model's logits are not finite", found=str(best),
            remedy="check the engine with verify='full' and the checkpoint it was built from",
        )  # fmt: skip
