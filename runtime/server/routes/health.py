"""Routes for those who watch the server: /health, /ready and /metrics."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from belle_compile.runtime.server.metrics import CONTENT_TYPE
from belle_compile.runtime.server.served_engine import served_by
from belle_compile.runtime.server.service import Service

router = APIRouter(tags=["health"])

ALIVE_WITHIN_S = 10.0  # in which a step thread that is at work ends a step
_RETRY = {"Retry-After": "1"}


@router.get("/health", responses={503: {"description": "The step thread has ended or hangs."}})
async def health(request: HttpRequest) -> Response:
    """Tell whether the step thread moves; what is not alive must be started again."""
    if await asyncio.to_thread(served_by(request.scope).engine.alive, ALIVE_WITHIN_S):
        return JSONResponse({"status": "alive"})
    return JSONResponse({"status": "dead", "reason": "the engine is closed or its step thread hangs"}, 503)


@router.get("/ready", responses={503: {"description": "The self-test has not passed, or the server drains."}})
async def ready(request: HttpRequest) -> Response:
    """Tell whether to send requests here: the engine has passed its self-test, and the server is not draining."""
    service: Service = request.app.state.service
    served, draining = served_by(request.scope), service.draining
    state = {"ready": served.ready and not draining, "draining": draining, "self_test": served.self_test}
    return JSONResponse(state, 200) if state["ready"] else JSONResponse(state, 503, _RETRY)


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}}}, response_class=Response)
async def metrics(request: HttpRequest) -> Response:
    """Show counts and times in Prometheus' text format."""
    service: Service = request.app.state.service
    return Response(service.metrics.exposition(), media_type=CONTENT_TYPE)
