"""The state that all routes share: the engine, the server's options, and whether it takes requests."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import Any, TypeVar

from belle_compile.runtime.artifact import REPORT_NAME
from belle_compile.runtime.engine import Engine
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.server.access import Access
from belle_compile.runtime.server.errors import SERVER, ApiError
from belle_compile.runtime.server.metrics import Metrics
from belle_compile.runtime.server.options import ServerOptions
from belle_compile.runtime.server.schemas.responses import Model
from belle_compile.runtime.server.token_texts import TokenTexts
from belle_compile.runtime.serving.adapters import LoadedAdapter

T = TypeVar("T")

OWNER = "belle-compile"
RETRY_WHILE_DRAINING_S = 5
_PARSERS = 2  # threads for bodies that take long to read: as many as the smallest host has cores


class Service:
    """An engine that is served. Routes find it at `app.state.service`.

    `ready` is set once the engine has passed its self-test. While `draining`, new requests are refused. `directory` is the
    engine's, where it has one.
    """

    def __init__(
        self, engine: Engine, options: ServerOptions, metrics: Metrics | None = None, directory: Path | None = None
    ) -> None:
        self.engine, self.options = engine, options
        self.metrics = metrics or Metrics()
        self.ready = False
        self.draining = False
        self.self_test: dict[str, Any] = {"status": "running"}  # what /ready shows of it
        self.access = Access(options.api_keys, options.api_key_file)
        self.started_at = time.time()  # seconds since the epoch
        self.base_names = options.served_model_names or (engine.manifest.model.name,)
        if both := {*self.base_names} & {*self._adapters}:
            expected = "another name than those of the model"
            raise EngineError("server options", "lora", found=f"an adapter {min(both)}", expected=expected)
        self.metrics.attach(self.base_names[0], engine)
        identity = json.dumps(astuple(engine.identity))
        self.fingerprint = f"fp_{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
        self.token_texts = TokenTexts(engine.tokenizer)
        report = directory / REPORT_NAME if directory else None
        self.report = report if report and report.is_file() else None  # the page that `belle-compile build` wrote
        self._parsers = ThreadPoolExecutor(_PARSERS, "belle-http")

    def admit(self) -> None:
        """Raise `ApiError` while no new request is taken."""
        if self.draining:
            message = "The server is about to end and takes no new requests."
            headers = {"Retry-After": str(RETRY_WHILE_DRAINING_S)}
            raise ApiError(503, message, type=SERVER, code="draining", headers=headers)

    def model(self, name: str | None) -> str:
        """Return the model of a request, by default the first name; raises `ApiError` for an unknown one."""
        if name is None:
            return self.base_names[0]
        if name not in self.base_names and name not in self._adapters:
            raise self.unknown_model(name)
        return name

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names of the model, and those of its adapters, which requests choose as models."""
        return (*self.base_names, *self._adapters)

    def is_adapter(self, name: str | None) -> bool:
        """Whether a model that a request may name is an adapter."""
        return name is not None and name not in self.base_names and name in self._adapters

    def unknown_model(self, name: str) -> ApiError:
        """The error of a request that names another model."""
        known = ", ".join(self.model_names)
        message = f"The model '{name[:200]}' does not exist. This server has: {known}."
        return ApiError(404, message, param="model", code="model_not_found")

    def describe(self, name: str) -> Model:
        """A model as /v1/models shows it; that of an adapter names its `parent`."""
        described: Model = {
            "id": name,
            "object": "model",
            "created": int(self.started_at),
            "owned_by": OWNER,
            "max_model_len": self.engine.max_context,
        }
        return {**described, "parent": self.base_names[0]} if self.is_adapter(name) else described

    @property
    def _adapters(self) -> Mapping[str, LoadedAdapter]:
        adapters = self.engine.adapters
        return adapters.loaded if adapters else {}

    async def aside(self, function: Callable[[], T]) -> T:
        """Run what takes long on a thread, so that the event loop goes on."""
        return await asyncio.get_running_loop().run_in_executor(self._parsers, function)

    def close(self) -> None:
        """End the threads. The engine belongs to the caller."""
        self._parsers.shutdown(wait=False)
