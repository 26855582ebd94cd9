"""How many tokens a draft model guesses for each answer: as many as pay, by what was accepted and by measured step times."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MOST_DRAFTED = 12  # tokens of an answer in one step
_FIRST_RATE, _FIRST_WEIGHT = 0.7, 4.0  # share of guesses expected to be right while little is known, counted as so many guesses
_OWN_WEIGHT = 6.0  # guesses of all answers that the estimate of a single one begins with
_MEMORY, _OWN_MEMORY = 0.995, 0.97  # part of the counts that is kept at each step: of all answers, and of a single one
_SMOOTHING = 0.2  # weight of the latest time in a mean
_PLAIN_EVERY = 64  # steps after which one is run without guesses, to measure it

Seconds = Callable[[int], float]  # the time of a step by its number of tokens


class Acceptance:
    """The guesses of a draft model for one answer, or for all: how many were made, how many of those tried were right.

    A guess is tried if those before it in its step were right. Old counts fade, so that what has changed is tried again.
    """

    def __init__(self) -> None:
        self.accepted = 0  # counted by the sequence
        self._tried = self._right = 0.0

    def fade(self, memory: float) -> None:
        """Forget a part of the counts."""
        self._tried, self._right = self._tried * memory, self._right * memory

    def note(self, drafted: int, accepted: int) -> None:
        """Take notice of the outcome of a step's guesses."""
        self._tried += accepted + (accepted < drafted)
        self._right += accepted

    def rate(self, expected: float, weight: float) -> float:
        """The probability that a guess is right, where it was `expected` to be so with as much `weight` as so many guesses."""
        return (self._right + expected * weight) / (self._tried + weight)


class StepTimes:
    """Mean times of steps by their number of tokens, which is rounded to an eighth of its size."""

    def __init__(self) -> None:
        self._times: dict[int, float] = {}
        self._seen: set[int] = set()
        self._known: list[int] = []

    def add(self, tokens: int, seconds: float) -> None:
        """Take notice of a step. The first one of its size is left out: it may prepare kernels."""
        size = _rounded(tokens)
        if size not in self._seen:
            self._seen.add(size)
        elif size in self._times:
            mean = self._times[size]
            self._times[size] = mean + _SMOOTHING * (min(seconds, 3 * mean) - mean)
        else:
            self._times[size] = seconds
            self._known = sorted(self._times)

    def seconds(self, tokens: int) -> float:
        """The expected time of a step: between those of smaller and larger steps, and where there are none, that of the nearest
        size, for a larger step in proportion to what it has more than another one; 0 while nothing is known."""
        known, times = self._known, self._times
        place = bisect_left(known, tokens)
        if not known:
            return 0.0
        if place == 0:
            return times[known[0]]
        if place == len(known) and place == 1:
            return times[known[0]]
        low, high = known[min(place, len(known) - 1) - 1], known[min(place, len(known) - 1)]
        slope = max(0.0, (times[high] - times[low]) / (high - low))
        return times[low] + slope * (tokens - low) if place == len(known) else _between(tokens, low, high, times)


def _between(tokens: int, low: int, high: int, times: dict[int, float]) -> float:
    return times[low] + (times[high] - times[low]) * (tokens - low) / (high - low)


def _rounded(tokens: int) -> int:
    return tokens if tokens <= 16 else round(2 ** (round(8 * math.log2(tokens)) / 8))


@dataclass(frozen=True)
class Candidate:
    """An answer that may be guessed ahead: up to `most` tokens, of which `left` may still come. The draft model has to compute
    `backlog` of its known tokens first, of which the last one always."""

    acceptance: Acceptance
    most: int
    left: int
    backlog: int


