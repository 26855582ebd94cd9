"""The state that all routes share: the engine that new requests get, the server's options, and whether it takes requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from belle_compile.runtime.engine import Engine
from belle_compile.runtime.server.access import Access
from belle_compile.runtime.server.engine_swap import EngineSwap, Loader
from belle_compile.runtime.server.errors import SERVER, ApiError
from belle_compile.runtime.server.metrics import Metrics
from belle_compile.runtime.server.options import ServerOptions
from belle_compile.runtime.server.served_engine import ServedEngine

T = TypeVar("T")

RETRY_WHILE_DRAINING_S = 5
_PARSERS = 2  # threads for bodies that take long to read: as many as the smallest host has cores


class Service:
    """What is served. Routes find it at `app.state.service`, and the engine of a request with `served_by`.

    While `draining`, new requests are refused. `directory` is the engine's, where it has one. `swap` replaces the engine by one
    that `load` loads.
    """

    def __init__(
        self,
        engine: Engine,
        options: ServerOptions,
        metrics: Metrics | None = None,
        directory: Path | None = None,
        load: Loader | None = None,
    ) -> None:
        self.options = options
        self.metrics = metrics or Metrics()
        self.draining = False
        self.access = Access(options.api_keys, options.api_key_file, options.admin_key)
        self.started_at = time.time()  # seconds since the epoch
        self.swap = EngineSwap(ServedEngine(engine, options, directory), self.metrics, load)
        self._parsers = ThreadPoolExecutor(_PARSERS, "belle-http")

    @property
    def current(self) -> ServedEngine:
        """The engine that new requests get, as it is served."""
        return self.swap.current

    @property
    def engine(self) -> Engine:
        """The engine that new requests get."""
        return self.swap.current.engine

    def admit(self) -> None:
        """Raise `ApiError` while no new request is taken."""
        if self.draining:
            message = "The server is about to end and takes no new requests."
            headers = {"Retry-After": str(RETRY_WHILE_DRAINING_S)}
            raise ApiError(503, message, type=SERVER, code="draining", headers=headers)

    async def aside(self, function: Callable[[], T]) -> T:
        """Run what takes long on a thread, so that the event loop goes on."""
        return await asyncio.get_running_loop().run_in_executor(self._parsers, function)

    def close(self) -> None:
        """End the threads. Engines are closed by `swap`."""
        self._parsers.shutdown(wait=False)
