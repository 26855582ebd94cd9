"""How the server starts and ends."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.server import connections
from belle_compile.runtime.server.options import ServerOptions
from belle_compile.runtime.server.serve import allow_connections, bind, check_certificate
from tests.runtime.server.live import WAIT_S, Live, live, read_all, wait_until, write
from tests.runtime.server.test_connections import response_of

ROOT = Path(__file__).parents[3]


@contextlib.contextmanager
def posting(client: httpx.Client, path: str) -> Iterator[list[httpx.Response]]:
    """Send a request on another thread; its response is in the list after the block."""
    responses: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: responses.append(client.post(path)))
    thread.start()
    yield responses
    thread.join(WAIT_S)


def drained(running: Live) -> None:
    running.thread.join(WAIT_S)
    assert not running.thread.is_alive()


def test_draining_answers_what_was_accepted_and_refuses_the_rest() -> None:
    with live() as running, running.client() as client, posting(client, "/v1/wait") as responses:
        assert running.app.state.waiting.acquire(timeout=WAIT_S)
        running.call(running.server.drain)
        wait_until(lambda: running.service.draining)
        ready = client.get("/ready")
        assert ready.status_code == 503 and ready.json()["draining"] is True
        refused = client.post("/v1/echo/a")
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        running.app.state.go_on.set()
        drained(running)
    assert [response.status_code for response in responses] == [200] and running.server.exit_code == 0


def test_a_request_whose_body_is_under_way_is_accepted() -> None:
    with live() as running, running.connect() as connection:
        connection.sendall(b"POST /v1/echo/a HTTP/1.1\r\nHost: test\r\nContent-Length: 6\r\n\r\nabc")
        wait_until(lambda: bool(running.server.server_state.tasks))
        running.call(running.server.drain)
        wait_until(lambda: running.service.draining)
        connection.sendall(b"def")
        status, headers, body = response_of(read_all(connection))
        assert status == 200 and json.loads(body)["bytes"] == 6 and headers["connection"] == "close"
        drained(running)
        assert running.server.exit_code == 0


def test_a_request_that_comes_while_the_server_closes_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LAST_REQUEST_S", WAIT_S)
    with live() as running, running.connect() as connection:
        wait_until(lambda: running.service.metrics.connections == 1)
        running.call(running.server.drain)
        wait_until(lambda: not running.server.servers[0].is_serving())
        connection.sendall(b"POST /v1/echo/a HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n")
        assert response_of(read_all(connection))[0] == 503
        drained(running)


def test_requests_that_take_too_long_end_with_an_error() -> None:
    with live(drain_timeout_s=0.1) as running, running.client() as client:
        with posting(client, "/v1/wait") as responses:
            assert running.app.state.waiting.acquire(timeout=WAIT_S)
            running.call(running.server.drain)
        drained(running)
    assert responses[0].status_code == 503 and responses[0].json()["error"]["message"] == "The engine is closed."
    assert running.server.exit_code == 1


def test_no_request_is_lost_under_load() -> None:
    statuses: list[int] = []
    errors: list[httpx.HTTPError] = []
    served = threading.Semaphore(0)

    def load(running: Live) -> None:
        while True:
            try:
                response = httpx.post(f"http://127.0.0.1:{running.address[1]}/v1/echo/a", timeout=WAIT_S, trust_env=False)
            except httpx.HTTPError as error:
                if not running.server.should_exit:  # else it may not have been accepted
                    errors.append(error)
                return
            assert response.json()
            statuses.append(response.status_code)
            served.release()

    with live() as running:
        threads = [threading.Thread(target=load, args=(running,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            assert served.acquire(timeout=WAIT_S)
        running.call(running.server.drain)
        drained(running)
        for thread in threads:
            thread.join(WAIT_S)
        counts = running.service.metrics.exposition().decode()
    assert errors == [] and set(statuses) <= {200, 503} and statuses.count(200) >= 20
    for status in set(statuses):
        label = f'handler="{"/v1/echo/{name}" if status == 200 else "none"}",method="POST",status="{status}"'
        assert f"belle:http_requests_total{{{label}}} {float(statuses.count(status))}" in counts, "all were answered"


class Process:
    """A server of a fake engine in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "tests.runtime.server.fake_server", "--port", "0", *arguments]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self._process.stdout
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{int(self._process.stdout.readline())}", timeout=WAIT_S, trust_env=False
        )
        wait_until(lambda: self._answers("/ready"))

    def _answers(self, path: str) -> bool:
        with contextlib.suppress(httpx.ConnectError):
            return self.client.get(path).status_code == 200
        return False

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> tuple[int, list[dict[str, Any]]]:
        """Wait for the end; returns the exit code and the lines of the log."""
        _, log = self._process.communicate(timeout=WAIT_S)
        return self._process.returncode, [json.loads(line) for line in log.splitlines()]

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._process.kill()
        self._process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(number: signal.Signals) -> None:
    with Process() as process:
        with posting(process.client, "/v1/wait") as responses:
            wait_until(lambda: waits(process))
            process.signal(number)
            wait_until(lambda: process.client.get("/ready").status_code == 503)
            assert process.client.post("/v1/echo/a").status_code == 503
            process.client.get("/go-on")
        code, log = process.end()
    assert [response.status_code for response in responses] == [200] and code == 0
    messages = [line["message"] for line in log]
    assert messages.index("listening") < messages.index("draining") and {line["level"] for line in log} <= {
        "info",
        "warning",
        "error",
    }


