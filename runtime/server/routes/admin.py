"""GET and POST /admin/engine: show and replace the engine that is served. They need the key of --admin-key."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.server.calls import read_body, validate
from belle_compile.runtime.server.engine_swap import SwapBusy
from belle_compile.runtime.server.errors import ApiError, invalid
from belle_compile.runtime.server.openapi import operation
from belle_compile.runtime.server.responses import json_response
from belle_compile.runtime.server.schemas.admin import ReplaceEngineBody
from belle_compile.runtime.server.schemas.responses import SwapState
from belle_compile.runtime.server.service import Service

router = APIRouter()


@router.get("/admin/engine", **operation("Show the engine that is served, and what replaces it.", SwapState))
async def show_engine(request: HttpRequest) -> Response:
    service: Service = request.app.state.service
    return json_response(service.swap.state)


@router.post("/admin/engine", **operation("Serve another engine.", SwapState, body=ReplaceEngineBody))
async def replace_engine(request: HttpRequest) -> Response:
    """Answer once new requests get the other engine. It goes on where the client does not wait."""
    service: Service = request.app.state.service
    body = validate(ReplaceEngineBody, await read_body(request))
    directory = service.current.directory if body.path is None else Path(body.path)
    if directory is None:
        raise invalid("Missing required parameter: 'path'.", "path", "missing_required_parameter")
    try:
        await service.swap.replace(directory)
    except SwapBusy as error:
        raise ApiError(409, str(error), code="engine_swap_in_progress") from None
    except EngineError as error:
        raise ApiError(400, str(error), param="path", code="engine_not_replaced") from None
    return json_response(service.swap.state)
