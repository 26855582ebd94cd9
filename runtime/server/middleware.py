"""What happens to each request before and after its route: id, log, counts and span; keys, limits, draining."""

from __future__ import annotations

import logging
import math
import re
from contextlib import nullcontext
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from belle_compile.runtime.server.access import ANONYMOUS, ApiKey, RateLimited
from belle_compile.runtime.server.context import context_of
from belle_compile.runtime.server.errors import SERVER, ApiError
from belle_compile.runtime.server.logs import Exchange, current, log
from belle_compile.runtime.server.served_engine import hold, release
from belle_compile.runtime.server.service import Service
from belle_compile.runtime.server.tracing import find_tracer, span

_LOG = logging.getLogger("belle_compile.server")
REQUEST_ID = "x-request-id"
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# What needs no key: probes, and the page, which asks its user for one and sends it.
_OPEN_PATHS = re.compile(r"/|/health|/ready|/page/.*")
_METRICS = "/metrics"
ADMIN = "/admin/"  # what the paths begin with that need the key of --admin-key
# Routes that are asked again and again, /stats by the page: only failures are worth a line.
_PROBES = frozenset({"/health", "/ready", "/stats", _METRICS})


def install(app: FastAPI, service: Service) -> None:
    """Add the middleware to an application; what is added last comes first."""
    app.add_middleware(Guard, service=service)
    if service.options.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.options.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID, "retry-after", "x-result-cache"],
        )
    app.add_middleware(Observer, service=service, tracer=find_tracer())


class Observer:
    """Gives each request an id and the engine of this moment, and logs, counts and traces it at its end."""

    def __init__(self, app: ASGIApp, service: Service, tracer: Any | None = None) -> None:
        self._app, self._service, self._tracer = app, service, tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange, headers = _begin(scope), Headers(scope=scope)
        token = current.set(exchange)

        async def observed_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status, exchange.first_byte_s = int(message["status"]), exchange.seconds
                MutableHeaders(scope=message)[REQUEST_ID] = exchange.context.request_id
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                exchange.complete = True

        try:
            hold(scope, self._service.current)
            with span(self._tracer, exchange, headers) if self._tracer else nullcontext():
                try:
                    await self._run(exchange, scope, receive, observed_send)
                finally:
                    exchange.route = _route(scope)
        finally:
            release(scope)
            self._end(exchange)
            current.reset(token)

    async def _run(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application. What it does not handle becomes status 500. Amid a response, uvicorn then closes the connection,
        since the response is not complete."""
        try:
            await self._app(scope, receive, send)
        except Exception as error:
            exchange.context.details["error"] = type(error).__name__
            _LOG.exception("a request failed")
            if exchange.first_byte_s is None:
                failure = ApiError(500, "The server failed to handle the request.", type=SERVER, code="internal_error")
                await failure.response()(scope, receive, send)

    def _end(self, exchange: Exchange) -> None:
        options = self._service.options
        self._service.metrics.responded(exchange.method, exchange.route, exchange.status, exchange.seconds)
        if options.access_log:
            probe, failed = exchange.route in _PROBES, exchange.status >= 500
            level = logging.DEBUG if probe and exchange.status < 400 else logging.INFO
            if failed:
                level = logging.WARNING if probe else logging.ERROR  # that a server is not ready yet is no error of its own
            if _LOG.isEnabledFor(level):
                log(_LOG, level, "request", **exchange.fields(prompts=options.log_prompts))


class Guard:
    """Lets in requests with a key, within its limits, while the server is not draining, and bodies of a bounded size."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        bounded = _BoundedBody(receive, self._service.options.max_body_bytes)
        entered: ApiKey | None = None
        try:
            key = self._identify(scope)
            if scope["method"] == "POST":  # the others cost next to nothing
                if not scope["state"].get(ACCEPTED):
                    self._service.admit()
                entered = self._enter(key)
            bounded.check(Headers(scope=scope))
            await self._app(scope, bounded, bounded.watch(send))
        except ApiError as error:
            if bounded.responding:
                raise
            await error.response()(scope, receive, send)
        finally:
            if entered is not None:
                self._service.access.leave(entered, context_of(scope).tokens)

    def _identify(self, scope: Scope) -> ApiKey:
        """Return the key of a request, raise `ApiError` where it has none and needs one, and note it in its context."""
        access, path = self._service.access, scope["path"].removeprefix(scope.get("root_path", ""))
        if path.startswith(ADMIN):
            return self._identify_admin(scope)
        if access.open:
            return ANONYMOUS
        header = Headers(scope=scope).get("authorization")
        key = access.identify(header)
        if key is None:
            if _OPEN_PATHS.fullmatch(path) or (path == _METRICS and not self._service.options.metrics_auth):
                return ANONYMOUS
            raise _unauthorized(header)
        context = context_of(scope)
        context.client, context.priority = key.name, key.priority
        if exchange := current.get():
            exchange.key = key
        return key

    def _identify_admin(self, scope: Scope) -> ApiKey:
        """Return the key of a request to a path of `ADMIN`, which no other key opens."""
        access = self._service.access
        if access.admin is None:
            message = "This server takes no requests of administrators: it was started without --admin-key."
            raise ApiError(403, message, code="not_allowed")
        header = Headers(scope=scope).get("authorization")
        if not access.is_admin(header):
            raise _unauthorized(header)
        context_of(scope).client = access.admin.name
        return access.admin

    def _enter(self, key: ApiKey) -> ApiKey:
        try:
            self._service.access.enter(key)
        except RateLimited as error:
            headers = {"Retry-After": str(math.ceil(error.retry_after_s))}
            raise ApiError(429, str(error), type="requests", code="rate_limit_exceeded", headers=headers) from None
        return key


def _unauthorized(header: str | None) -> ApiError:
    """The error of a request without a key that fits; `header` is its Authorization."""
    message = "Incorrect API key provided." if header else "You didn't provide an API key."
    message += " Send it in the header Authorization: Bearer KEY."
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": 'Bearer realm="belle"'})


# The entry of ASGI's `state` that the server sets for requests that arrived before it began to drain.
ACCEPTED = "belle.accepted"


class _BoundedBody:
    """A request's body, of which at most `most` bytes are read. It is the application's `receive`."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self._most, self._read = receive, most, 0
        self.responding = False  # whether the response has begun

    def check(self, headers: Headers) -> None:
        """Raise `ApiError` for a body whose length, which its headers give, is too large; nothing of it is read."""
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._most:
            raise self._refusal()

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._read += len(message.get("body", b""))
            if self._read > self._most:
                raise self._refusal()
        return message

    def watch(self, send: Send) -> Send:
        """Return a `send` that notices when the response begins."""

        async def watched(message: Message) -> None:
            self.responding = True
            await send(message)

        return watched

    def _refusal(self) -> ApiError:
        return ApiError(413, f"The body is too large: expected at most {self._most} bytes.", code="request_too_large")


def _begin(scope: Scope) -> Exchange:
    headers, context = Headers(scope=scope), context_of(scope)
    requested = headers.get(REQUEST_ID, "")
    if _SANE_ID.fullmatch(requested):
        context.request_id = requested
    address = scope["client"][0] if scope.get("client") else ""
    return Exchange(context, scope["method"], scope["path"], address)


def _route(scope: Scope) -> str:
    """The path of the route that a request took, with names in place of what varies; "none" without one."""
    return getattr(scope.get("route"), "path", None) or "none"
