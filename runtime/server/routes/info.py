"""GET /version, /info, /stats and /report: what is served, and how it does."""

from __future__ import annotations

import time

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, Response

from belle_compile import __version__
from belle_compile.runtime.server.errors import ApiError
from belle_compile.runtime.server.openapi import operation
from belle_compile.runtime.server.responses import json_response
from belle_compile.runtime.server.schemas.responses import Info, Stats, Version
from belle_compile.runtime.server.served_engine import ServedEngine, served_by
from belle_compile.runtime.server.service import Service
from belle_compile.runtime.serving.result_cache.store import CacheStats

REPORT = "/report"
_REPORT_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"}

router = APIRouter()


@router.get("/version", **operation("Show the version of the server.", Version))
async def version(request: HttpRequest) -> Response:
    body: Version = {"version": __version__}
    return json_response(body)


@router.get("/info", **operation("Show facts about the engine and the defaults of requests.", Info))
async def info(request: HttpRequest) -> Response:
    return json_response(_info(served_by(request.scope)))


@router.get("/stats", **operation("Show counts since the start, and medians of the last requests.", Stats))
async def stats(request: HttpRequest) -> Response:
    return json_response(_stats(request.app.state.service))


@router.get(REPORT, **operation("Show the report on the engine's build.", media_type="text/html"))
async def report(request: HttpRequest) -> Response:
    report = served_by(request.scope).report
    if report is None:
        raise ApiError(404, "The engine has no report.", code="no_report")
    return FileResponse(report, media_type="text/html; charset=utf-8", headers=_REPORT_HEADERS)


def _info(served: ServedEngine) -> Info:
    engine = served.engine
    manifest, generation = engine.manifest, engine.manifest.generation
    return {
        "model": served.model_names[0],
        "version": __version__,
        "engine": {
            "name": manifest.model.name,
            "target": manifest.target.name,
            "backend": manifest.target.backend,
            "digest": manifest.digest,
            "quantization": manifest.quantization,
            "kernels": engine.identity.kernels,
            "max_context": engine.max_context,
            "vocab_size": engine.executor.vocab_size,
            "ranks": manifest.target.ranks,
            "parameters": manifest.model.parameters,
        },
        "defaults": {
            "max_tokens": generation.max_new_tokens,
            "temperature": generation.temperature,
            "top_k": generation.top_k,
            "top_p": generation.top_p,
            "repetition_penalty": generation.repetition_penalty,
        },
        "report": REPORT if served.report else None,
    }


def _stats(service: Service) -> Stats:
    engine, medians, now = service.metrics.stats(), service.metrics.medians(), time.time()
    results = engine.result_cache or CacheStats()
    return {
        "time": now,
        "uptime_s": now - service.started_at,
        "running": engine.running,
        "waiting": engine.waiting,
        "kv_usage": engine.kv_blocks_used / engine.kv_blocks,
        "prompt_tokens": engine.prompt_tokens,
        "generated_tokens": engine.generated_tokens,
        "prefix_hit_tokens": engine.prefix_hits,
        "prefix_query_tokens": engine.prefix_queries,
        "result_hits": results.hits + results.shared,
        "result_lookups": results.hits + results.shared + results.misses,
        "preemptions": engine.preemptions,
        "ttft_p50_s": medians.first_token_s,
        "tpot_p50_s": medians.token_s,
        "e2e_p50_s": medians.total_s,
    }
