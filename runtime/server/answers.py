"""Responses with answers: whole ones, and streams of server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Sequence
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from belle_compile.runtime.engine import Result
from belle_compile.runtime.server.calls import Call
from belle_compile.runtime.server.context import BodyWriter, writer_of
from belle_compile.runtime.server.errors import ApiError, ClientGone, of_failure, of_request
from belle_compile.runtime.server.formats import DONE, Format, event
from belle_compile.runtime.serving.async_streams import AsyncStreams, Event
from belle_compile.runtime.serving.generation import Piece
from belle_compile.runtime.serving.grammar.source import GrammarFailure
from belle_compile.runtime.serving.result_cache.cache import depends_on_request_alone

T = TypeVar("T")

RESULT_CACHE_HEADER = "X-Result-Cache"  # hit, miss or bypass
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx passes pieces on as they come


async def answer(request: HttpRequest, call: Call[Any], form: Format) -> Response:
    """Return the response to a call, of which a stream is computed while it is sent."""
    if call.body.stream:
        return EventStream(call, form)
    waiting = call.served.engine.agenerate(call.requests, cache=call.cache, scheduling=call.scheduling)
    call.context.settle()  # takes effect when the task that `waiting` becomes has begun
    try:
        results = [form.cut(result) for result in await _unless_gone(request.receive, waiting)]
    except ClientGone:
        raise
    except Exception as error:
        raise _failure(call, error) from error
    _note(call, form, results)
    cached = all(result.cached for result in results)
    return Response(form.response(results), 200, _headers(call, cached), "application/json")


class EventStream(Response):
    """A stream of server-sent events with the pieces of answers, which all that waits for the client goes into at once.

    The status is sent with the first piece, so that a request which fails before has the status of its error. A failure
    after it is one event with an error object, which ends the stream without "[DONE]". A client that reads slowly holds up
    its own stream: what it has not read yet is bounded by the lengths of the answers. When it closes the connection, its
    answers are withdrawn before the next step.

    Where the connection offers a `BodyWriter`, most pieces after the first are written by it.
    """

    media_type = "text/event-stream"

    def __init__(self, call: Call[Any], form: Format) -> None:
        self.background = None
        self.status_code = 200
        self._call, self._form = call, form
        self._results: dict[int, Result] = {}
        self._opened: set[int] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        call = self._call
        try:
            streams = call.served.engine.astream_all(call.requests, cache=call.cache, scheduling=call.scheduling)
        except Exception as error:
            raise _failure(call, error) from error
        call.context.settle()
        with streams:
            watcher = asyncio.ensure_future(_gone(receive))
            watcher.add_done_callback(lambda _: streams.close())  # ends the answers, and so the loop of `_send_all`
            try:
                await self._send_all(streams, send, watcher, writer_of(scope))
            finally:
                watcher.cancel()

    async def _send_all(
        self, streams: AsyncStreams, send: Send, watcher: asyncio.Future[None], write: BodyWriter | None
    ) -> None:
        started = ended = False
        while not ended:
            chunks: list[bytes] = []
            events = await streams.ready()
            if watcher.done():
                if started:
                    return
                watcher.result()
                raise ClientGone
            failure = self._write(streams, events, chunks)
            if failure and not started and not chunks:
                raise failure
            if not started:
                self.init_headers(_STREAM_HEADERS | _headers(self._call, streams.cached))
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                started = True
                if write and self._form.plain:
                    streams.take_shortcut(partial(self._write_at_once, write))
            ended = failure is not None or len(self._results) == len(self._call.requests)
            if failure:
                chunks.append(event(failure.body()))
            elif ended:
                self._finish(chunks)
            await send({"type": "http.response.body", "body": b"".join(chunks), "more_body": not ended})

    def _write_at_once(self, write: BodyWriter, index: int, piece: Piece) -> bool:
        """Write a piece past the tasks and the middleware, which cost more than all the rest of it."""
        return index in self._opened and (self._form.silent or write(self._form.piece(index, piece[0])))

    def _write(self, streams: AsyncStreams, events: Sequence[Event], chunks: list[bytes]) -> ApiError | None:
        """Append the chunks of events; returns the error of an answer that failed."""
        form = self._form
        for index, piece in events:
            if piece is None:
                try:
                    result = form.cut(streams.result(index))
                except Exception as error:
                    return _failure(self._call, error)
                self._results[index] = result
                self._open(streams, index, chunks)
                chunks.append(form.ending(index, result))
                continue
            self._open(streams, index, chunks)
            if form.silent:
                continue
            chunks.append(form.piece(index, piece[0]) if form.plain else form.scored_piece(index, streams.delta(index, piece)))
        return None

    def _open(self, streams: AsyncStreams, index: int, chunks: list[bytes]) -> None:
        if index not in self._opened:
            self._opened.add(index)
            chunks.append(self._form.opening(index, streams.prompt_logprobs(index)))

    def _finish(self, chunks: list[bytes]) -> None:
        results = [self._results[index] for index in range(len(self._results))]
        _note(self._call, self._form, results)
        if self._form.with_usage:
            chunks.append(self._form.usage_event(results))
        chunks.append(DONE)


async def _gone(receive: Receive) -> None:
    """Wait until the client closes its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless_gone(receive: Receive, waiting: Awaitable[T]) -> T:
    """Return what is waited for. Where the client goes first, cancel it and raise `ClientGone`."""
    task, watcher = asyncio.ensure_future(waiting), None
    try:
        watcher = asyncio.ensure_future(_gone(receive))
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        watcher.result()
        raise ClientGone
    finally:
        if watcher:
            watcher.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def _failure(call: Call[Any], error: Exception) -> ApiError:
    """Return what the client of a call that failed is told."""
    if isinstance(error, GrammarFailure):
        return of_request(error, call.body.grammar_sources()[0][0], subject=error.what)
    return of_failure(error)


def _note(call: Call[Any], form: Format, results: Sequence[Result]) -> None:
    """Tell the middleware what was used, for limits and logs; texts only where the log may have them."""
    context, usage = call.context, form.usage(results)
    context.tokens += usage["total_tokens"]
    context.details |= {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
    context.details["cached_tokens"] = usage["prompt_tokens_details"]["cached_tokens"]
    context.details["finish_reasons"] = [result.finish_reason for result in results]
    if call.served.options.log_prompts:
        context.texts |= {"prompts": call.prompts, "answers": [result.text for result in results]}


def _headers(call: Call[Any], cached: bool) -> dict[str, str]:
    looked_up = call.served.engine.result_cache is not None and not call.cache.no_cache
    covered = looked_up and all(map(depends_on_request_alone, call.requests))
    state = "bypass" if not covered else "hit" if cached else "miss"
    call.context.details["result_cache"] = state
    return {RESULT_CACHE_HEADER: state}
