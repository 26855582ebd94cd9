"""Which requests may wait, and for how long: the bounded queue, and the deadlines."""

from __future__ import annotations

import heapq
import math
import threading
from collections.abc import Iterable
from itertools import count
from typing import Generic, Protocol, TypeVar

from belle_compile.runtime.serving.scheduling import RETRY_AFTER_S, FirstTokenLimit, Pace, QueueFull
from belle_compile.runtime.serving.sequence import Sequence


class Timed(Protocol):
    """What has a deadline: a job."""

    sequence: Sequence
    done: threading.Event


T = TypeVar("T", bound=Timed)


class Gate:
    """Counts the sequences that were submitted and have not been next yet, and refuses those that are too many.

    `enter` is called under the lock of those who submit; the other methods on the step thread. Neither waits for the other.
    """

    def __init__(self, most: int | None, free: int, first_token: FirstTokenLimit | None = None) -> None:
        """`most` sequences may wait, None for any number, and `free` can be admitted at once. `first_token` limits the time of
        those that wait."""
        self.refusals = 0
        self._most = most
        self._room = math.inf if most is None else most + free  # while no other sequence runs or waits
        self._free = free  # that can be admitted without waiting
        self._waiting: dict[Sequence, None] = {}
        self._pace = Pace()
        self._first_token = first_token

    def enter(self, sequences: list[Sequence], now: float) -> None:
        """Let sequences in, all or none; raises `QueueFull`."""
        if not sequences:
            return
        if len(sequences) > self._room:
            self.refusals += len(sequences)
            found, expected = f"{len(sequences)} at once", f"at most {self._room}, those that run included"
            raise QueueFull("the queue has no room for so many", found=found, expected=expected, retry_after_s=None)
        free = self._free
        over = len(self._waiting) + len(sequences) - free - (math.inf if self._most is None else self._most)
        if over > 0:
            self.refusals += len(sequences)
            waiting, wait_s = max(0, len(self._waiting) - free), self._pace.wait_s(int(over) - 1)
            raise QueueFull(
                "the queue is full", found=f"{waiting} waiting requests and {len(sequences)} more",
                expected=f"at most {self._most}", retry_after_s=RETRY_AFTER_S if wait_s is None else wait_s,
            )  # fmt: skip
        if (deadline := min(sequence.deadline for sequence in sequences)) < math.inf:
            self._check_wait(sequences, deadline - now, free)
        if self._first_token:
            self._check_first_token(sequences, self._first_token, free)
        self._waiting.update(dict.fromkeys(sequences))

    def left(self, sequences: Iterable[Sequence], now: float) -> None:
        """Take notice that sequences were admitted, or wait for nothing but their prefix."""
        before = len(self._waiting)
        for sequence in sequences:
            self._waiting.pop(sequence, None)
        self._pace.left(before - len(self._waiting), now, len(self._waiting))

    def gave_up(self, sequence: Sequence, now: float) -> None:
        """Take notice that a sequence was removed, whether it has waited or not."""
        if self._waiting.pop(sequence, sequence) is None and not self._waiting:
            self._pace.left(0, now, 0)

    def taken_back(self, sequences: Iterable[Sequence]) -> None:
        """Take notice that sequences were let in and could not be submitted. Called on the thread of who submits."""
        for sequence in sequences:
            self._waiting.pop(sequence, None)

    def set_free(self, free: int) -> None:
        """Set how many sequences can be admitted at once."""
        self._free = free

    def _check_wait(self, sequences: list[Sequence], time_left_s: float, free: int) -> None:
        """Raise `QueueFull` where the time of sequences of one priority will be over before the last one begins."""
        ahead = len(sequences) - 1 - free + len(self._before(sequences))
        wait_s = self._pace.wait_s(ahead) if ahead >= 0 else None
        if wait_s is not None and wait_s > time_left_s:
            self.refusals += len(sequences)
            raise QueueFull(
                "the request would wait longer than its time", found=f"{wait_s:.1f} s until its first step",
                expected=f"at most {max(0.0, time_left_s):.1f} s", retry_after_s=wait_s - max(0.0, time_left_s),
            )  # fmt: skip

    def _check_first_token(self, sequences: list[Sequence], limit: FirstTokenLimit, free: int) -> None:
        """Raise `QueueFull` where the last of these sequences would get its first token too late because of the others: it
        waits until those before it are admitted, or, where it is admitted at once, for their prompts, and then for its own. A
        prompt that takes too long by itself is let in while nothing waits."""
        before = [*self._before(sequences), *sequences[:-1]]
        ahead, wait_s = len(before) - free, 0.0
        if ahead >= 0:
            paced = self._pace.wait_s(ahead)
            wait_s = limit.gap_s * (ahead + 1) if paced is None else paced
        elif before:
            wait_s = sum(sequence.prompt_length for sequence in before) / limit.prompt_tokens_per_s
        first_token_s = wait_s + sequences[-1].prompt_length / limit.prompt_tokens_per_s
        if wait_s > 0 and first_token_s > limit.seconds:
            self.refusals += len(sequences)
            raise QueueFull(
                "the first token would come too late", found=f"after {first_token_s:.2f} s",
                expected=f"at most {limit.seconds:g} s", retry_after_s=min(wait_s, first_token_s - limit.seconds),
            )  # fmt: skip

    def _before(self, sequences: list[Sequence]) -> list[Sequence]:
        """The waiting sequences that go before the last of these, which have one priority."""
        priority = sequences[-1].scheduling.priority
        return [other for other in list(self._waiting) if other.scheduling.priority <= priority]


class Deadlines(Generic[T]):
    """The jobs whose time is limited, the next one to end first."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._numbers = count()
        self._swept = 0  # entries that were left when those of ended jobs were removed last

    def add(self, job: T) -> None:
        """Watch a job that has a deadline."""
        heapq.heappush(self._heap, (job.sequence.deadline, next(self._numbers), job))
        if len(self._heap) > 2 * self._swept + 64:
            self._heap = [entry for entry in self._heap if not entry[2].done.is_set()]
            heapq.heapify(self._heap)
            self._swept = len(self._heap)

    def over(self, now: float) -> list[T]:
        """Remove and return the jobs whose time is over and that have not ended."""
        jobs = []
        while self._heap and self._heap[0][0] <= now:
            job = heapq.heappop(self._heap)[2]
            if not job.done.is_set():
                jobs.append(job)
        return jobs

    def wait_s(self, now: float) -> float | None:
        """Seconds until the next deadline; None if there is none."""
        return max(0.0, self._heap[0][0] - now) if self._heap else None
