"""POST /v1/load_lora_adapter and POST /v1/unload_lora_adapter, which are vLLM's."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.server.calls import read_aside
from belle_compile.runtime.server.errors import ApiError, invalid, of_failure, of_request
from belle_compile.runtime.server.openapi import operation
from belle_compile.runtime.server.responses import json_response
from belle_compile.runtime.server.schemas.adapters import LoadAdapterBody, UnloadAdapterBody
from belle_compile.runtime.server.schemas.responses import Model
from belle_compile.runtime.server.served_engine import ServedEngine
from belle_compile.runtime.server.service import Service
from belle_compile.runtime.serving.adapters import AdapterBusy, Adapters, UnknownAdapter

router = APIRouter()


@router.post("/v1/load_lora_adapter", **operation("Load a LoRA adapter from the server's disk.", Model, body=LoadAdapterBody))
async def load_adapter(request: HttpRequest) -> Response:
    service: Service = request.app.state.service
    return json_response(await read_aside(service, request, LoadAdapterBody, _load, aside=True))


@router.post("/v1/unload_lora_adapter", **operation("Forget a LoRA adapter.", Model, body=UnloadAdapterBody))
async def unload_adapter(request: HttpRequest) -> Response:
    service: Service = request.app.state.service
    return json_response(await read_aside(service, request, UnloadAdapterBody, _unload, aside=True))


def _load(served: ServedEngine, body: LoadAdapterBody) -> Model:
    adapters = _adapters(served)
    if body.lora_name in served.base_names:
        raise invalid("Invalid value for 'lora_name': expected another name than those of the model.", "lora_name")
    try:
        adapters.load(body.lora_name, body.lora_path, 1.0 if body.lora_scale is None else body.lora_scale)
    except EngineError as error:
        raise of_failure(error) if error.stage == "engine" else of_request(error, "lora_path", error.what) from None
    return served.describe(body.lora_name)


def _unload(served: ServedEngine, body: UnloadAdapterBody) -> Model:
    adapters, name = _adapters(served), body.lora_name
    try:
        adapters.find(name)
        described = served.describe(name)
        adapters.unload(name)
    except UnknownAdapter as error:
        raise ApiError(404, str(error), param="lora_name", code="model_not_found") from None
    except AdapterBusy as error:
        raise ApiError(409, str(error), param="lora_name", code="adapter_in_use") from None
    except EngineError as error:
        raise of_failure(error) from None
    return described


def _adapters(served: ServedEngine) -> Adapters:
    adapters = served.engine.adapters
    if adapters is None or not served.options.allow_lora_updates:
        raise ApiError(403, "This server loads no adapters: it was started without --allow-lora-updates.", code="not_allowed")
    return adapters