def waits(process: Process) -> bool:
    return bool(process.client.get("/waiting").json()["waiting"])


def test_a_second_signal_ends_at_once() -> None:
    with Process() as process:
        with posting_that_fails(process.client, "/v1/wait"):
            wait_until(lambda: waits(process))
            process.signal(signal.SIGTERM)
            wait_until(lambda: process.client.get("/ready").status_code == 503)
            process.signal(signal.SIGTERM)
            code, log = process.end()
    assert code == 128 + signal.SIGTERM and log[-1]["message"] == "ended by a second signal" and log[-1]["requests"] >= 1


@contextlib.contextmanager
def posting_that_fails(client: httpx.Client, path: str) -> Iterator[None]:
    def post() -> None:
        with contextlib.suppress(httpx.HTTPError):
            client.post(path)

    thread = threading.Thread(target=post)
    thread.start()
    yield
    thread.join(WAIT_S)


def test_sighup_reads_the_keys_again(tmp_path: Path) -> None:
    path = write(tmp_path / "keys.json", json.dumps({"keys": [{"name": "ann", "key": "sk-ann"}]}))
    bob = {"Authorization": "Bearer sk-bob"}
    with Process("--api-key-file", str(path)) as process:
        assert process.client.post("/v1/echo/a", headers=bob).status_code == 401
        write(path, json.dumps({"keys": [{"name": "bob", "key": "sk-bob"}]}))
        process.signal(signal.SIGHUP)
        wait_until(lambda: process.client.post("/v1/echo/a", headers=bob).status_code == 200)
        write(path, "{")
        process.signal(signal.SIGHUP)
        process.signal(signal.SIGTERM)
        code, log = process.end()
    assert code == 0
    (kept,) = (line for line in log if line["message"] == "API keys stay as they were")
    assert kept["level"] == "error" and str(path) in kept["error"]


def test_https(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    subprocess.run([*command, "-keyout", key, "-out", certificate, *subject], check=True, capture_output=True)
    with live(ssl_certfile=certificate, ssl_keyfile=key) as running:
        context = ssl.create_default_context(cafile=str(certificate))
        url = f"https://127.0.0.1:{running.address[1]}"
        with httpx.Client(base_url=url, verify=context, timeout=WAIT_S, trust_env=False) as client:
            assert client.get("/").text == "page"


def test_a_certificate_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(
        EngineError, match=r"cannot load .*absent\.pem: found No such file or directory, expected a certificate"
    ):
        check_certificate(ServerOptions(ssl_certfile=tmp_path / "absent.pem"))
    with pytest.raises(EngineError, match="expected a certificate chain and its key in PEM"):
        check_certificate(ServerOptions(ssl_certfile=write(tmp_path / "bad.pem", "no certificate")))


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=f"cannot listen on 127.0.0.1 port {port}: found Address already in use; choose"):
            bind(ServerOptions(port=port))


def test_a_host_that_is_none() -> None:
    with pytest.raises(EngineError, match=r"cannot listen on .no\.such\.host\.invalid.: found "):
        bind(ServerOptions(host="no.such.host.invalid"))


def test_the_limit_of_files_is_raised_for_the_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"now": (256, 1000)}
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, value: limits.update(now=value))
    assert allow_connections(500) == 500 and limits["now"] == (756, 1000)
    assert allow_connections(4096) == 744 and limits["now"] == (1000, 1000), "as many as the hard limit allows"
    limits["now"] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert allow_connections(4096) == 4096


def test_addresses_of_proxies_are_believed_only_if_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for trusted, expected in (((), "127.0.0.1"), (("127.0.0.1",), "192.0.2.9")):
        with live(forwarded_allow_ips=trusted) as running, running.client() as client:
            client.get("/", headers={"X-Forwarded-For": "192.0.2.9"})
        seen = [getattr(record, "fields")["client"] for record in caplog.records if record.message == "request"]  # noqa: B009
        assert seen[-1] == expected


def test_behind_a_proxy_under_a_path() -> None:
    with live(root_path="/belle", api_keys=("sk-1",)) as running, running.client() as client:
        assert client.get("/").text == "page", "what the proxy strips"
        assert client.post("/v1/echo/a").status_code == 401
        wait_until(lambda: client.get("/ready").status_code == 200)
