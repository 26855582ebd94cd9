"""A server under mixed load for a long time: memory and descriptors stay flat, no answer is wrong, no request is stuck.

    python -m benchmarks.soak ENGINE --minutes 60 [--rate 4] [--kv-tokens N] [--redis] [--out benchmarks/results/soak.json]

`belle-run serve` runs in a process of its own. This process sends requests of many kinds (`benchmarks.soak_load`) at random
times, `--rate` a second, and has an engine too: it computes each hundredth answer alone and compares it. Every 30 seconds it
notes the server's resident memory, descriptors and threads, and the requests by kind and outcome. The engine is replaced by
itself now and then; with `--redis` the result cache is a Redis server, which is started here and restarted now and then. The
KV cache is small, so that it has been in use to its end before memory is compared: memory that is reserved becomes resident
when it is first written.

The exit status is 1 where a check fails: resident memory within 2% of what it is after the first five minutes, descriptors not
above their number then by more than connections explain, no wrong answer, no request without an end in time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from belle_compile.runtime import Engine
from benchmarks import machine
from benchmarks.servers import Server
from benchmarks.soak_load import ADMIN_KEY, LONGEST_S, Answer, Load, expected_text

SAMPLE_S, SETTLED_S = 30.0, 300.0
MOST_GROWTH = 0.02  # of resident memory after the first five minutes
MOST_DESCRIPTORS = 64  # that connections of the load take more at one moment than at another
SWAP_S, REDIS_S = 420.0, 300.0  # between two replacements of the engine; between two restarts of Redis
CHECKED = 100  # of so many answers one is computed again
_STARTED_S = 60.0


@dataclass(frozen=True)
class Sample:
    """The server at a moment: seconds since the beginning, resident bytes, counts, and the requests so far by outcome."""

    seconds: float
    resident_bytes: int
    descriptors: int
    threads: int
    running: int
    waiting: int
    requests: dict[str, int]


def sample(process: int, seconds: float, stats: dict[str, Any], outcomes: Counter[str]) -> Sample:
    """Look at a process, with the counts of its /stats."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return Sample(
        seconds=round(seconds, 1),
        resident_bytes=int(status["VmRSS"].split()[0]) << 10,
        descriptors=sum(1 for _ in Path(f"/proc/{process}/fd").iterdir()),
        threads=int(status["Threads"]),
        running=stats["running"],
        waiting=stats["waiting"],
        requests=dict(sorted(outcomes.items())),
    )


def faults_of(samples: Sequence[Sample], outcomes: Counter[str], settled_s: float = SETTLED_S) -> list[str]:
    """Return what is wrong, a sentence each."""
    found = [f"{count} requests: {name}" for name, count in sorted(outcomes.items()) if name.endswith((": stuck", ": wrong"))]
    settled = [each for each in samples if each.seconds >= settled_s]
    if not settled:
        return found
    first, last = settled[0], settled[-1]
    growth = last.resident_bytes / first.resident_bytes - 1
    if growth > MOST_GROWTH:
        found.append(
            f"resident memory has grown by {growth:.1%} since {first.seconds:.0f} s, expected at most {MOST_GROWTH:.0%}"
        )
    if last.descriptors > first.descriptors + MOST_DESCRIPTORS:
        found.append(f"{last.descriptors} descriptors are open, {first.descriptors} were at {first.seconds:.0f} s")
    if last.threads > first.threads + 8:  # a thread pool may still grow to its size
        found.append(f"{last.threads} threads run, {first.threads} did at {first.seconds:.0f} s")
    return found


