"""Requests that schemathesis makes from the server's own OpenAPI document: each gets a status that the document has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase

from belle_compile.runtime.server.app import create_app
from belle_compile.runtime.server.service import Service
from tests.runtime.server.serving import serving

EXAMPLES = 25  # of each operation
OPERATIONS = {
    "POST /v1/chat/completions", "POST /v1/completions", "GET /v1/models", "GET /v1/models/{model}", "POST /tokenize",
    "POST /detokenize", "GET /tokenizer_info", "GET /version", "GET /info", "GET /stats", "GET /report", "GET /health",
    "GET /ready", "GET /metrics",
}  # fmt: skip


@pytest.fixture(name="service", scope="module")
def _service() -> Iterator[Service]:
    with serving() as service:
        service.current.ready = True
        yield service


def test_every_request_gets_a_documented_status(service: Service) -> None:
    app: Any = create_app(service)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    statuses: dict[str, set[int]] = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        label = f"{operation.method.upper()} {operation.path}"
        statuses[label] = _statuses(operation)
    assert OPERATIONS <= statuses.keys(), "the document leaves out a route"
    for label in ("POST /v1/chat/completions", "POST /v1/completions", "POST /tokenize", "POST /detokenize"):
        assert 400 in statuses[label], "no request was wrong"
    assert 200 in statuses["GET /v1/models"]
    assert service.engine.stats().running == service.engine.stats().waiting == 0


def _statuses(operation: Any) -> set[int]:
    """The statuses that requests for an operation got; an undocumented one, or one of the server's own errors, fails."""
    found: set[int] = set()
    documented = {int(status) for status in operation.definition.raw["responses"]}
    cases = hypothesis.strategies.one_of(*(operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode))

    @hypothesis.seed(20)
    @hypothesis.settings(
        max_examples=EXAMPLES, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @hypothesis.given(case=cases)
    def call(case: Any) -> None:
        response = case.call()
        status = response.status_code
        assert status in documented and status < 500, f"{status} for {case.as_curl_command()}: {response.text}"
        found.add(status)

    call()
    return found
