"""Routes for those who watch the server: /health, /ready and /metrics."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from belle_compile.runtime.errors import BelleError, EngineError
from belle_compile.runtime.server.logs import log
from belle_compile.runtime.server.metrics import CONTENT_TYPE
from belle_compile.runtime.server.service import Service
from belle_compile.runtime.serving.grammar.source import Grammar

router = APIRouter(tags=["health"])

_LOG = logging.getLogger("belle_compile.server")
ALIVE_WITHIN_S = 10.0  # in which a step thread that is at work ends a step
_RETRY = {"Retry-After": "1"}


async def run_self_test(service: Service) -> None:
    """Let the engine generate its golden answers. The service is ready once they are right, or if the engine has none."""
    try:
        result = await asyncio.to_thread(service.engine.self_test)
        await asyncio.to_thread(_load_grammars, service)
    except BelleError as error:
        service.self_test = {"status": "failed", "reason": str(error)}
        log(_LOG, logging.ERROR, "the self-test failed", reason=str(error))
        return
    status = "passed" if result.prompts else "absent"
    service.self_test = {"status": status, **{name: value for name, value in asdict(result).items() if value != ""}}
    service.ready = True
    log(_LOG, logging.INFO, "ready", **{f"self_test_{name}": value for name, value in service.self_test.items()})


def _load_grammars(service: Service) -> None:
    """Load what grammars need, for which the steps of other requests would wait at the first grammar. An engine whose
    tokenizer allows none is ready nevertheless, and refuses requests with grammars."""
    try:
        service.engine.tokenizer.grammars.check(Grammar("json_object"))
    except EngineError as error:
        log(_LOG, logging.WARNING, "grammars are not available", reason=str(error))


@router.get("/health", responses={503: {"description": "The step thread has ended or hangs."}})
async def health(request: HttpRequest) -> Response:
    """Tell whether the step thread moves; what is not alive must be started again."""
    service: Service = request.app.state.service
    if await asyncio.to_thread(service.engine.alive, ALIVE_WITHIN_S):
        return JSONResponse({"status": "alive"})
    return JSONResponse({"status": "dead", "reason": "the engine is closed or its step thread hangs"}, 503)


@router.get("/ready", responses={503: {"description": "The self-test has not passed, or the server drains."}})
async def ready(request: HttpRequest) -> Response:
    """Tell whether to send requests here: the engine has passed its self-test, and the server is not draining."""
    service: Service = request.app.state.service
    state = {"ready": service.ready and not service.draining, "draining": service.draining, "self_test": service.self_test}
    return JSONResponse(state, 200) if state["ready"] else JSONResponse(state, 503, _RETRY)


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}}}, response_class=Response)
async def metrics(request: HttpRequest) -> Response:
    """Show counts and times in Prometheus' text format."""
    service: Service = request.app.state.service
    return Response(service.metrics.exposition(), media_type=CONTENT_TYPE)
