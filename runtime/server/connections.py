"""Connections of the server: their number, the time that clients may take, and the size of what precedes a body.

Uvicorn has time limits only for the pause between two requests. A client that sends its headers byte by byte, or ends amid a
body, would keep its connection forever. Its protocol is therefore extended where bytes arrive and where they are understood.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any, cast

import httptools
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from belle_compile.runtime.server.context import context_of, offer_writer
from belle_compile.runtime.server.errors import SERVER, ApiError
from belle_compile.runtime.server.middleware import ACCEPTED
from belle_compile.runtime.server.service import Service

_MOST_HEADER_BYTES = 64 << 10
_PIECE_BYTES = 4 << 10  # that are parsed at once: at most 227 requests
_MOST_PIPELINED = 16  # requests that wait for those before them; while there are as many, no further piece is parsed
_WATCH_S = 0.1  # between two looks whether the client of a connection that is not read has gone
LAST_REQUEST_S = 0.2  # in which a request that was sent before the end of the server is read
_OVERHEAD = 8  # bytes on the wire for a byte of a body, at most: chunks of one byte take six
_LEAST_READ_BYTES = 16 << 20  # of a body, however small the limit: what is refused is read, so that the client sees why
_WITHOUT_CHUNKS = frozenset({"0.9", "1.0"})  # versions of HTTP


class Connection(HttpToolsProtocol):
    """A connection that is closed when its client takes too long or sends too much.

    One timer runs at a time, for what the client is to send or, once the connection is closing, to read next. While a request
    is answered there is none.

    Requests may be sent before those ahead of them are answered, and are answered in order. What such a pipeline holds in
    memory is bounded: the requests of a piece beyond `_MOST_PIPELINED`, and the bytes of one read. The rest is not read.
    """

    def __init__(self, service: Service, most: int, **uvicorns: Any) -> None:
        """There may be `most` connections; the others are refused."""
        super().__init__(**uvicorns)
        options = service.options
        self._service, self._most_connections = service, most
        self._header_s, self._idle_s = options.header_timeout_s, options.keep_alive_timeout_s
        self.timeout_keep_alive = cast(int, self._idle_s)  # uvicorn's own timer after a response, 5 s by default
        self._most_bytes = max(_LEAST_READ_BYTES, _MOST_HEADER_BYTES + _OVERHEAD * options.max_body_bytes)
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._watch_timer: asyncio.TimerHandle | None = None
        self._reading_headers = self._reading_body = False
        self._message_bytes = 0  # of the request that is being read
        self._unread = b""  # what has arrived and is not parsed
        self._answering: RequestResponseCycle | None = None  # the request that was started last

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = self._flow = _Flow(transport, self._watch)
        self._count()
        try:
            if len(self.connections) > self._most_connections:
                self._service.metrics.refused_connection()
                message, headers = "The server has too many connections.", {"Retry-After": "1"}
                self._refuse(ApiError(503, message, type=SERVER, code="too_many_connections", headers=headers))
            else:
                self._expect(self._idle_s)
        except BaseException:  # the event loop would keep the connection, which no timer would ever close
            transport.abort()
            raise

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        if self._watch_timer:
            self._watch_timer.cancel()
        self.resume_writing()
        self._abandon()
        super().connection_lost(exc)
        self._count()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._unread += data
        self._read()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep a connection whose client sends nothing more, where all that it waits for costs next to nothing.

        A client that has ended its side of the connection only, such as `nc -N`, looks like one that has gone. A POST would
        be computed for nobody, so that the connection is closed; so it is under TLS, which ends with both sides.
        """
        reading = self._unread or self._reading_headers or self._reading_body
        if self.scheme == "https" or reading or not self._unanswered() or self._computes():
            return False
        self.close_after_response()
        return True

    def on_message_begin(self) -> None:
        if self._behind_the_last():
            raise _NothingMore
        super().on_message_begin()
        self._reading_headers, self._message_bytes = True, 0
        self._expect(self._header_s)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._reading_headers:  # those behind a body in chunks are dropped
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._reading_headers, self._reading_body = False, True
        self.scope["state"][ACCEPTED] = not self._service.draining
        super().on_headers_complete()
        offer_writer(cast(Scope, self.scope), partial(_write_part, self.cycle))
        if self._service.draining:
            self.close_after_response()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._reading_body = False
        if not self.pipeline and not self.cycle.response_complete and self.scope["method"] == "POST":
            context_of(cast(Scope, self.scope)).announce(self._service.engine.arrivals)
        self._expect(self._idle_s if self.cycle.response_complete else None)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._expect(self._idle_s)
            return
        self._read()
        self.flow.resume_reading()
        if not (self.pipeline or self._reading_headers or self._reading_body) and self.cycle.response_complete:
            self._expect(self._idle_s)

    def shutdown(self) -> None:
        """Close the connection after the response under way. One without a request may have sent one that is not read yet: it
        is answered, with status 503."""
        self.close_after_response()
        if self.cycle is None or self.cycle.response_complete:
            self._expect(LAST_REQUEST_S)

    def close_after_response(self) -> None:
        """Let the response under way, if there is one, be the last one."""
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._idle_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer:
            self._write_timer.cancel()
            self._write_timer = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, cast(Any, partial(self._answer, cycle, app)))

    async def _answer(self, cycle: RequestResponseCycle, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application for a request."""
        if scope["http_version"] in _WITHOUT_CHUNKS:
            send = _without_chunks(cycle, send)
        try:
            await app(scope, receive, send)
        finally:
            context_of(scope).settle()
            if not (cycle.response_started or cycle.disconnected):
                self._refuse(ApiError(500, "The server failed to handle the request.", type=SERVER, code="internal_error"))
            elif not (cycle.response_complete or cycle.disconnected):  # then uvicorn closes the connection
                self._expect(self._idle_s)

    def _read(self) -> None:
        """Parse what has arrived, a piece at a time, until enough requests wait. Nothing more is read before the rest."""
        data, start = self._unread, 0
        while start < len(data) and len(self.pipeline) < _MOST_PIPELINED and not self.transport.is_closing():
            start += self._parse(data[start : start + _PIECE_BYTES])
        self._unread = b"" if self.transport.is_closing() else data[start:]
        self._flow.hold(bool(self._unread))

    def _parse(self, piece: bytes) -> int:
        """Parse bytes, at least one; returns how many were parsed."""
        self._message_bytes += len(piece)
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as wish:  # for another protocol, which HTTP allows to ignore
            return int(wish.args[0])
        except httptools.HttpParserError:
            if not self._behind_the_last():
                self.logger.warning("Invalid HTTP request received.")
                self._refuse(ApiError(400, "Invalid HTTP request received.", code="invalid_http"))
            return len(piece)
        if self._reading_headers and self._message_bytes > _MOST_HEADER_BYTES:
            self._refuse(ApiError(431, f"The headers are too large: expected at most {_MOST_HEADER_BYTES} bytes."))
        elif self._message_bytes > self._most_bytes:
            self._close()
        elif self._reading_body and not self.cycle.response_complete:  # else it is read to its end, but in a limited time
            self._expect(self._header_s)
        return len(piece)

    def _behind_the_last(self) -> bool:
        """Whether what arrives is behind the request whose response is to be the last one; it is dropped."""
        cycle = self.cycle
        return cycle is not None and not (cycle.keep_alive or cycle.response_complete or self._reading_body)

    def _unanswered(self) -> list[RequestResponseCycle]:
        """The requests whose responses are not complete, in order."""
        waiting = [cycle for cycle, _ in reversed(self.pipeline)]
        return waiting if self._answering is None or self._answering.response_complete else [self._answering, *waiting]

    def _computes(self) -> bool:
        """Whether one of the requests may occupy the engine; the others cost next to nothing."""
        return any(cycle.scope["method"] == "POST" for cycle in self._unanswered())

    def _watch(self) -> None:
        """Look again and again whether the client has gone, while nothing is read, which would show it."""
        if self._watch_timer is None:
            self._watch_timer = self.loop.call_later(_WATCH_S, self._look)

    def _look(self) -> None:
        self._watch_timer = None
        if self.transport.is_closing() or not self.flow.read_paused:
            return
        gone = select.poll()
        gone.register(self.transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
        if gone.poll(0) and self._computes():
            self._close()
        else:
            self._watch()

    def _refuse(self, error: ApiError) -> None:
        """Send an error in place of a response and close the connection; only close it amid another response."""
        answering = self._answering
        if answering is None or answering.response_complete or not answering.response_started:
            body = error.body()
            headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
            lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
            lines += [f"{name}: {value}" for name, value in (headers | error.headers).items()]
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self._close()

    def _close(self) -> None:
        """Close the connection, whatever is under way."""
        self._abandon()
        self.transport.close()
        self._expect(self._idle_s)

    def _abandon(self) -> None:
        """Let the request under way know that nobody waits for its response. Uvicorn tells the last one of a pipeline only;
        the first one would be computed to its end, and fail where it writes."""
        if self._answering:
            self._answering.disconnected = True
            self._answering.message_event.set()

    def _expect(self, seconds: float | None) -> None:
        """Close the connection unless this is called again within so many seconds; None is no limit."""
        if self._timer:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._expired, seconds)

    def _expired(self, seconds: float) -> None:
        if self.transport.is_closing():  # the client does not read the last response
            self.transport.abort()
        elif self.flow.read_paused:  # it is the server that does not read
            self._expect(seconds)
        else:
            self._close()

    def _count(self) -> None:
        self._service.metrics.connections = len(self.connections)


class _NothingMore(Exception):
    """Ends the parser where the request has arrived whose response is to be the last one."""


class _Flow(FlowControl):
    """The control over when a connection is read and written. It reads nothing while it is held."""

    def __init__(self, transport: asyncio.Transport, on_pause: Callable[[], None]) -> None:
        """`on_pause` is called whenever reading pauses."""
        super().__init__(transport)
        self._held, self._on_pause = False, on_pause

    def hold(self, held: bool) -> None:
        """Pause reading until this is called with False and reading is resumed."""
        self._held = held
        if held:
            self.pause_reading()

    def pause_reading(self) -> None:
        super().pause_reading()
        self._on_pause()

    def resume_reading(self) -> None:
        if not self._held:
            super().resume_reading()


def _without_chunks(cycle: RequestResponseCycle, send: Send) -> Send:
    """Return a `send` that lets a body of unknown length end with the connection, since HTTP has chunks from 1.1 on."""
    unlimited = False

    async def send_plain(message: Message) -> None:
        nonlocal unlimited
        if message["type"] == "http.response.start":
            unlimited = not any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if unlimited:
                cycle.chunked_encoding = cycle.keep_alive = False
        elif unlimited:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    return send_plain


def _write_part(cycle: RequestResponseCycle, data: bytes) -> bool:
    """Write a part of a body that is sent in chunks, as uvicorn's `send` does; the `BodyWriter` of a request."""
    if cycle.flow.write_paused or cycle.disconnected or not cycle.chunked_encoding or cycle.transport.is_closing():
        return False
    cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
    return True