class Redis:
    """A Redis server on a free port, without files, which can be restarted."""

    def __init__(self) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise SystemExit("--redis needs redis-server in the PATH")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._command = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it listens."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        end = time.monotonic() + _STARTED_S
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)
        raise SystemExit("redis-server does not listen")

    def stop(self) -> None:
        """End it without notice, as a crash does."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def redis_of(wanted: bool) -> Iterator[Redis | None]:
    """A running Redis server, where it is `wanted`."""
    redis = Redis() if wanted else None
    try:
        if redis:
            redis.start()
        yield redis
    finally:
        if redis:
            redis.stop()


class Soak:
    """The load on a server, and what is looked at meanwhile."""

    def __init__(self, server: Server, engine: Engine, directory: Path, rate: float, redis: Redis | None) -> None:
        self.samples: list[Sample] = []
        self.outcomes: Counter[str] = Counter()
        self._server, self._engine, self._directory, self._rate, self._redis = server, engine, directory, rate, redis
        self._answers = 0
        self._checks: asyncio.Queue[Answer] = asyncio.Queue()

    async def run(self, seconds: float) -> None:
        """Send requests for so many seconds, wait for the last ones, and look at the server."""
        started = time.monotonic()
        load = Load(self._server.host, self._server.port, self._server.model, random.Random(0))
        beside = [self._repeat(SAMPLE_S, lambda: self._look(started)), self._repeat(SWAP_S, self._swap), self._check_answers()]
        if self._redis:
            beside.append(self._repeat(REDIS_S, self._restart_redis))
        tasks = [asyncio.ensure_future(each) for each in beside]
        under_way: set[asyncio.Task[None]] = set()
        try:
            while time.monotonic() - started < seconds:
                task = asyncio.create_task(self._send(load))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
                await asyncio.sleep(load.random.expovariate(self._rate))
            if under_way:
                await asyncio.wait(under_way, timeout=2 * LONGEST_S)
            await asyncio.wait_for(self._checks.join(), 2 * LONGEST_S)
            await self._look(started)
        finally:
            for each in (*tasks, *under_way):
                each.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:  # a helper that failed leaves the run without what it looks at
            if isinstance(result, Exception):
                raise result

    async def _send(self, load: Load) -> None:
        kind = load.choose()
        try:
            outcome, answer = await asyncio.wait_for(load.send(kind), LONGEST_S)
        except TimeoutError:
            outcome, answer = "stuck", None
        except OSError as error:
            outcome, answer = type(error).__name__, None
        self.outcomes[f"{kind}: {outcome}"] += 1
        if answer:
            self._answers += 1
            if self._answers % CHECKED == 1:
                self._checks.put_nowait(answer)

    async def _check_answers(self) -> None:
        while True:
            answer = await self._checks.get()
            expected = await asyncio.to_thread(expected_text, self._engine, answer)
            outcome = "right" if expected == answer.text else "wrong"
            self.outcomes[f"recomputed: {outcome}"] += 1
            if outcome == "wrong":
                print(f"wrong: {answer.path} {answer.body}: {answer.text!r}, expected {expected!r}", flush=True)
            self._checks.task_done()

    async def _repeat(self, seconds: float, function: Any) -> None:
        while True:
            await asyncio.sleep(seconds)
            await function()

    async def _look(self, started: float) -> None:
        stats = await asyncio.to_thread(self._server.get, "/stats")
        taken = sample(self._server.process, time.monotonic() - started, stats, self.outcomes)
        self.samples.append(taken)
        print(json.dumps(asdict(taken)), flush=True)

    async def _swap(self) -> None:
        load = Load(self._server.host, self._server.port, self._server.model, random.Random(0))
        body = {"path": str(self._directory.resolve())}
        status, _ = await load.post("/admin/engine", body, {"Authorization": f"Bearer {ADMIN_KEY}"})
        self.outcomes[f"engine swap: {status}"] += 1

    async def _restart_redis(self) -> None:
        assert self._redis
        self._redis.stop()
        await asyncio.sleep(2)
        await asyncio.to_thread(self._redis.start)
        self.outcomes["redis: restarted"] += 1


def main() -> None:
    """Run the soak, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=float, default=4, help="requests a second")
    parser.add_argument("--kv-tokens", type=int, default=16_384, help="of the server's KV cache")
    parser.add_argument("--redis", action="store_true", help="let the result cache be a Redis server that is restarted")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with redis_of(options.redis) as redis:
        store = f"redis://127.0.0.1:{redis.port}" if redis else "memory"
        arguments = ("--admin-key", ADMIN_KEY, "--result-cache", store, "--kv-tokens", str(options.kv_tokens))
        with Server(options.engine, *arguments) as server, Engine.load(options.engine, threads=1) as engine:
            soak = Soak(server, engine, options.engine, options.rate, redis)
            asyncio.run(soak.run(60 * options.minutes))
    found = faults_of(soak.samples, soak.outcomes)
    names = ("minutes", "rate", "kv_tokens", "redis")
    facts = {"engine": options.engine.name, **{name: getattr(options, name) for name in names}}
    result = {"machine": machine.describe(), **facts, "faults": found, "samples": [asdict(each) for each in soak.samples]}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({**facts, "requests": dict(sorted(soak.outcomes.items())), "faults": found}, indent=1))
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
