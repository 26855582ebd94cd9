"""A span of OpenTelemetry for each request, where its SDK is installed: `pip install opentelemetry-sdk` and an exporter."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from belle_compile.runtime.server.logs import Exchange

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
# The operations that GenAI's semantic conventions name, by route.
_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
# The conventions' names of what routes add to the details of a request.
_ATTRIBUTES = {
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "finish_reasons": "gen_ai.response.finish_reasons",
}


def find_tracer() -> Any | None:
    """Return a tracer of OpenTelemetry; None without its SDK.

    A provider that the process has is used, such as that of `opentelemetry-instrument`. Otherwise spans go where
    OTEL_EXPORTER_OTLP_ENDPOINT says, if it is set and the exporter over HTTP is installed.
    """
    try:
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        return None
    if any(os.environ.get(name) for name in _ENDPOINTS) and not isinstance(trace.get_tracer_provider(), TracerProvider):
        with contextlib.suppress(ImportError):
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            provider = TracerProvider()
            provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
            trace.set_tracer_provider(provider)
    return trace.get_tracer("belle_compile")


@contextlib.contextmanager
def span(tracer: Any | None, exchange: Exchange, headers: Mapping[str, str]) -> Iterator[None]:
    """Run the block in a span of the request, whose parent is in `headers`; its attributes are set at the end."""
    if tracer is None:
        yield
        return
    from opentelemetry.trace import SpanKind, Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    parent = TraceContextTextMapPropagator().extract(headers)
    with tracer.start_as_current_span(exchange.method, parent, SpanKind.SERVER) as current:
        try:
            yield
        finally:
            operation = _OPERATIONS.get(exchange.route)
            model = exchange.context.model
            current.update_name(f"{operation} {model}" if operation and model else f"{exchange.method} {exchange.route}")
            for name, value in attributes(exchange).items():
                current.set_attribute(name, value)
            if exchange.status >= 500 or not exchange.complete:
                current.set_status(Status(StatusCode.ERROR))


def attributes(exchange: Exchange) -> dict[str, Any]:
    """The attributes of a request's span, by the semantic conventions for HTTP and for GenAI."""
    result: dict[str, Any] = {
        "http.request.method": exchange.method,
        "http.route": exchange.route,
        "http.response.status_code": exchange.status,
        "client.address": exchange.address,
        "belle.request_id": exchange.context.request_id,
    }
    if (operation := _OPERATIONS.get(exchange.route)) and exchange.context.model:
        result |= {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "belle-compile",
            "gen_ai.request.model": exchange.context.model,
            "gen_ai.response.model": exchange.context.model,
        }
        details = exchange.context.details
        result |= {attribute: details[name] for name, attribute in _ATTRIBUTES.items() if name in details}
    return result
