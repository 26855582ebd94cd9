"""What an entrance of belle-run scale-out and Redis take of a processor, for benchmarks/fleet.py.

    python -m benchmarks.scale_out_costs ENGINE [--out benchmarks/results/scale-out-costs.json]

Needs the extra `ray` and redis-server. A Ray cluster on this host serves one replica. Processor times of Ray's HTTP proxy and
of the entrance are read before and after requests for one token, and streams of 64; the one that takes more counts, since
they are processes of their own. Redis gets and sets entries of 2 KiB. Processor time depends little on what else runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import machine

REQUESTS, ROUND_TRIPS, ENTRY = 100, 5000, b"x" * 2048
PORT, TOKENS = 18765, 64


def processor_s(pid: int) -> float:
    """The seconds of processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def named(part: str) -> int:
    """The one process whose command line has `part`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and part in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    (pid,) = found
    return pid


def taken(pid: int, times: int, work: Callable[[], None]) -> float:
    """Processor time of a process for each time that `work` is done."""
    before = processor_s(pid)
    for _ in range(times):
        work()
    return (processor_s(pid) - before) / times


def ask(stream: bool, tokens: int) -> None:
    """Send one request and read its answer."""
    body = {"prompt": "a", "max_tokens": tokens, "ignore_eos": True, "stream": stream}
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
        response.read()


def measure_entrance(engine: Path) -> dict[str, float]:
    """Costs of the proxy and the entrance; the dearer one's under the names of `fleet.Costs`."""
    import ray
    from ray import serve

    from belle_compile.runtime.scale_out.application import app

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(app({"engine": str(engine.absolute()), "serve": ["--result-cache", "none", "--no-access-log"]}), name="belle")
        ask(True, TOKENS)
        costs: dict[str, float] = {}
        for name, process in (("proxy", "ray::ProxyActor"), ("ingress", "ray::ServeReplica:belle:ingress")):
            pid = named(process)
            whole = taken(pid, REQUESTS, lambda: ask(False, 1))
            stream = taken(pid, REQUESTS, lambda: ask(True, TOKENS))
            costs |= {f"{name}_request_s": whole, f"{name}_piece_s": max(stream - whole, 0.0) / TOKENS}
        dearer = max(("proxy", "ingress"), key=lambda name: costs[f"{name}_request_s"])
        return costs | {f"entrance_{part}_s": costs[f"{dearer}_{part}_s"] for part in ("request", "piece")}
    finally:
        serve.shutdown()
        ray.shutdown()


def measure_redis() -> float:
    """Seconds of Redis's processor for a round trip, half of which set an entry."""
    import redis

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/socket"
        server = subprocess.Popen(
            ["redis-server", "--port", "0", "--unixsocket", path, "--save", ""], stdout=subprocess.DEVNULL
        )
        try:
            while not os.path.exists(path):
                time.sleep(0.05)
            client: Any = redis.Redis(unix_socket_path=path)

            def turn() -> None:
                client.set("key", ENTRY, ex=60)
                client.get("key")

            return taken(server.pid, ROUND_TRIPS, turn) / 2
        finally:
            server.terminate()
            server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scale-out-costs.json"))
    given = parser.parse_args()
    costs = measure_entrance(given.engine) | {"redis_s": measure_redis()}
    given.out.write_text(json.dumps({"machine": machine.describe(), **costs}, indent=2) + "\n")
    print(json.dumps(costs, indent=2))


if __name__ == "__main__":
    main()
