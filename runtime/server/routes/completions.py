"""POST /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from belle_compile.runtime.server.answers import answer
from belle_compile.runtime.server.calls import read_call
from belle_compile.runtime.server.direct_route import DirectRoute
from belle_compile.runtime.server.formats import CompletionFormat
from belle_compile.runtime.server.openapi import operation
from belle_compile.runtime.server.schemas.completions import CompletionBody
from belle_compile.runtime.server.schemas.responses import Completion, CompletionChunk
from belle_compile.runtime.server.service import Service

router = APIRouter(route_class=DirectRoute)


@router.post("/v1/completions", **operation("Continue texts.", Completion, body=CompletionBody, event=CompletionChunk))
async def create_completion(request: HttpRequest) -> Response:
    service: Service = request.app.state.service
    call = await read_call(service, request, CompletionBody)
    return await answer(request, call, CompletionFormat(call, f"cmpl-{call.context.request_id}"))
