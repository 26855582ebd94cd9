"""What other threads leave for the step loop: jobs, and messages about them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.candidates import Rows
from belle_compile.runtime.serving.sequence import Sequence


class Job(Protocol):
    """A sequence, and what is done with its logits. All methods are called on the loop's thread."""

    sequence: Sequence
    done: threading.Event

    def start(self) -> None:
        """Take notice that the first step of the sequence is about to run."""
        ...

    def candidates(self) -> int:
        """Return how many of the largest logits of each row of the next step matter; 0 for all."""
        ...

    def accept(self, logits: Rows) -> Future[Any] | None:
        """Take the rows of a step, which are valid during this call and may be overwritten; set `done` after the last.

        Where not all can be taken yet, the others are kept, and what they wait for is returned.
        """
        ...

    def resume(self) -> Future[Any] | None:
        """Take the rows that were kept, as `accept` does: what they waited for may be there."""
        ...

    def fail(self, error: BaseException) -> None:
        """End with an error, and set `done`."""
        ...


class Task(Future[Any]):
    """A function that the loop runs for another thread."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__()
        self._function = function

    def run(self) -> None:
        try:
            self.set_result(self._function())
        except BaseException as error:
            self.set_exception(error)


@dataclass(frozen=True)
class Submitted:
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Withdrawal:
    job: Job
    error: EngineError


@dataclass(frozen=True)
class Watched:
    job: Job


@dataclass(frozen=True)
class Resumed:
    job: Job
    awaited: Future[Any]


Message = Submitted | Withdrawal | Watched | Resumed | Task | None
