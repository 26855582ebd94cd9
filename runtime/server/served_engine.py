"""An engine as the server serves it, which each request holds from its first byte to its last."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any, cast

from starlette.types import Scope

from belle_compile.runtime.artifact import REPORT_NAME
from belle_compile.runtime.engine import Engine
from belle_compile.runtime.errors import BelleError, EngineError
from belle_compile.runtime.server.errors import ApiError
from belle_compile.runtime.server.logs import log
from belle_compile.runtime.server.options import ServerOptions
from belle_compile.runtime.server.schemas.responses import Model
from belle_compile.runtime.server.token_texts import TokenTexts
from belle_compile.runtime.serving.adapters import LoadedAdapter
from belle_compile.runtime.serving.grammar.source import Grammar

OWNER = "belle-compile"
_LOG = logging.getLogger("belle_compile.server")
_SERVED_BY = "belle.served_by"  # in ASGI's `state`


class ServedEngine:
    """An engine, and what the server makes of it once.

    `ready` is set once the engine has passed its self-test. `requests` are the HTTP requests that hold it: it is not closed
    before they have ended. `directory` is the engine's, where it has one. Raises `EngineError` where an adapter has a name of
    the model, and where the template does not read a variable that the options set by default.
    """

    def __init__(self, engine: Engine, options: ServerOptions, directory: Path | None = None) -> None:
        self.engine, self.options, self.directory = engine, options, directory
        self.ready = False
        self.requests = 0
        self.self_test: dict[str, Any] = {"status": "running"}  # what /ready shows of it
        self.created_at = time.time()  # seconds since the epoch
        self.base_names = options.served_model_names or (engine.manifest.model.name,)
        if both := {*self.base_names} & {*self._adapters}:
            expected = "another name than those of the model"
            raise EngineError("server options", "lora", found=f"an adapter {min(both)}", expected=expected)
        # What chats set in the prompt template, unless they say otherwise.
        self.template_variables = engine.chat.check_variables(options.template_variables())
        identity = json.dumps(astuple(engine.identity))
        self.fingerprint = f"fp_{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
        self.token_texts = TokenTexts(engine.tokenizer)
        report = directory / REPORT_NAME if directory else None
        self.report = report if report and report.is_file() else None  # the page that `belle-compile build` wrote

    async def run_self_test(self) -> None:
        """Let the engine generate its golden answers. It is ready once they are right, or if it has none."""
        try:
            result = await asyncio.to_thread(self.engine.self_test)
            await asyncio.to_thread(self._load_grammars)
        except BelleError as error:
            self.self_test = {"status": "failed", "reason": str(error)}
            log(_LOG, logging.ERROR, "the self-test failed", reason=str(error))
            return
        status = "passed" if result.prompts else "absent"
        self.self_test = {"status": status, **{name: value for name, value in asdict(result).items() if value != ""}}
        self.ready = True
        log(_LOG, logging.INFO, "ready", **{f"self_test_{name}": value for name, value in self.self_test.items()})

    def _load_grammars(self) -> None:
        """Load what grammars need, for which the steps of other requests would wait at the first grammar. An engine whose
        tokenizer allows none is ready nevertheless, and refuses requests with grammars."""
        try:
            self.engine.tokenizer.grammars.check(Grammar("json_object"))
        except EngineError as error:
            log(_LOG, logging.WARNING, "grammars are not available", reason=str(error))

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
            "created": int(self.created_at),
            "owned_by": OWNER,
            "max_model_len": self.engine.max_context,
        }
        return {**described, "parent": self.base_names[0]} if self.is_adapter(name) else described

    def variables_of(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """The variables of the prompt template for a chat that sets the `given` ones."""
        return {**self.template_variables, **(given or {})}

    @property
    def _adapters(self) -> Mapping[str, LoadedAdapter]:
        adapters = self.engine.adapters
        return adapters.loaded if adapters else {}


def hold(scope: Scope, served: ServedEngine) -> None:
    """Let a request use an engine until `release`. The outermost middleware calls this once a request."""
    scope.setdefault("state", {})[_SERVED_BY] = served
    served.requests += 1


def release(scope: Scope) -> None:
    """Give up the engine of a request that has ended, if it holds one."""
    served = scope["state"].pop(_SERVED_BY, None)  # an idle connection keeps its last request's scope
    if served is not None:
        served.requests -= 1


def served_by(scope: Scope) -> ServedEngine:
    """The engine that answers a request, the same from its beginning to its end."""
    return cast(ServedEngine, scope["state"][_SERVED_BY])
