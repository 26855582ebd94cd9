"""Replaces the engine of a running server: another one is loaded and tested beside it, new requests move over, and the old one
is closed once those under way have ended."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Protocol

from belle_compile.runtime.artifact import Manifest, read_manifest
from belle_compile.runtime.engine import Engine
from belle_compile.runtime.errors import BelleError, EngineError
from belle_compile.runtime.executors import AdaptableExecutor, executor_of
from belle_compile.runtime.memory import trim_heap
from belle_compile.runtime.server.logs import log
from belle_compile.runtime.server.metrics import Metrics
from belle_compile.runtime.server.schemas.responses import EngineState, SwapState
from belle_compile.runtime.server.served_engine import ServedEngine

STAGE = "replacing the engine"
_TICK_S = 0.02  # between two looks whether the requests of the old engine have ended
_SETTLE_S = 1.0  # until threads and tasks have let go of an engine that was closed
_LOG = logging.getLogger("belle_compile.server")


class Loader(Protocol):
    """Loads an engine with the options of the server."""

    def __call__(self, directory: Path, *, kv_cache_bytes: int, max_loras: int | None) -> Engine:
        """Load the engine in `directory`, with no adapter and room for `max_loras`. Where the server's options set no number of
        tokens, its KV cache takes `kv_cache_bytes`. Called on a thread of its own."""
        ...


class SwapBusy(EngineError):
    """The engine is being replaced already, or the one before still answers requests."""


class EngineSwap:
    """The engine that is served, and its replacement, at most one at a time. All methods are called on the server's event loop.

    `current` is the engine that new requests get.
    """

    def __init__(self, first: ServedEngine, metrics: Metrics, load: Loader | None) -> None:
        """Serve `first`, which belongs to the caller. Without `load`, as for an engine of several ranks, whose other processes
        cannot follow, every replacement is refused."""
        self.current = first
        self._metrics, self._load = metrics, load
        metrics.attach(first.base_names[0], first.engine)
        self._loading: Path | None = None
        self._previous: ServedEngine | None = None
        self._error: str | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def state(self) -> SwapState:
        """What is served, what is being loaded, and what still answers requests of before."""
        return {
            "current": _state(self.current),
            "loading": None if self._loading is None else str(self._loading),
            "previous": None if self._previous is None else _state(self._previous),
            "error": self._error,
        }

    async def replace(self, directory: Path) -> None:
        """Serve the engine in `directory` from now on. Returns once new requests are answered by it.

        Raises `EngineError`, with the running engine as it was, where it cannot be loaded beside the running one or fails its
        self-test, and `SwapBusy` while another replacement is under way. A task that is cancelled meanwhile ends nothing.
        """
        if self._load is None:
            remedy = "start a server of the new engine and drain this one"
            raise EngineError(STAGE, "an engine of several ranks cannot be replaced", remedy=remedy)
        if self._loading or self._previous:
            found = f"{self._loading} is being loaded" if self._loading else "requests that the engine before still answers"
            raise SwapBusy(STAGE, "one replacement at a time", found=found, remedy="try again when it is complete")
        self._loading, self._error = directory, None
        try:
            replacing = self._start(self._replace(directory, self._load))
        except BaseException:
            self._loading = None
            raise
        await asyncio.shield(replacing)

    async def reload(self) -> None:
        """Replace the engine where its directory, or the link that leads there, holds another one since it was loaded. What
        goes wrong is logged."""
        current = self.current
        if current.directory is None:
            return
        try:
            manifest = await asyncio.to_thread(read_manifest, current.directory)
            if manifest.digest != current.engine.identity.digest:
                await self.replace(current.directory)
        except BelleError as error:
            log(_LOG, logging.ERROR, "the engine stays as it was", error=str(error))

    async def _replace(self, directory: Path, load: Loader) -> None:
        served: ServedEngine | None = None
        try:
            served = await asyncio.to_thread(self._open, directory, load)
            await served.run_self_test()
            if not served.ready:
                raise EngineError(STAGE, f"{directory} fails its self-test", found=str(served.self_test["reason"]).rstrip("."))
            self._start(self._retire(self.current))  # which begins once this one waits or ends
        except BaseException as error:
            self._error = str(error)
            if served:
                await _close(served)
            raise
        finally:
            self._loading = None
        self._previous, self.current = self.current, served
        self._metrics.attach(served.base_names[0], served.engine)
        log(_LOG, logging.INFO, "the engine was replaced", at=str(directory), digest=served.engine.identity.digest,
            requests_of_the_old_one=self._previous.requests)  # fmt: skip

    def _open(self, directory: Path, load: Loader) -> ServedEngine:
        """Load an engine beside the running one, adapters included."""
        running = self.current.engine
        place = directory.resolve()  # so that a link which is moved meanwhile does not mix two engines
        manifest = read_manifest(place)
        kv_cache_bytes = _kv_bytes(running)
        _check_memory(running, manifest, kv_cache_bytes)
        executor = running.executor
        slots = executor.adapters.count if isinstance(executor, AdaptableExecutor) and executor.adapters else None
        engine = load(place, kv_cache_bytes=kv_cache_bytes, max_loras=slots)
        try:
            _check_memory(running, manifest, _kv_bytes(engine))
            for adapter in running.adapters.loaded.values() if running.adapters else ():
                assert engine.adapters is not None, "an engine that is loaded with room for adapters takes them"
                engine.adapters.load(adapter.name, adapter.directory, adapter.scale)
            return ServedEngine(engine, self.current.options, directory)
        except BaseException:
            engine.close()
            raise

    async def _retire(self, served: ServedEngine) -> None:
        """Close an engine once its requests have ended."""
        try:
            while served.requests:
                await asyncio.sleep(_TICK_S)
        finally:
            self._metrics.detach(served.engine)
            try:
                await _close(served)
            finally:
                self._previous = None
        del served
        # What lives as long as the process was taken out of garbage collection; parts of the old engine are among it.
        gc.unfreeze()
        await asyncio.sleep(_SETTLE_S)
        gc.collect()
        gc.freeze()
        trim_heap()  # which has 50 MB of a tokenizer of 49,152 tokens free

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine as a task that goes on whoever waits for it."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def close(self) -> None:
        """Close the engines that are served, the one of before included."""
        for served in filter(None, (self._previous, self.current)):
            served.engine.close()


async def _close(served: ServedEngine) -> None:
    """Close an engine on another thread, or here where there is none for it."""
    try:
        await asyncio.to_thread(served.engine.close)
    finally:
        served.engine.close()  # for the second time, which does nothing


def _kv_bytes(engine: Engine) -> int:
    return engine.executor.num_blocks * engine.executor.kv_block_bytes


def _check_memory(running: Engine, manifest: Manifest, kv_cache_bytes: int) -> None:
    """Raise `EngineError` where the host has too little memory for another engine with a KV cache of this size."""
    held = running.manifest.target.requires.memory_bytes + _kv_bytes(running)
    held += 2 * running.draft_bytes  # the other engine gets a draft of its own
    executor_of(manifest).check_host(manifest.target, held_bytes=held + kv_cache_bytes)


def _state(served: ServedEngine) -> EngineState:
    return {
        "directory": None if served.directory is None else str(served.directory),
        "model": served.base_names[0],
        "digest": served.engine.identity.digest,
        "self_test": served.self_test["status"],
        "requests": served.requests,
    }
