"""Answers on asyncio's event loops: no thread waits for a request, and the step thread wakes a loop once a step at most."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.generation import Delta, Generation, Piece, Result
from belle_compile.runtime.serving.request import Request
from belle_compile.runtime.serving.result_cache.options import CachePolicy
from belle_compile.runtime.serving.scheduling import Scheduling
from belle_compile.runtime.serving.streams import Answerer, PieceReader


class Channel:
    """Calls on their way to one event loop, in their order."""

    def __init__(self, event_loop: asyncio.AbstractEventLoop) -> None:
        self.event_loop = event_loop
        self._calls: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._scheduled = False  # whether the event loop is going to run those that wait

    def put(self, function: Callable[[Any], None], argument: Any) -> None:
        """Let the event loop call `function(argument)`, after the next flush at the latest. Any thread may do so."""
        self._calls.append((function, argument))

    def flush(self) -> None:
        """Wake the event loop for the calls that wait; raises RuntimeError where it is closed.

        Where the memory for that is short, it tries again once: without it nobody would run the calls.
        """
        if self._calls and not self._scheduled:
            self._scheduled = True
            try:
                self.event_loop.call_soon_threadsafe(self._run)
            except MemoryError:
                self.event_loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        """Run the calls that wait, on the event loop. What is put meanwhile is flushed by whoever puts it."""
        self._scheduled = False  # before the calls are counted, so that none is put that nobody runs
        for _ in range(len(self._calls)):
            function, argument = self._calls.popleft()
            function(argument)


class Handover:
    """The channels to all event loops on which answers are read.

    `asyncio` takes a lock and writes to a pipe for each `call_soon_threadsafe`: one is made for all calls that an event loop
    gets from a step. Any thread may put calls, and flushes them afterwards. The step loop does so after each step.
    """

    def __init__(self) -> None:
        self._channels: tuple[Channel, ...] = ()
        self._lock = threading.Lock()  # of replacing the tuple

    def channel(self, event_loop: asyncio.AbstractEventLoop) -> Channel:
        """Return the channel to an event loop."""
        for channel in self._channels:
            if channel.event_loop is event_loop:
                return channel
        with self._lock:  # only the event loop itself asks for its channel, so nobody else has made it by now
            channel = Channel(event_loop)
            self._channels = (*(other for other in self._channels if not other.event_loop.is_closed()), channel)
        return channel

    def flush(self) -> None:
        """Give each event loop its calls. Those of an event loop that is closed are dropped: nobody waits there."""
        for channel in self._channels:
            with contextlib.suppress(RuntimeError):
                channel.flush()


class _Inbox:
    """The pieces of an answer that were not read yet, for one reader on an event loop. None follows the last.

    It has no bound but the length of the answer: a slow reader holds up neither the step thread nor other requests.
    """

    def __init__(self) -> None:
        self._items: deque[Piece | None] = deque()
        self._reader: asyncio.Future[None] | None = None

    def put(self, item: Piece | None) -> None:
        self._items.append(item)
        if self._reader and not self._reader.done():
            self._reader.set_result(None)

    async def get(self) -> Piece | None:
        while not self._items:
            if self._reader:
                raise EngineError("request", "the stream is read by another task", expected="one reader")
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._items.popleft()


class AsyncStream(PieceReader, AsyncIterator[str]):
    """An asynchronous iterator over the pieces of an answer's text as they are generated; made by `Engine.astream`.

    It belongs to the event loop that runs when it is made. The request is dropped when the task that waits for a piece is
    cancelled, and when the stream is closed or forgotten before its end.

        async with engine.astream("你好") as stream:
            async for piece in stream:
                print(piece, end="")
        print(stream.result.finish_reason)
    """

    def __init__(
        self,
        engine: Answerer,
        handover: Handover,
        request: Request,
        cache: CachePolicy | None = None,
        scheduling: Scheduling | None = None,
    ) -> None:
        """Submit the request."""
        event_loop = asyncio.get_running_loop()
        self._inbox = _Inbox()
        put = partial(handover.channel(event_loop).put, self._inbox.put)
        super().__init__(engine, Generation(request, engine.tokenizer, put, partial(put, None)))
        engine.submit([self._generation], cache, scheduling, wait=False)

    async def __anext__(self) -> str:
        while (piece := await self._next_piece()) is not None:
            if text := self._text(piece):
                return text
        raise StopAsyncIteration

    async def deltas(self) -> AsyncIterator[Delta]:
        """Yield the pieces with their token ids and log probabilities, in place of iterating over the text."""
        while (piece := await self._next_piece()) is not None:
            yield self._delta(piece)

    async def _next_piece(self) -> Piece | None:
        try:
            return self._checked(None if self._ended else await self._inbox.get())
        except asyncio.CancelledError:
            self.close()
            raise

    async def aclose(self) -> None:
        """Do what `close` does, for `contextlib.aclosing`."""
        self.close()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def generate_async(
    engine: Answerer,
    handover: Handover,
    requests: Sequence[Request],
    cache: CachePolicy | None = None,
    scheduling: Scheduling | None = None,
) -> list[Result]:
    """Answer requests together; returns results in their order, or raises the error of the first that failed.

    Requests under way are dropped when the task is cancelled.
    """
    event_loop = asyncio.get_running_loop()
    ended: asyncio.Queue[None] = asyncio.Queue()
    on_end = partial(handover.channel(event_loop).put, ended.put_nowait, None)
    generations = [Generation(request, engine.tokenizer, on_end=on_end) for request in requests]
    try:
        engine.submit(generations, cache, scheduling, wait=False)
        for _ in generations:
            await ended.get()
    finally:
        for generation in generations:
            if not generation.done.is_set():
                engine.withdraw(generation)
    return [generation.result() for generation in generations]
