"""Runs the server: listens, tests the engine, and ends by a signal without losing a request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import uvicorn
import uvloop
from fastapi import FastAPI

from belle_compile.runtime.errors import BelleError, EngineError
from belle_compile.runtime.server.connections import Connection
from belle_compile.runtime.server.logs import log
from belle_compile.runtime.server.options import ServerOptions
from belle_compile.runtime.server.service import Service

STAGE = "server"
_LOG = logging.getLogger("belle_compile.server")
_TICK_S = 0.02
_CUT_S = 2  # for responses to end with an error once the time to drain is over
_OTHER_FILES = 256  # that the process needs beside connections
_BACKLOG = 2048


class Server(uvicorn.Server):
    """A server of an application. It handles signals itself: the first one drains, the second one ends the process.

    While it drains, it still listens: new requests get status 503, for a moment, rather than a closed connection.
    """

    def __init__(self, app: FastAPI, service: Service) -> None:
        options = service.options
        most = allow_connections(options.max_connections)
        config = uvicorn.Config(
            app, uds=str(options.uds) if options.uds else None, http=cast(Any, partial(Connection, service, most)), ws="none",
            log_config=None, access_log=False, server_header=False, root_path=options.root_path,
            proxy_headers=bool(options.forwarded_allow_ips), forwarded_allow_ips=list(options.forwarded_allow_ips),
            timeout_graceful_shutdown=_CUT_S, backlog=_BACKLOG,
            ssl_certfile=options.ssl_certfile, ssl_keyfile=options.ssl_keyfile,
        )  # fmt: skip
        super().__init__(config)
        self.service = service
        self.exit_code = 0
        self._tasks: list[asyncio.Task[None]] = []

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal, or `drain` on this server's loop, ends it. `exit_code` is then that of the process."""
        uvloop.run(self.serve(sockets))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while the server runs, where it runs on the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        handlers: dict[signal.Signals, Callable[[], None]] = {
            number: partial(self._handle_signal, number) for number in (signal.SIGTERM, signal.SIGINT)
        }
        if self.service.options.api_key_file or self.service.options.admin_key:  # else a terminal that closes ends the process
            handlers[signal.SIGHUP] = self.reload
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and begin the engine's self-test."""
        await super().startup(sockets)
        where = str(self.service.options.uds or self.url(sockets))
        log(_LOG, logging.INFO, "listening", at=where, model=self.service.current.model_names[0], process=os.getpid())
        self._tasks.append(asyncio.create_task(self.service.current.run_self_test()))

    def url(self, sockets: Sequence[socket.socket] | None) -> str:
        """The URL of the first socket."""
        host, port = sockets[0].getsockname()[:2] if sockets else (self.config.host, self.config.port)
        return f"http{'s' * self.config.is_ssl}://{f'[{host}]' if ':' in host else host}:{port}"

    def drain(self) -> None:
        """Take no new requests, let those under way end, then end the server. Called on its loop."""
        if not self.service.draining:
            self.service.draining = True
            for connection in self.server_state.connections:
                cast(Connection, connection).close_after_response()
            self._tasks.append(asyncio.create_task(self._drain()))

    def reload(self) -> None:
        """Read the file of API keys again, and, with --admin-key, the engine's directory. What does not fit leaves keys and
        engine as they were."""
        if self.service.options.admin_key:
            self._tasks.append(asyncio.create_task(self.service.swap.reload()))
        if not self.service.options.api_key_file:
            return
        try:
            log(_LOG, logging.INFO, "API keys were read again", keys=self.service.access.reload())
        except BelleError as error:
            log(_LOG, logging.ERROR, "API keys stay as they were", error=str(error))

    def _handle_signal(self, number: signal.Signals) -> None:
        if self.service.draining:
            log(_LOG, logging.ERROR, "ended by a second signal", signal=number.name, requests=len(self.server_state.tasks))
            os._exit(128 + number)  # without waiting for a step, or for an executor that hangs
        log(_LOG, logging.INFO, "draining", signal=number.name, requests=len(self.server_state.tasks))
        self.drain()

    async def _drain(self) -> None:
        if not await self._idle_within(self.service.options.drain_timeout_s):
            log(_LOG, logging.ERROR, "requests were cut off by the drain timeout", requests=len(self.server_state.tasks))
            self.exit_code = 1
            # Each request ends with an error that its client is sent. An executor that hangs is not waited for.
            threading.Thread(target=self.service.swap.close, name="belle-close", daemon=True).start()
            await self._idle_within(_CUT_S)
        self.should_exit = True

    async def _idle_within(self, seconds: float) -> bool:
        """Wait until no request is under way, for at most so many seconds; returns whether there is none."""
        end = time.monotonic() + seconds
        while self.server_state.tasks and time.monotonic() < end:
            await asyncio.sleep(_TICK_S)
        return not self.server_state.tasks


def check_certificate(options: ServerOptions) -> None:
    """Raise `EngineError` where the certificate for HTTPS or its key cannot be loaded."""
    if options.ssl_certfile:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(options.ssl_certfile, options.ssl_keyfile)
        except OSError as error:  # ssl.SSLError is one
            expected = "a certificate chain and its key in PEM"
            raise EngineError(STAGE, f"cannot load {options.ssl_certfile}", found=_reason(error), expected=expected) from None


def bind(options: ServerOptions) -> list[socket.socket] | None:
    """Take the address to listen on, which refuses connections until the server runs; None for a Unix socket.

    Raises `EngineError` where it cannot be had.
    """
    if options.uds:
        return None
    try:
        address_family, kind, protocol, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(address_family, kind, protocol)
    except OSError as error:
        raise EngineError(STAGE, f"cannot listen on {options.host!r}", found=_reason(error)) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address_family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
    except OSError as error:
        listener.close()
        what, remedy = f"cannot listen on {options.host} port {options.port}", "choose another with --host or --port"
        raise EngineError(STAGE, what, found=_reason(error), remedy=remedy) from None
    return [listener]


def allow_connections(most: int) -> int:
    """Raise the number of files that this process may open to what `most` connections need; returns how many it allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = most + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        if allowed < needed:
            log(_LOG, logging.WARNING, "the limit of open files allows fewer connections", asked=most, limit=allowed)
            return max(1, allowed - _OTHER_FILES)
    return most


def run(app: FastAPI, service: Service, sockets: list[socket.socket] | None) -> int:
    """Serve until a signal ends it; returns the exit code: 0, or 1 where requests were cut off by the drain timeout."""
    try:
        server = Server(app, service)
        server.run(sockets)
    except OSError as error:  # of the Unix socket or the certificate
        raise EngineError(STAGE, "cannot serve", found=_reason(error)) from None
    finally:
        if service.options.uds:
            service.options.uds.unlink(missing_ok=True)
    return server.exit_code


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).rstrip(".")
