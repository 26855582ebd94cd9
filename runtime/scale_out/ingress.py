"""Takes requests over HTTP, passes each on to the replica that its prompt chooses, and tells its client when that is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from starlette.requests import Request as HttpRequest
from starlette.types import Message, Receive, Scope, Send

from belle_compile.runtime.scale_out.affinity import affinity_key
from belle_compile.runtime.scale_out.process import Forwarded, Head, Lost
from belle_compile.runtime.server.errors import SERVER, ApiError
from belle_compile.runtime.server.formats import event

_OF_ONE_SERVER = ("/admin", "/metrics", "/stats", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_ATTEMPTS = 8
_PAUSE_S = 0.25  # from the third attempt on, in which lost replicas are taken off the ring
_OF_THE_PROXY = ("date", "x-request-id")  # which adds them to every response; the id is the one that the server was sent
_EVENTS = "text/event-stream"

# Sends a request to the replica that the key chooses; an empty key is any replica's. Ends with `Lost` where it does.
Route = Callable[[Forwarded, str], AsyncIterator[Head | bytes | Lost]]


class Ingress:
    """An ASGI application in front of replicas."""

    def __init__(self, route: Route, affinity_chars: int, max_body_bytes: int) -> None:
        self._route, self._affinity_chars, self._max_body_bytes = route, affinity_chars, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        try:
            request = await self._read(HttpRequest(scope, receive))
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self._answer(request, scope, receive, send)

    async def _read(self, http: HttpRequest) -> Forwarded:
        """The request to pass on; raises `ApiError` for one that is not."""
        path = http.scope["path"].removeprefix(http.scope.get("root_path", "")) or "/"
        if any(f"{path}/".startswith(f"{other}/") for other in _OF_ONE_SERVER):
            message = f"{path} is of one server, and this is an entrance to several. See docs/deploy.md."
            raise ApiError(404, message, code="not_scaled_out")
        body = bytearray()
        async for piece in http.stream():
            body += piece
            if len(body) > self._max_body_bytes:
                message = f"The body has more than {self._max_body_bytes} bytes."
                raise ApiError(413, message, code="body_too_large", headers={"Connection": "close"})
        query = f"?{http.url.query}" if http.url.query else ""
        headers = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in http.scope["headers"])
        raw: bytes = http.scope.get("raw_path") or path.encode()
        path = raw.decode("latin-1").partition("?")[0].removeprefix(http.scope.get("root_path", "")) or "/"
        return Forwarded(http.method, path + query, headers, bytes(body))

    async def _answer(self, request: Forwarded, scope: Scope, receive: Receive, send: Send) -> None:
        key = affinity_key(request.body, self._affinity_chars)
        lost = Lost("There is no replica.", sent=False)
        for attempt in range(_ATTEMPTS):
            # Another key is for another replica, most likely; that of the first attempt is the one with the prompt's beginning.
            messages = self._route(request, f"{key}.{attempt}" if attempt else key)
            first = await anext(messages, Lost("The replica has sent nothing.", sent=True))
            if isinstance(first, Head):
                await _pass_on(first, messages, send)
                return
            assert isinstance(first, Lost), "a response begins with its head"
            lost = first
            if lost.sent:
                # Not sent again: it may be what ended the replica, and would end the others.
                break
            await asyncio.sleep(_PAUSE_S if attempt >= 2 else 0)
        await _lost(lost.reason).response()(scope, receive, send)


async def _pass_on(head: Head, messages: AsyncIterator[Head | bytes | Lost], send: Send) -> None:
    names = [(name.lower(), value) for name, value in head.headers]
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in names if name not in _OF_THE_PROXY]
    await send({"type": "http.response.start", "status": head.status, "headers": headers})
    async for message in messages:
        if isinstance(message, bytes):
            await send(_piece(message, more=True))
            continue
        assert isinstance(message, Lost), "a response has one head"
        if not dict(headers).get(b"content-type", b"").startswith(_EVENTS.encode()):
            raise ConnectionError(message.reason)  # the client sees that the body is not whole
        await send(_piece(event(_lost(message.reason).body()), more=True))
        break
    await send(_piece(b"", more=False))


def _piece(body: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


def _lost(reason: str) -> ApiError:
    message = f"{reason} Other requests go on; this one can be sent again."
    return ApiError(503, message, type=SERVER, code="replica_lost", headers={"Retry-After": "1"})


async def _live(receive: Receive, send: Send) -> None:
    """Answer the messages of an application's start and end."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
