"""Choosing the next token: the logits processors of Hugging Face Transformers, in their order, in NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.artifact import GenerationDefaults
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.candidates import Few, Row

_FIRST_NUCLEUS = 512  # candidates sorted at first for top-p; grown when their mass is not enough
_GREEDY_BELOW = 1e-6  # a temperature that leaves one token, and would overflow float32


@dataclass(frozen=True)
class SamplingParams:
    """How a request is sampled; what is None comes from the engine's generation defaults.

    `temperature` 0 takes the most likely token. `top_k` 0 and `top_p` 1 are off. `repetition_penalty` counts prompt and
    answer. `seed` makes a request repeatable, whatever it is batched with. An answer ends after `max_new_tokens`, at an
    end-of-sequence token unless `ignore_eos`, or before the first of the `stop` strings, which is left out of the text.
    `prompt_lookup` is how many tokens may be guessed per step from what prompt and answer said before (0: none); it makes
    answers that quote faster and changes none.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    prompt_lookup: int = 0

    def __post_init__(self) -> None:
        """Raises `EngineError` for values no distribution has."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        _check("temperature", self.temperature, lambda v: 0 <= v < math.inf, "0 or more")
        _check("top_k", self.top_k, lambda v: v >= 0, "0 (off) or more")
        _check("top_p", self.top_p, lambda v: 0 < v <= 1, "above 0 and at most 1")
        _check("repetition_penalty", self.repetition_penalty, lambda v: 0 < v < math.inf, "above 0")
        _check("max_new_tokens", self.max_new_tokens, lambda v: v >= 1, "1 or more")
        _check("seed", self.seed, lambda v: v >= 0, "0 or more")
        _check("prompt_lookup", self.prompt_lookup, lambda v: v >= 0, "0 (off) or more")
        if "" in stop:
            raise EngineError("sampling", "a stop string is empty", remedy="leave it out")


def _check(name: str, value: float | None, holds: Callable[[float], bool], expected: str) -> None:
    if value is not None and not holds(value):
        raise EngineError("sampling", name, found=str(value), expected=expected)


class Sampler:
    """The sampling state of one request: its values, its random generator, the tokens seen so far."""

    def __init__(self, params: SamplingParams, defaults: GenerationDefaults, prompt: Iterable[int]) -> None:
        self.temperature = defaults.temperature if params.temperature is None else params.temperature
        self.top_k = defaults.top_k if params.top_k is None else params.top_k
        self.top_p = defaults.top_p if params.top_p is None else params.top_p
        penalty = defaults.repetition_penalty if params.repetition_penalty is None else params.repetition_penalty
        self.repetition_penalty = penalty
        self._random = np.random.default_rng(params.seed)
        self._seen = set(prompt) if penalty != 1 else set()
        self._seen_ids = np.fromiter(self._seen, np.int64, len(self._seen))
        self._seen_count = len(self._seen)

    def sample(self, logits: Row) -> int:
        """The next token for the logits after the last, which are scratch: the penalty is written into them."""
        token = self._choose(logits)
        if self.repetition_penalty != 1 and token not in self._seen:
            self._seen.add(token)
            if self._seen_count == len(self._seen_ids):
                self._seen_ids = np.resize(self._seen_ids, 2 * self._seen_count + 64)
            self._seen_ids[self._seen_count] = token
            self._seen_count += 1
        return token

    def candidates(self, more: int = 0) -> int:
        """How many of the raw logits can decide the next token, with those equal to the last; 0 for all.

        With `more` tokens sampled before it. runtime/serving/candidates.py has the proof.
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
        """(token ids, or None for all in order; float32 weights, not normalised) that are sampled from.

        Order as in Transformers: repetition penalty, temperature, top-k, top-p.
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
        """The values, with those of tokens seen made less likely in place."""
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
        """Tokens not below the k-th best; ties with it stay, as in Transformers. None for all."""
        vocabulary = len(logits)
        if self.top_k == 0 or self.top_k >= vocabulary:
            _require_finite(logits.max())
            return None
        least = np.partition(logits, vocabulary - self.top_k)[vocabulary - self.top_k]
        ids = np.flatnonzero(logits >= least)
        _require_finite(logits[ids].max(initial=-math.inf))
        return ids


def _nucleus(weights: NDArray[np.float32], top_p: float) -> NDArray[np.int64]:
    """Indices of the fewest likeliest entries whose mass reaches `top_p`, likeliest first, at least one."""
    needed = top_p * weights.sum(dtype=np.float64)
    size = min(_FIRST_NUCLEUS, len(weights))
    while True:
        top = np.flatnonzero(weights >= np.partition(weights, -size)[-size])
        top = top[np.argsort(-weights[top])]
        mass = weights[top].astype(np.float64).cumsum()
        if mass[-1] >= needed or len(top) == len(weights):
            break
        size = min(size * 8, len(weights))
    # An entry stays while the mass of those above it is below top_p.
    return top[: max(1, int(np.searchsorted(mass, needed, side="left")) + 1)]


def _require_finite(best: np.float32) -> None:
    if not math.isfinite(best):
        raise EngineError(
            "sampling", "the model's logits are not finite", found=str(best),
            remedy="check the engine with verify='full' and the checkpoint it was built from",
        )  # fmt: skip
