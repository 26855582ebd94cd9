"""GET /v1/models and GET /v1/models/{id}."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from belle_compile.runtime.server.openapi import operation
from belle_compile.runtime.server.responses import json_response
from belle_compile.runtime.server.schemas.responses import Model, ModelList
from belle_compile.runtime.server.served_engine import served_by

router = APIRouter()


@router.get("/v1/models", **operation("List the names of the model.", ModelList))
async def list_models(request: HttpRequest) -> Response:
    served = served_by(request.scope)
    models: ModelList = {"object": "list", "data": [served.describe(name) for name in served.model_names]}
    return json_response(models)


@router.get("/v1/models/{model:path}", **operation("Show the model by one of its names.", Model, path_parameter="model"))
async def show_model(request: HttpRequest) -> Response:
    served = served_by(request.scope)
    return json_response(served.describe(served.model(request.path_params["model"])))
