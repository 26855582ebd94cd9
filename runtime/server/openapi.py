"""The application's own OpenAPI document: bodies by their schemas, and every status that a route may have."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from belle_compile import __version__
from belle_compile.runtime.server.schemas import responses
from belle_compile.runtime.server.schemas.adapters import LoadAdapterBody, UnloadAdapterBody
from belle_compile.runtime.server.schemas.admin import ReplaceEngineBody
from belle_compile.runtime.server.schemas.chat import ChatBody
from belle_compile.runtime.server.schemas.completions import CompletionBody
from belle_compile.runtime.server.schemas.tokens import DetokenizeBody, TokenizeBody

TITLE = "belle-compile"
_COMPONENTS = "#/components/schemas/"
_DOCUMENTED: tuple[Any, ...] = (
    ChatBody, CompletionBody, TokenizeBody, DetokenizeBody, LoadAdapterBody, UnloadAdapterBody,
    ReplaceEngineBody, responses.ErrorBody, responses.ChatCompletion, responses.ChatCompletionChunk, responses.Completion,
    responses.CompletionChunk, responses.Model, responses.ModelList, responses.Tokens, responses.DetokenizedText,
    responses.TokenizerInfo, responses.Version, responses.Info, responses.Stats, responses.SwapState,
)  # fmt: skip
_STATUSES = {
    400: "The request is not one that the server answers; the error names the field.",
    401: "The API key is missing or unknown.",
    403: "The server was started without the option that allows it.",
    404: "There is no such model or page.",
    408: "The request's time was over before its answer was complete.",
    409: "The adapter is in use, or the engine is being replaced already.",
    413: "The body is too large.",
    429: "The queue is full, or a limit of the API key is reached; Retry-After says when to try again.",
    500: "The engine failed.",
    503: "The server is about to end, or the engine does not answer.",
}


def operation(
    summary: str,
    response: type | None = None,
    *,
    body: type | None = None,
    event: type | None = None,
    path_parameter: str = "",
    media_type: str = "application/json",
) -> dict[str, Any]:
    """Return what FastAPI's decorators of routes take to document one.

    `event` is the type of the data of each event where the response may be a stream.
    """
    content: dict[str, Any] = {media_type: {"schema": _reference(response) if response else {"type": "string"}}}
    if event:
        # OpenAPI has no word for the data of events before version 3.2.
        content["text/event-stream"] = {"schema": {"type": "string"}, "x-event-data": _reference(event)}
    error = {"application/json": {"schema": _reference(responses.ErrorBody)}}
    documented: dict[int | str, Any] = {200: {"description": "Success.", "content": content}}
    documented |= {status: {"description": meaning, "content": error} for status, meaning in _STATUSES.items()}
    extra: dict[str, Any] = {}
    if body:
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": _reference(body)}}}
    if path_parameter:
        schema = {"type": "string", "minLength": 1}
        extra["parameters"] = [{"name": path_parameter, "in": "path", "required": True, "schema": schema}]
    return {"summary": summary, "responses": documented, "openapi_extra": extra}


def document(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document of an application, which is made the first time."""
    if app.openapi_schema:
        return app.openapi_schema
    whole: dict[str, Any] = get_openapi(title=TITLE, version=__version__, routes=app.routes)
    adapters = [(documented.__name__, "validation", TypeAdapter(documented)) for documented in _DOCUMENTED]
    _, definitions = TypeAdapter.json_schemas(adapters, ref_template=_COMPONENTS + "{model}")  # type: ignore[arg-type]
    whole.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
    app.openapi_schema = whole
    return whole


def _reference(documented: type) -> dict[str, str]:
    return {"$ref": f"{_COMPONENTS}{documented.__name__}"}
