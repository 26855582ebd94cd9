"""Users who each ask again as soon as they are answered, and what they saw."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from benchmarks.ladder.steps import Asked
from benchmarks.serving.aiperf import FIRST_TOKEN_LIMIT_S, TOKEN_LIMIT_S

REPLAYED = 20  # answers for each user when a queue is computed


class Answer(NamedTuple):
    """When a request was sent, and when its first and its last token came, in seconds from the start of the sample."""

    sent: float
    first: float
    end: float
    tokens: int

    @property
    def latency_s(self) -> float:
        return self.end - self.sent

    @property
    def first_token_s(self) -> float:
        return self.first - self.sent

    @property
    def token_s(self) -> float:
        """Mean time between the tokens; 0 for an answer of one token."""
        return (self.end - self.first) / max(self.tokens - 1, 1)

    @property
    def good(self) -> bool:
        """Whether it is within the limits of goodput."""
        return self.first_token_s <= FIRST_TOKEN_LIMIT_S and self.token_s <= TOKEN_LIMIT_S


@dataclass(frozen=True)
class Sample:
    """The answers of so many users within `seconds`, and the share of it in which kernels ran (None where nothing tells)."""

    users: int
    answers: Sequence[Answer]
    seconds: float
    busy: float | None = None

    def to_plain(self) -> dict[str, Any]:
        """Rates and times, in milliseconds, without the first answers, as many as there are users: at first all ask at once.

        Rates are those between the last of these first answers and the last one within the time, so that they depend neither
        on answers that are under way at the end nor on whether answers end one by one or together.
        """
        answers = sorted(self.answers, key=lambda answer: answer.end)
        started = answers[min(self.users, len(answers)) - 1].end
        steady = [answer for answer in answers if answer.end > started]
        if not steady:
            started, steady = 0.0, answers
        within = [answer for answer in steady if answer.end <= self.seconds] or steady
        seconds = within[-1].end - started
        found: dict[str, Any] = {
            "users": self.users,
            "answers": len(self.answers),
            "seconds": round(self.seconds, 3),
            "requests_per_second": round(len(within) / seconds, 4),
            "tokens_per_second": round(sum(answer.tokens for answer in within) / seconds, 3),
            "good": round(sum(answer.good for answer in steady) / len(steady), 4),
            "busy": None if self.busy is None else round(self.busy, 4),
        }
        for name in ("latency", "first_token", "token"):
            p50, p99 = np.percentile([getattr(answer, f"{name}_s") for answer in steady], (50, 99))
            found |= {f"{name}_p50": round(1000 * float(p50), 3), f"{name}_p99": round(1000 * float(p99), 3)}
        return found


class Served(NamedTuple):
    """How long a request or a batch took by itself: to the first token of each answer, and until all were complete."""

    first_token_s: Sequence[float]
    seconds: float
    busy_s: float | None = None  # of it, in which kernels ran


def replay(served: Sequence[Served], tokens: Sequence[int], users: int) -> Sample:
    """The queue of users before something that answers one request after the other, in the order in which they come.

    It needs no measurement: whoever waits sees the times of all before it. The requests measured are taken in turn, again and
    again, until every user has been answered often enough.
    """
    waiting = deque([0.0] * users)
    now, busy, answers = 0.0, 0.0, []
    for number in range(max(REPLAYED * users, len(served))):
        each, sent = served[number % len(served)], waiting.popleft()
        answers.append(Answer(sent, now + each.first_token_s[0], now + each.seconds, tokens[number % len(tokens)]))
        now, busy = now + each.seconds, busy + (each.busy_s or 0.0)
        waiting.append(now)
    return Sample(users, answers, now, None if served[0].busy_s is None else busy / now)


def batched(
    requests: Sequence[Asked], users: int, seconds: float, largest: int, serve: Callable[[Sequence[Asked]], Served]
) -> Sample:
    """Users before something that answers batches: whatever waits is sorted by length and cut into batches of up to `largest`.

    `serve` answers a batch, all of whose answers are complete when the longest is. While it does so, nothing else runs, so that
    the clock goes on by what each batch took. It ends after `seconds`, or when there are no more requests.
    """
    more = iter(requests)
    waiting = [(0.0, asked) for asked in islice(more, users)]
    now, answers = 0.0, []
    while waiting and now < seconds:
        window, waiting = sorted(waiting, key=lambda each: len(each[1].prompt)), []
        for start in range(0, len(window), largest):
            batch = window[start : start + largest]
            took = serve([asked for _, asked in batch])
            firsts = [now + first for first in took.first_token_s]
            now += took.seconds
            answers += [Answer(sent, first, now, asked.tokens) for (sent, asked), first in zip(batch, firsts, strict=True)]
            waiting += [(now, asked) for asked in islice(more, len(batch))]
    return Sample(users, answers, now)
