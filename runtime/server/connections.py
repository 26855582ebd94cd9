"""Connections of the server: their number, the time that clients may take, and the size of what precedes a body.

Uvicorn has time limits only for the pause between two requests. A client that sends its headers byte by byte, or ends amid a
body, would keep its connection forever. Its protocol is therefore extended where bytes arrive and where they are understood.
"""

from __future__ import annotations

import asyncio
from functools import partial
from http import HTTPStatus
from typing import Any, cast

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from belle_compile.runtime.server.context import context_of, offer_writer
from belle_compile.runtime.server.errors import SERVER, ApiError
from belle_compile.runtime.server.middleware import ACCEPTED
from belle_compile.runtime.server.service import Service

_MOST_HEADER_BYTES = 64 << 10
_MOST_PIPELINED = 16  # requests that arrived before the one under way was answered
LAST_REQUEST_S = 0.2  # in which a request that was sent before the end of the server is read
_OVERHEAD = 8  # bytes on the wire for a byte of a body, at most: chunks of one byte take six
_LEAST_READ_BYTES = 16 << 20  # of a body, however small the limit: what is refused is read, so that the client sees why


class Connection(HttpToolsProtocol):
    """A connection that is closed when its client takes too long or sends too much.

    One timer runs at a time, for what the client is to send next. While a request is answered there is none.
    """

    def __init__(self, service: Service, most: int, **uvicorns: Any) -> None:
        """There may be `most` connections; the others are refused."""
        super().__init__(**uvicorns)
        options = service.options
        self._service, self._most_connections = service, most
        self._header_s, self._idle_s = options.header_timeout_s, options.keep_alive_timeout_s
        self._most_bytes = max(_LEAST_READ_BYTES, _MOST_HEADER_BYTES + _OVERHEAD * options.max_body_bytes)
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._reading_headers = self._reading_body = False
        self._message_bytes = 0  # of the request that is being read
        self._unanswered: list[RequestResponseCycle] = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._count()
        if len(self.connections) > self._most_connections:
            self._service.metrics.refused_connection()
            message, headers = "The server has too many connections.", {"Retry-After": "1"}
            self._refuse(ApiError(503, message, type=SERVER, code="too_many_connections", headers=headers))
        else:
            self._expect(self._idle_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        self.resume_writing()
        self._abandon()
        super().connection_lost(exc)
        self._count()

    def data_received(self, data: bytes) -> None:
        self._message_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._reading_headers and self._message_bytes > _MOST_HEADER_BYTES:
            self._refuse(ApiError(431, f"The headers are too large: expected at most {_MOST_HEADER_BYTES} bytes."))
        elif self._message_bytes > self._most_bytes:
            self._close()
        elif self._reading_body and not self.cycle.response_complete:  # else it is read to its end, but in a limited time
            self._expect(self._header_s)

    def on_message_begin(self) -> None:
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
        self._unanswered = [cycle for cycle in self._unanswered if not cycle.response_complete] + [self.cycle]
        offer_writer(cast(Scope, self.scope), partial(_write_part, self.cycle))
        if self._service.draining:
            self.close_after_response()
        if len(self.pipeline) > _MOST_PIPELINED:
            self._close()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._reading_body = False
        if not self.pipeline and not self.cycle.response_complete and self.scope["method"] == "POST":
            context_of(cast(Scope, self.scope)).announce(self._service.engine.arrivals)
        self._expect(self._idle_s if self.cycle.response_complete else None)

    def on_response_complete(self) -> None:
        super().on_response_complete()
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

    def _unsupported_upgrade_warning(self) -> None:
        """Ignore the wish for another protocol, as HTTP allows. Uvicorn's warning advises to install one."""

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self._refuse(ApiError(400, msg, code="invalid_http"))

    def _refuse(self, error: ApiError) -> None:
        """Send an error in place of a response and close the connection; only close it amid another response."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
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

    def _abandon(self) -> None:
        """Let all requests under way know that nobody waits for their responses. Uvicorn tells the last one of a pipeline only;
        the others would be computed to their ends, and fail where they write."""
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()

    def _expect(self, seconds: float | None) -> None:
        """Close the connection unless this is called again within so many seconds; None is no limit."""
        if self._timer:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._expired, seconds)

    def _expired(self, seconds: float) -> None:
        if self.flow.read_paused:  # it is the server that does not read
            self._expect(seconds)
        else:
            self._close()

    def _count(self) -> None:
        self._service.metrics.connections = len(self.connections)


def _write_part(cycle: RequestResponseCycle, data: bytes) -> bool:
    """Write a part of a body that is sent in chunks, as uvicorn's `send` does; the `BodyWriter` of a request."""
    if cycle.flow.write_paused or cycle.disconnected or not cycle.chunked_encoding or cycle.transport.is_closing():
        return False
    cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
    return True
