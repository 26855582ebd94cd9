"""Samples the next token: the logits processors of Hugging Face Transformers and of vLLM, in their order, in NumPy."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.candidates import Few, Row
from belle_compile.runtime.serving.request import Request

_FIRST_NUCLEUS = 512  # tokens that top-p sorts at first; more when their mass is not enough


class Sampler:
    """The sampling state of one request: its parameters, its random generator, and the tokens of prompt and answer so far.

    Logits are changed in this order: logit bias, repetition penalty (Transformers: SequenceBias, RepetitionPenalty), frequency
    and presence penalty (vLLM, after its repetition penalty), then -inf for tokens that would end the answer before its
    `min_tokens` (Transformers: MinNewTokensLength), and last for tokens that the request's grammar does not allow. The caller
    of `sample` leaves those out beforehand, which is the same, for all other changes are of each logit alone. The token is
    drawn after temperature, top-k, top-p and min-p (Transformers: TemperatureLogitsWarper, TopK, TopP, MinP), or is the most
    likely one.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._greedy = request.greedy
        self._random: _Uniforms | _UniformsAhead | None
        self._random = None if self._greedy else _Uniforms(np.random.default_rng(_seed(request)))
        self._bias_ids = np.array([token for token, _ in request.logit_bias], np.int64)
        self._biases = np.array([bias for _, bias in request.logit_bias], np.float32)
        self._end_ids = np.array(sorted(set(request.end_ids)), np.int64)
        self._seen = _Tokens(request.prompt) if request.repetition_penalty != 1 else None
        counts = request.frequency_penalty != 0 or request.presence_penalty != 0
        self._generated = _Counts() if counts else None
        self._early = request.min_tokens if len(self._end_ids) else 0  # tokens to come before the answer may end
        self._changes_logits = bool(request.logit_bias or self._seen or self._generated or self._early)
        # Whether a token that is not among the best raw logits may be chosen, or all logits are needed for log probabilities.
        self._needs_all = (
            request.logprobs is not None
            or request.grammar is not None
            or request.repetition_penalty < 1
            or min(request.frequency_penalty, request.presence_penalty) < 0
            or any(bias > 0 for _, bias in request.logit_bias)
        )

    def sample(self, logits: Row) -> int:
        """Choose the next token from `logits`, into which penalties and biases are written."""
        token = self._choose(logits)
        if self._changes_logits:
            if self._seen:
                self._seen.add(token)
            if self._generated:
                self._generated.add(token)
            self._early = max(0, self._early - 1)
        return token

    def ahead(self) -> Sampler:
        """Return a sampler that chooses the tokens which come next from the logits of another model, and leaves this one as it
        is. It uses the random numbers that this one will use for the same tokens: where both models agree about what is
        likely, the same numbers mostly choose the same tokens."""
        other = copy.copy(self)
        other._seen, other._generated = copy.deepcopy(self._seen), copy.deepcopy(self._generated)
        if isinstance(self._random, _Uniforms):
            other._random = _UniformsAhead(self._random)
        return other

    def ends(self, token: int) -> bool:
        """Whether an answer ends with this token."""
        return token in self._request.end_ids

    def candidates(self, more: int = 0) -> int:
        """Return n such that the n largest raw logits, and those equal to the n-th, decide the next token; 0 if all may.

        `more` is the number of tokens that are sampled before that one. The proof is in runtime/serving/candidates.py.
        """
        best = 1 if self._greedy else self._request.top_k
        if best == 0 or self._needs_all:
            return 0
        if not self._changes_logits:
            return best
        penalized = self._seen or self._generated  # with a repetition penalty, the answer's tokens are among those seen
        lowered = len(self._bias_ids) + (penalized.size + more if penalized else 0)
        return best + lowered + (len(self._end_ids) if self._early else 0)

    def _choose(self, logits: Row) -> int:
        if self._greedy:
            values = self._processed(logits)
            best = int(values.argmax())
            require_finite(values[best])
            return int(logits.tokens[best]) if isinstance(logits, Few) else best
        assert self._random is not None, "an answer that is not greedy has random numbers"
        ids, weights = self.distribution(logits)
        cumulative = weights.astype(np.float64).cumsum()
        index = int(np.searchsorted(cumulative, self._random.next() * cumulative[-1], side="right"))
        index = min(index, len(weights) - 1)
        return index if ids is None else int(ids[index])

    def distribution(self, logits: Row) -> tuple[NDArray[np.int64] | None, NDArray[np.float32]]:
        """Return what the token is drawn from: ids (None for the whole vocabulary in order) and float32 weights, whose sum is
        not 1."""
        request, values = self._request, self._processed(logits)
        ids = _top_k(values, request.top_k)
        scores = values if ids is None else values[ids]
        if isinstance(logits, Few):
            ids = logits.tokens if ids is None else logits.tokens[ids]
        scores = (scores - scores.max()) / np.float32(request.temperature)
        weights = np.exp(scores)
        if request.top_p < 1:
            kept = _nucleus(weights, request.top_p)
            ids, weights = (kept if ids is None else ids[kept]), weights[kept]
        if request.min_p > 0:
            # The most likely token is never removed, and its weight is exp(0) = 1.
            kept = np.flatnonzero(weights >= np.float32(request.min_p))
            ids, weights = (kept if ids is None else ids[kept]), weights[kept]
        return ids, weights

    def _processed(self, logits: Row) -> NDArray[np.float32]:
        """Apply biases and penalties to the logits, in place, and return all logits."""
        values = logits.values if isinstance(logits, Few) else logits
        if not self._changes_logits:
            return values
        request = self._request
        if len(self._bias_ids):
            places, present = _locate(logits, self._bias_ids)
            values[places] += self._biases[present]
        if self._seen:
            places, _ = _locate(logits, self._seen.ids)
            scores, penalty = values[places], np.float32(request.repetition_penalty)
            values[places] = np.where(scores < 0, scores * penalty, scores / penalty)
        if self._generated:
            places, present = _locate(logits, self._generated.ids)
            values[places] -= np.float32(request.frequency_penalty) * self._generated.counts[present]
            values[places] -= np.float32(request.presence_penalty)
        if self._early:
            values[_locate(logits, self._end_ids)[0]] = -np.inf
        return values