class DraftLengths:
    """Chooses the numbers of guesses of a step by the expected tokens a second of all answers in it.

    The times are those of the model's steps without tokens of prompts (`verify`), and of the draft model's (`draft`). With
    `fixed`, each answer gets as many guesses, whether they pay or not.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self.verify, self.draft = StepTimes(), StepTimes()
        self._fixed = fixed
        self._all = Acceptance()
        self._steps = 0

    def note(self, acceptance: Acceptance, drafted: int, accepted: int) -> None:
        """Take notice of the outcome of an answer's guesses."""
        acceptance.note(drafted, accepted)
        self._all.note(drafted, accepted)

    def choose(self, candidates: Sequence[Candidate], answers: int, room: int) -> list[int]:
        """Return the number of guesses for each candidate, together at most `room`; `answers` is the number of tokens that the
        step has without them."""
        if self._fixed is not None:
            return _fixed_counts(candidates, self._fixed, room)
        self._steps += 1
        self._all.fade(_MEMORY)
        expected = self._all.rate(_FIRST_RATE, _FIRST_WEIGHT)
        for candidate in candidates:
            candidate.acceptance.fade(_OWN_MEMORY)
        if self._steps % _PLAIN_EVERY == 0:
            return [0] * len(candidates)
        rates = [candidate.acceptance.rate(expected, _OWN_WEIGHT) for candidate in candidates]
        verify, draft = self.verify.seconds, self.draft.seconds
        most = [
            candidate.most if self._pays(candidate, rate, answers) else 0
            for candidate, rate in zip(candidates, rates, strict=True)
        ]
        return allocate(rates, most, answers, room, verify, draft)

    def _pays(self, candidate: Candidate, rate: float, answers: int) -> bool:
        """Whether the time that the draft model needs to catch up with an answer is less than what its guesses may save on the
        rest of it, were it alone among the answers to be guessed."""
        if candidate.backlog <= 2:
            return True
        verify, draft = self.verify.seconds, self.draft.seconds
        (count,) = allocate([rate], [candidate.most], answers, candidate.most, verify, draft)
        if not count:
            return False
        more = sum(rate**place for place in range(1, count + 1))
        plain = verify(answers)
        guessed = (verify(answers + count) + count * draft(1)) / (1 + more / answers)
        saved = candidate.left * max(0.0, plain - guessed) / answers
        return draft(candidate.backlog) <= saved or not plain


def allocate(
    rates: Sequence[float], most: Sequence[int], answers: int, room: int, verify: Seconds, draft: Seconds
) -> list[int]:
    """The numbers of guesses with the most expected tokens a second.

    `rates` are the probabilities that a guess for each answer is right, after right ones; `most` limits their numbers. A step
    has `answers` tokens without guesses, and room for `room` guesses. The draft model guesses one token of each answer in a
    step of its own; answers with higher rates are guessed further ahead.
    """
    counts, best = [0] * len(rates), [0] * len(rates)
    expected, guesses, drafting = float(answers), 0, 0.0
    plain = verify(answers)
    best_rate = expected / plain if plain else 0.0
    for place in range(1, max(most, default=0) + 1):
        gains = sorted(((rates[i] ** place, i) for i, count in enumerate(counts) if count == place - 1 < most[i]), reverse=True)
        chosen, chosen_rate, gained = 0, 0.0, 0.0
        for number, (gain, _) in enumerate(gains[: room - guesses], 1):
            gained += gain
            seconds = drafting + draft(number) + verify(answers + guesses + number)
            rate = (expected + gained) / seconds if seconds else math.inf
            if rate > chosen_rate or not seconds:
                chosen, chosen_rate = number, rate
        if not chosen:
            break
        for gain, i in gains[:chosen]:
            counts[i] += 1
            expected += gain
        guesses += chosen
        drafting += draft(chosen)
        if chosen_rate > best_rate or chosen_rate == math.inf:
            best, best_rate = list(counts), chosen_rate
        elif chosen_rate < 0.7 * best_rate:
            break  # guesses further ahead gain less and less
    return best


def _fixed_counts(candidates: Sequence[Candidate], fixed: int, room: int) -> list[int]:
    counts = []
    for candidate in candidates:
        counts.append(max(0, min(fixed, candidate.most, room)))
        room -= counts[-1]
    return counts
