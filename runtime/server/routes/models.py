"""GET /v1/models and GET /v1/models/{id}."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from belle_compile.runtime.server.openapi import operation
from belle_compile.runtime.server.responses import json_response
from belle_compile.runtime.server.schemas.responses import Model, ModelList
from belle_compile.runtime.server.service import Service

OWNER = "belle-compile"

router = APIRouter()


@router.get("/v1/models", **operation("List the names of the model.", ModelList))
async def list_models(request: HttpRequest) -> Response:
    service: Service = request.app.state.service
    models: ModelList = {"object": "list", "data": [_model(service, name) for name in service.model_names]}
    return json_response(models)


@router.get("/v1/models/{model:path}", **operation("Show the model by one of its names.", Model, path_parameter="model"))
async def show_model(request: HttpRequest) -> Response:
    service: Service = request.app.state.service
    return json_response(_model(service, service.model(request.path_params["model"])))


def _model(service: Service, name: str) -> Model:
    return {
        "id": name,
        "object": "model",
        "created": int(service.started_at),
        "owned_by": OWNER,
        "max_model_len": service.engine.max_context,
    }