class _Uniforms:
    """Random numbers in [0, 1), each used once. Those that were looked at ahead come next."""

    def __init__(self, random: np.random.Generator) -> None:
        self._random = random
        self._drawn: deque[float] = deque()

    def next(self) -> float:
        return self._drawn.popleft() if self._drawn else self._random.random()

    def peek(self, place: int) -> float:
        """The number that is `place` numbers behind the next one."""
        while len(self._drawn) <= place:
            self._drawn.append(self._random.random())
        return self._drawn[place]


class _UniformsAhead:
    """The random numbers that another one will use, from its next one on. They are valid until it uses one."""

    def __init__(self, uniforms: _Uniforms) -> None:
        self._uniforms, self._place = uniforms, -1

    def next(self) -> float:
        self._place += 1
        return self._uniforms.peek(self._place)


class _Tokens:
    """A growing set of tokens, as an array."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._ids = np.unique(np.array(tokens, np.int64))  # the first `size` entries are used
        self.size = len(self._ids)
        self._place_of = {token: place for place, token in enumerate(self._ids.tolist())}

    @property
    def ids(self) -> NDArray[np.int64]:
        """The tokens, each once."""
        return self._ids[: self.size]

    def add(self, token: int) -> int:
        """Add a token if it is new; returns its place in `ids`."""
        place = self._place_of.setdefault(token, self.size)
        if place == self.size:
            if self.size == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros(self.size + 64, np.int64)])
            self._ids[place] = token
            self.size += 1
        return place


class _Counts(_Tokens):
    """How often each of a growing set of tokens occurred; at first there are none."""

    def __init__(self) -> None:
        super().__init__(())
        self._counts = np.zeros(0, np.float32)

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each of the `ids` occurred."""
        return self._counts[: self.size]

    def add(self, token: int) -> int:
        """Count a token; returns its place in `ids`."""
        place = super().add(token)
        if place >= len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros(len(self._counts) + 64, np.float32)])
        self._counts[place] += 1
        return place


def _seed(request: Request) -> np.random.SeedSequence:
    """Return the seed of a request's random numbers; the rule is documented at `SamplingParams`."""
    return np.random.SeedSequence(request.seed, spawn_key=(request.answer,) if request.answer else ())


def _locate(logits: Row, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the places of tokens in a row of logits, and a mask of the `ids` that the row has."""
    if isinstance(logits, Few):
        places = np.searchsorted(logits.tokens, ids)
        places[places == len(logits.tokens)] = 0
        present = logits.tokens[places] == ids
        return places[present], present
    present = ids < len(logits)  # an embedding may have more rows than there are logits
    return ids[present], present


def _top_k(logits: NDArray[np.float32], top_k: int) -> NDArray[np.int64] | None:
    """Return the tokens whose logits are not below the k-th largest (ties stay, as in Transformers); None for all."""
    vocabulary = len(logits)
    if top_k == 0 or top_k >= vocabulary:
        require_finite(logits.max())
        return None
    least = np.partition(logits, vocabulary - top_k)[vocabulary - top_k]
    ids = np.flatnonzero(logits >= least)
    require_finite(logits[ids].max(initial=-math.inf))
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


def require_finite(best: np.float32) -> None:
    """Raise `EngineError` when the largest of the logits is not a finite number; the maximum of a row with NaN is NaN."""
    if not math.isfinite(best):
        raise EngineError(
            "sampling", "the model's logits are not finite", found=str(best),
            remedy="check the engine with verify='full' and the checkpoint it was built from",
        )  # fmt: skip
