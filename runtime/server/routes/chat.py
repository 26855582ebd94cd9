"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from belle_compile.runtime.server.answers import answer
from belle_compile.runtime.server.calls import read_call
from belle_compile.runtime.server.direct_route import DirectRoute
from belle_compile.runtime.server.formats import ChatFormat
from belle_compile.runtime.server.openapi import operation
from belle_compile.runtime.server.schemas.chat import ChatBody
from belle_compile.runtime.server.schemas.responses import ChatCompletion, ChatCompletionChunk
from belle_compile.runtime.server.service import Service

router = APIRouter(route_class=DirectRoute)


@router.post("/v1/chat/completions", **operation("Continue a chat.", ChatCompletion, body=ChatBody, event=ChatCompletionChunk))
async def create_chat_completion(request: HttpRequest) -> Response:
    service: Service = request.app.state.service
    call = await read_call(service, request, ChatBody)
    return await answer(request, call, ChatFormat(call, f"chatcmpl-{call.context.request_id}"))
