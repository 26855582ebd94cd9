"""Answers to several requests as they are generated, for one reader on an event loop: what a streaming response is made of."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.asynchronous import Handover
from belle_compile.runtime.serving.generation import Delta, Generation, Piece, Result
from belle_compile.runtime.serving.logprobs import TokenLogprob
from belle_compile.runtime.serving.request import Request
from belle_compile.runtime.serving.result_cache.options import CachePolicy
from belle_compile.runtime.serving.scheduling import Scheduling
from belle_compile.runtime.serving.streams import Answerer

Shortcut = Callable[[int, Piece], bool]  # takes the piece of an answer, whose number it gets; returns whether it did
Event = tuple[int, Piece | None]  # the number of an answer, and its next piece; None after the last


class AsyncStreams:
    """Answers under way, whose pieces are read together; made by `Engine.astream_all`.

    The reader gets all that waits for it at once, in the order in which it came. What it has not read is bounded by the
    lengths of the answers, and holds up nobody. Answers that have not ended when the `with` block does are dropped.
    """

    def __init__(
        self,
        engine: Answerer,
        handover: Handover,
        requests: Sequence[Request],
        cache: CachePolicy | None = None,
        scheduling: Scheduling | None = None,
    ) -> None:
        """Submit the requests, all before the next step."""
        channel = handover.channel(asyncio.get_running_loop())
        self._engine = engine  # kept alive while the answers are read
        self._events: list[Event] = []
        self._reader: asyncio.Future[None] | None = None
        self._shortcut: Shortcut | None = None
        self._read = [len(request.prompt) for request in requests]  # tokens of prompt and of the pieces that were read
        self._generations: list[Generation] = []
        for index, request in enumerate(requests):
            put = partial(channel.put, partial(self._put, index))
            self._generations.append(Generation(request, engine.tokenizer, put, partial(put, None)))
        try:
            engine.submit(self._generations, cache, scheduling, wait=False)
        except BaseException:
            self.close()
            raise

    def _put(self, index: int, piece: Piece | None) -> None:
        reader = self._reader
        if reader is None or reader.done():
            self._events.append((index, piece))
        elif piece is None or self._shortcut is None or not self._shortcut(index, piece):
            self._events.append((index, piece))
            reader.set_result(None)

    def take_shortcut(self, shortcut: Shortcut) -> None:
        """Let pieces be taken by a function, without a change of tasks, while the reader waits for the next one in `ready`.

        The pieces that it declines go to the reader, as do all that come before the reader waits again, and the ends. It runs
        on the event loop, between the functions of other answers, and must not raise.
        """
        self._shortcut = shortcut

    async def ready(self) -> list[Event]:
        """Wait for at least one piece or end, and return all that came since the last call."""
        if not self._events:
            if self._reader:
                raise EngineError("request", "the stream is read by another task", expected="one reader")
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        events, self._events = self._events, []
        return events

    def delta(self, index: int, piece: Piece) -> Delta:
        """Return a piece with its tokens and their log probabilities. To be called for every piece of an answer, in order."""
        start, self._read[index] = self._read[index], piece[1]
        return self._generations[index].delta(piece, start)

    def prompt_logprobs(self, index: int) -> tuple[TokenLogprob | None, ...] | None:
        """Log probabilities of the prompt's tokens, once the answer has a piece; None unless they were asked for."""
        return self._generations[index].prompt_logprobs

    @property
    def cached(self) -> bool:
        """Whether all answers come from the result cache, as far as is known: for certain once each has a piece."""
        return all(generation.cached for generation in self._generations)

    def result(self, index: int) -> Result:
        """Return an answer that has ended, or raise the error that it ended with."""
        return self._generations[index].result()

    def close(self) -> None:
        """Drop the answers that are under way."""
        for generation in self._generations:
            if not generation.done.is_set():
                self._engine.withdraw(generation)

    def __enter__(self) -> AsyncStreams:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
