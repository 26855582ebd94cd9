"""How many tokens a draft model guesses for each answer: as many as pay, by what was accepted and by measured step times."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

MOST_DRAFTED = 12  # tokens of an answer in one step
_FIRST_RATE, _FIRST_WEIGHT = 0.7, 4.0  # share of guesses expected to be right while little is known, counted as so many guesses
_OWN_WEIGHT = 6.0  # guesses of all answers that the estimate of a single one begins with
_MEMORY, _OWN_MEMORY = 0.998, 0.97  # part of the counts that is kept at each step: of all answers, and of a single one
_PACE, _SMOOTHING = 0.2, 0.05  # weights of the latest time in the host's pace, and in the mean of its size
_MOST_CHANGE = 1.25  # by which a time may differ from the expected one; what takes longer was interrupted
_USUAL_SLOPE, _LEAST_SLOPE = 1 / 8, 1 / 32  # time of a token more than in steps that were measured, in times of their tokens
_SMALL = 16  # tokens of a step, up to which its size is not rounded
_GAIN = 1.05  # tokens a second that guesses must promise, in proportion to those without: less is lost in what is not exact
_TRIAL = 8  # guesses tried, until which those for one answer are enough to judge a draft model by
_NO_BACKLOG = 2  # tokens that the draft model has to compute for an answer that it has followed until now
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


class Pace:
    """How long steps take now, in proportion to the times that are kept of them: other work on the host makes all of them
    slower, those that were not run since too."""

    def __init__(self) -> None:
        self.value = 1.0


class StepTimes:
    """Mean times of steps by their number of tokens, which is rounded to an eighth of its size."""

    def __init__(self, pace: Pace | None = None) -> None:
        self._pace = pace or Pace()
        self._means: dict[int, float] = {}  # at a pace of 1
        self._counts: dict[int, int] = {}
        self._sizes: list[int] = []
        self._times: list[float] = []  # of these sizes; none is more than that of a larger size

    def add(self, tokens: int, seconds: float) -> None:
        """Take notice of a step. The first one of its size may prepare kernels: it is left out where the step is small, else it
        counts until the second one."""
        size = _rounded(tokens)
        count = self._counts[size] = self._counts.get(size, 0) + 1
        if count == 1 and size <= _SMALL:
            return
        if count <= 2:
            self._means[size] = seconds / self._pace.value
            self._sizes = sorted(self._means)
        else:
            change = seconds / (self._means[size] * self._pace.value)
            change = min(max(change, 1 / _MOST_CHANGE), _MOST_CHANGE)
            self._means[size] *= change**_SMOOTHING
            self._pace.value *= change**_PACE
        least, self._times = math.inf, []
        for size in reversed(self._sizes):
            least = min(least, self._means[size])
            self._times.append(least)
        self._times.reverse()

    def knows(self, tokens: int) -> bool:
        """Whether steps of as many tokens, or of fewer, were measured."""
        return bool(self._sizes) and self._sizes[0] <= tokens

    def seconds(self, tokens: int) -> float:
        """The expected time of a step: between those of smaller and larger steps; for a smaller one that of the smallest known
        size, for a larger one in proportion to what it has more than the largest; 0 while nothing is known."""
        return self._pace.value * self._usual(tokens)

    def _usual(self, tokens: int) -> float:
        sizes, times = self._sizes, self._times
        place = bisect_left(sizes, tokens)
        if not sizes:
            return 0.0
        if place == 0:
            return times[0]
        if place < len(sizes):
            low, high = sizes[place - 1], sizes[place]
            return times[place - 1] + (times[place] - times[place - 1]) * (tokens - low) / (high - low)
        alone = times[0] / sizes[0]
        measured = (times[-1] - times[0]) / (sizes[-1] - sizes[0]) if len(sizes) > 1 else 0.0
        weight = min(1.0, (sizes[-1] - sizes[0]) / sizes[0])  # the times of nearly equal steps tell little about larger ones
        slope = weight * measured + (1 - weight) * alone * _USUAL_SLOPE
        return times[-1] + max(slope, alone * _LEAST_SLOPE) * (tokens - sizes[-1])


def _rounded(tokens: int) -> int:
    return tokens if tokens <= _SMALL else round(2 ** (round(8 * math.log2(tokens)) / 8))


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
        pace = Pace()
        self.verify, self.draft = StepTimes(pace), StepTimes(pace)
        self._fixed = fixed
        self._all = Acceptance()
        self._steps = self._tried = 0

    def note(self, acceptance: Acceptance, drafted: int, accepted: int) -> None:
        """Take notice of the outcome of an answer's guesses."""
        acceptance.note(drafted, accepted)
        self._all.note(drafted, accepted)
        self._tried += accepted + (accepted < drafted)

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
        if self._steps % _PLAIN_EVERY == 0 or not self.verify.knows(answers):
            return [0] * len(candidates)
        rates = [candidate.acceptance.rate(expected, _OWN_WEIGHT) for candidate in candidates]
        most = [candidate.most for candidate in candidates]
        verify, draft = cache(self.verify.seconds), cache(self.draft.seconds)
        counts = allocate(rates, most, answers, room, verify, draft)
        if any(count and candidate.backlog > _NO_BACKLOG for count, candidate in zip(counts, candidates, strict=True)):
            gains = [sum(rate**place for place in range(1, count + 1)) for rate, count in zip(rates, counts, strict=True)]
            saved = _saved(counts, gains, answers, verify, draft)
            most = [
                count if _pays(candidate, gain, saved, draft) else 0
                for candidate, count, gain in zip(candidates, most, gains, strict=True)
            ]
            counts = allocate(rates, most, answers, room, verify, draft)
        if self._tried < _TRIAL and any(counts):  # one answer shows whether the guesses of this draft are ever right
            first = min((candidates[i].backlog, i) for i, count in enumerate(counts) if count)[1]
            counts = [count if i == first else 0 for i, count in enumerate(counts)]
        return counts


def _saved(counts: Sequence[int], gains: Sequence[float], answers: int, verify: Seconds, draft: Seconds) -> float:
    """The time that a step with these guesses saves for each token that they are expected to gain."""
    guessing = sum(draft(sum(count >= place for count in counts)) for place in range(1, max(counts) + 1))
    plain = verify(answers) * (1 + sum(gains) / answers)
    return (plain - guessing - verify(answers + sum(counts))) / sum(gains)


def _pays(candidate: Candidate, gain: float, saved: float, draft: Seconds) -> bool:
    """Whether the time that the draft model needs to catch up with an answer is less than what its guesses may save on the rest
    of it: `saved` seconds for each of the `gain` tokens that a step gains."""
    if candidate.backlog <= _NO_BACKLOG or not gain:
        return True
    return draft(candidate.backlog) <= saved * gain * candidate.left / (1 + gain)


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
    best_rate = _GAIN * expected / plain if plain else 0.0
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
