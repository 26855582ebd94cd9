"""Scoring a token sequence: its logits, computed by the scheduler in the same steps as other requests."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.serving.candidates import Rows
from belle_compile.runtime.serving.sequence import Sequence


class Scoring:
    """The logits after each of `token_ids[start:]`; a job of the step loop, which calls `accept` with the rows of each step."""

    def __init__(self, token_ids: list[int], start: int, vocab_size: int, adapter: str = "") -> None:
        self.sequence = Sequence(token_ids, 0, logits_from=start, adapter=adapter)
        self.done = threading.Event()
        self._logits = np.empty((len(token_ids) - start, vocab_size), np.float32)
        self._rows = 0  # of `_logits` that are filled
        self._error: BaseException | None = None

    def start(self) -> None:
        """Do nothing: a scoring is not timed."""

    def candidates(self) -> int:
        """Return 0: whole rows are needed."""
        return 0

    def accept(self, logits: Rows) -> Future[Any] | None:
        """Copy the next rows; returns None."""
        self._logits[self._rows : self._rows + len(logits)] = logits
        self._rows += len(logits)
        self.sequence.logits_from += len(logits)  # should the sequence be computed anew, these rows are not needed again
        if self._rows == len(self._logits):
            self.done.set()
        return None

    def resume(self) -> Future[Any] | None:
        """Return None: no row waits."""
        return None

    def fail(self, error: BaseException) -> None:
        """End the scoring; `result` raises `error`."""
        self._error = error
        self.done.set()

    def result(self) -> NDArray[np.float32]:
        """Float32 logits [tokens - start, vocabulary], or the error that the scoring ended with."""
        if self._error is not None:
            raise self._error
        return self._logits
