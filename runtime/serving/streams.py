"""Answers that are read in pieces while they are generated."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Protocol

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.generation import Delta, Generation, Piece, Result
from belle_compile.runtime.serving.request import Request
from belle_compile.runtime.serving.result_cache.options import CachePolicy
from belle_compile.runtime.serving.scheduling import Scheduling
from belle_compile.runtime.tokenizer import Tokenizer


class Answerer(Protocol):
    """What answers requests: an `Engine`."""

    tokenizer: Tokenizer

    def submit(
        self, generations: Sequence[Generation], cache: CachePolicy | None, scheduling: Scheduling | None, *, wait: bool
    ) -> None:
        """Begin to answer; without `wait`, without waiting for a file or a server."""
        ...

    def check_process(self) -> None:
        """Raise `EngineError` in a process in which nothing will be answered."""
        ...

    def withdraw(self, job: Generation) -> None:
        """Drop a request that is under way."""
        ...


class PieceReader:
    """What streams of both kinds have in common: the answer, how much of it was read, and that forgetting it drops it."""

    def __init__(self, engine: Answerer, generation: Generation) -> None:
        self._engine = engine  # kept alive while the stream is read
        self._generation = generation
        self._ended = False
        self._read = len(generation.request.prompt)  # tokens of the prompt and of the pieces that were read

    @property
    def result(self) -> Result:
        """The finished answer; raises `EngineError` while there are pieces that were not read."""
        if not self._ended:
            raise EngineError("request", "the answer is not finished", remedy="read the stream to its end first")
        return self._generation.result()

    def close(self) -> None:
        """Drop the request if it is under way."""
        if not self._generation.done.is_set():
            self._engine.withdraw(self._generation)

    def _checked(self, piece: Piece | None) -> Piece | None:
        """Return the next piece; None at the end of the answer. Raises the error that the request ended with, if any."""
        if piece is None:
            self._ended = True
            self._generation.result()
        return piece

    def _text(self, piece: Piece) -> str:
        text, self._read = piece
        return text

    def _delta(self, piece: Piece) -> Delta:
        start, self._read = self._read, piece[1]
        return self._generation.delta(piece, start)

    def __del__(self) -> None:
        if hasattr(self, "_generation"):
            self.close()


class Stream(PieceReader, Iterator[str]):
    """An iterator over the pieces of an answer's text as they are generated. Closing it before the end drops the request."""

    def __init__(
        self, engine: Answerer, request: Request, cache: CachePolicy | None = None, scheduling: Scheduling | None = None
    ) -> None:
        """Submit the request."""
        self._pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        put = self._pieces.put
        super().__init__(engine, Generation(request, engine.tokenizer, put, partial(put, None)))
        engine.submit([self._generation], cache, scheduling, wait=True)

    def __next__(self) -> str:
        while (piece := self._next_piece()) is not None:
            if text := self._text(piece):
                return text
        raise StopIteration

    def deltas(self) -> Iterator[Delta]:
        """Yield the pieces with their token ids and log probabilities, in place of iterating over the text."""
        while (piece := self._next_piece()) is not None:
            yield self._delta(piece)

    def _next_piece(self) -> Piece | None:
        self._engine.check_process()
        return self._checked(None if self._ended else self._pieces.get())

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
