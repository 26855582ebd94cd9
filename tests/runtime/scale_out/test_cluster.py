"""Replicas on two nodes of a Ray cluster on this host: who answers, what a killed process loses, another engine under load."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

ray = pytest.importorskip("ray", reason="no ray")
pytest.importorskip("tvm", reason="no build extra")

from ray import serve  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from tests.runtime import ranked  # noqa: E402

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[3]
OBJECTS = {"object_store_memory": 100 << 20}
HOSTS = ("127.0.0.2", "127.0.0.3")  # Ray takes 127.0.0.1 for the address of the host outside
WAIT_S = 240.0  # the longest that a test waits for anything, on a busy host
PROMPTS = [f"prompt {number}: " for number in range(24)]


@dataclass
class Deployed:
    """A cluster with an application, and the engines that it is given."""

    address: str
    client: httpx.Client
    first: Path
    second: Path

    def deploy(self, engine: Path, *options: str) -> None:
        """Run belle-run scale-out until the application runs."""
        done = self.try_deploy(engine, *options)
        assert done.returncode == 0, done.stderr[-3000:]

    def try_deploy(self, engine: Path, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "belle_compile.runtime", "scale-out", str(engine), "--address", self.address]
        serve_options = ["--", "--result-cache", "none", "--drain-timeout", "20", "--no-access-log"]
        return subprocess.run(
            [*command, "--cpus", "0.8", *options, *serve_options], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S
        )

    def ask(self, prompt: str, timeout: float = WAIT_S, **fields: Any) -> httpx.Response:
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 8, **fields}
        return self.client.post("/v1/completions", json=body, timeout=timeout)

    def servers(self) -> list[int]:
        """The process numbers of the servers of replicas."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
                if b"--uds" in line and str(self.first.parent).encode() in b" ".join(line) and b"-I" not in line:
                    found.append(int(entry.name))
        return sorted(found)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    root = tmp_path_factory.mktemp("scale-out")
    first, second = ranked.build(root / "first", 1), ranked.build(root / "second", 1, seed=1)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    cluster = Cluster(
        initialize_head=True, head_node_args=OBJECTS | {"num_cpus": 1, "include_dashboard": False, "node_ip_address": HOSTS[0]}
    )
    try:
        cluster.add_node(**OBJECTS, num_cpus=2, node_ip_address=HOSTS[1])
        ray.init(address=cluster.address, log_to_driver=False)
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S, trust_env=False) as client:
            deployed = Deployed(cluster.address, client, first, second)
            deployed.deploy(first, "--replicas", "2")
            yield deployed
        serve.shutdown()
    finally:
        ray.shutdown()
        cluster.shutdown()
    wait_until(lambda: deployed.servers() == [])


def replicas_of(responses: Sequence[httpx.Response]) -> list[str]:
    return [response.headers["X-Replica"] for response in responses]


def test_prompts_that_begin_alike_have_one_replica(deployed: Deployed) -> None:
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    assert deployed.client.get("/ready").status_code == 200
    assert deployed.client.get("/metrics").status_code == 404
    responses = [[deployed.ask(prompt, user=user) for prompt in PROMPTS] for user in ("a", "b")]
    assert {response.status_code for several in responses for response in several} == {200}
    assert replicas_of(responses[0]) == replicas_of(responses[1])
    assert len(set(replicas_of(responses[0]))) == 2, "prompts are spread over both"


def test_answers_are_the_engines_own(deployed: Deployed) -> None:
    from belle_compile.runtime import Engine, SamplingParams

    with Engine.load(deployed.first) as engine:
        expected = [
            result.text for result in engine.generate(PROMPTS[:4], SamplingParams(temperature=0, max_new_tokens=8), raw=True)
        ]
    assert [deployed.ask(prompt).json()["choices"][0]["text"] for prompt in PROMPTS[:4]] == expected
    with deployed.client.stream(
        "POST", "/v1/completions", json={"prompt": PROMPTS[0], "temperature": 0, "max_tokens": 8, "stream": True}
    ) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == expected[0]


def test_a_killed_server_loses_only_its_own_requests(deployed: Deployed) -> None:
    before = deployed.servers()
    assert len(before) == 2
    killed = before[0]
    os.kill(killed, signal.SIGSTOP)  # so that its requests are under way when it is killed
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        under_way = [pool.submit(deployed.ask, prompt) for prompt in PROMPTS]
        time.sleep(3)
        wait_until(lambda: any(future.done() for future in under_way))
        os.kill(killed, signal.SIGKILL)
        responses = [future.result(timeout=WAIT_S) for future in under_way]
        # What comes while the replica is replaced goes to the other one.
        later = list(pool.map(deployed.ask, PROMPTS))
    codes = [response.json()["error"]["code"] for response in responses if response.status_code != 200]
    assert 0 < len(codes) < len(PROMPTS) and set(codes) == {"replica_lost"}
    assert {response.status_code for response in responses} == {200, 503}
    assert {response.status_code for response in later} == {200}
    wait_until(lambda: len(deployed.servers()) == 2 and killed not in deployed.servers())
    wait_until(lambda: len(set(replicas_of([deployed.ask(prompt) for prompt in PROMPTS]))) == 2)


def test_a_client_that_goes_takes_its_request_along(deployed: Deployed) -> None:
    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs/serve"
    stopped = deployed.servers()[0]
    os.kill(stopped, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            gone = [pool.submit(deployed.ask, prompt, timeout=1.0) for prompt in PROMPTS]
            errors = [future.exception(timeout=WAIT_S) for future in gone]
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert any(isinstance(error, httpx.ReadTimeout) for error in errors)
    wait_until(lambda: any("CALL forward CANCELLED" in log.read_text() for log in logs.glob("replica_belle_replicas_*.log")))
    wait_until(lambda: {deployed.ask(prompt).status_code for prompt in PROMPTS} == {200})


def test_an_engine_that_does_not_load_changes_nothing(deployed: Deployed) -> None:
    before = deployed.servers()
    done = deployed.try_deploy(deployed.first.parent / "missing", "--replicas", "2")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("belle-run: scale-out: the replicas cannot be started: found ")
    assert deployed.servers() == before
    assert {deployed.ask(prompt).status_code for prompt in PROMPTS} == {200}


def test_another_engine_replaces_one_without_a_lost_request(deployed: Deployed) -> None:
    old = deployed.ask(PROMPTS[0]).json()["choices"][0]["text"]
    ended, responses = threading.Event(), []

    def ask_until_ended() -> None:
        while not ended.is_set():
            responses.append(deployed.ask(PROMPTS[0]))

    with ThreadPoolExecutor(3) as pool:
        askers = [pool.submit(ask_until_ended) for _ in range(3)]
        try:
            # A target that every wait exceeds: with requests all the time there are soon as many replicas as there may be.
            deployed.deploy(
                deployed.second, "--replicas", "1-2", "--target-queue-time", "0.0000001", "--upscale-delay", "0",
            )  # fmt: skip
            wait_until(lambda: responses[-1].json()["choices"][0]["text"] != old)
            wait_until(lambda: len(deployed.servers()) == 2)
        finally:
            ended.set()
        for asker in askers:
            asker.result(timeout=WAIT_S)
    assert {response.status_code for response in responses} == {200}
    texts = {response.json()["choices"][0]["text"] for response in responses}
    assert len(texts) == 2 and old in texts, "each answer is one engine's, whole"
