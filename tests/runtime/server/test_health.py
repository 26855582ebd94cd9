"""/health, /ready and /metrics of a server on a socket."""

from __future__ import annotations

import threading

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.selftest import SelfTest
from tests.runtime.server.live import live, make_service, wait_until


def test_ready_after_the_self_test() -> None:
    go_on = threading.Event()

    def self_test() -> SelfTest:
        assert go_on.wait(20)
        return SelfTest(3, 24, 0.5)

    with live(make_service(self_test=self_test, port=0)) as running, running.client() as client:
        response = client.get("/ready")
        assert response.status_code == 503 and response.headers["retry-after"] == "1"
        assert response.json() == {"ready": False, "draining": False, "self_test": {"status": "running"}}
        assert client.get("/health").status_code == 200, "alive before it is ready"
        go_on.set()
        wait_until(lambda: running.service.current.ready)
        response = client.get("/ready")
        assert response.status_code == 200
        assert response.json()["self_test"] == {"status": "passed", "prompts": 3, "tokens": 24, "seconds": 0.5}


def test_not_ready_after_a_failed_self_test() -> None:
    def self_test() -> SelfTest:
        raise EngineError("self-test", "prompt 1", found="token 5", expected="token 7")

    with live(make_service(self_test=self_test, port=0)) as running, running.client() as client:
        wait_until(lambda: running.service.current.self_test["status"] != "running")
        response = client.get("/ready")
        assert response.status_code == 503
        assert response.json()["self_test"] == {
            "status": "failed",
            "reason": "self-test: prompt 1: found token 5, expected token 7.",
        }


def test_an_engine_without_golden_answers_is_ready_and_says_so() -> None:
    service = make_service(self_test=lambda: SelfTest(0, 0, 0.0, "it has none"), port=0)
    with live(service) as running, running.client() as client:
        wait_until(lambda: service.current.ready)
        state = client.get("/ready").json()
        assert state["ready"] and state["self_test"]["status"] == "absent" and state["self_test"]["reason"] == "it has none"


def test_health_turns_when_the_step_thread_ends() -> None:
    with live() as running, running.client() as client:
        assert client.get("/health").json() == {"status": "alive"}
        running.service.engine.close()
        response = client.get("/health")
        assert response.status_code == 503 and response.json()["status"] == "dead"


def test_metrics_show_what_was_served() -> None:
    with live() as running, running.client() as client:
        list(running.service.engine.generate("hello"))
        response = client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=")
        lines = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))
        labels = '{engine="0",model_name="tiny"}'
        assert float(lines[f"belle:generation_tokens_total{labels}"]) == 12
        assert float(lines["belle:http_connections"]) == 1
        client.get("/health")
        assert 'belle:http_requests_total{handler="/health",method="GET",status="200"} 1.0' in client.get("/metrics").text
