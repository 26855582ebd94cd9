"""A simulation of replicas behind one entrance with a shared result cache: throughput from 1 to 1,000 replicas.

    python -m benchmarks.fleet CAPACITY TRACE [--costs benchmarks/results/scale-out-costs.json] [--ingresses 1] [--load 0.8]

CAPACITY is what belle-run benchmark measured on a host, or step times of benchmarks/speed.py (speed-*.json, with --isa). TRACE
has a JSON object a line with the fields of `Request`, or with a `question` each, which is then asked by Zipf's law. It is
repeated as often as needed, with new beginnings and requests each time unless --shared. Requests arrive at random, at `load`
times what the replicas could do without caches. --costs are the seconds that an entrance takes for a request and for a piece of
a stream, and Redis for a round trip (benchmarks/scale_out_costs.py). It prints a table, and who is busy most.

What is modelled: entrances and Redis serve one after another; keys choose replicas on a ring with the entrance's own rule, full
replicas pass requests on; a replica divides what it does among the answers that it generates, at the measured throughput of
their number; the tokens of a beginning that the replica has seen cost nothing. The network takes no time.
"""

from __future__ import annotations

import argparse
import bisect
import hashlib
import heapq
import itertools
import json
import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from belle_compile.runtime.capacity.curve import Capacity, Latency, Level, read_capacity
from belle_compile.runtime.scale_out.options import ScaleOutOptions
from benchmarks.result_cache import EXPONENT as ZIPF_EXPONENT
from benchmarks.result_cache import REQUESTS as ZIPF_REQUESTS
from benchmarks.result_cache import trace as zipf_trace

REPLICAS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
SIMULATED_S = 60.0
PROMPT_TOKENS, ANSWER_TOKENS, SYSTEM_TOKENS = 128, 64, 32  # of requests where step times and questions are given
VIRTUAL_NODES = 100  # a replica, as in Ray's router


@dataclass(frozen=True)
class Request:
    """A request of the trace. Those with one `beginning` share their first `shared_tokens`; equal `request` are the same."""

    beginning: str
    request: str
    prompt_tokens: int
    shared_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Costs:
    """Seconds of an entrance's processor for a request and for a piece of a stream, and of Redis for a round trip."""

    entrance_request_s: float
    entrance_piece_s: float
    redis_s: float


@dataclass
class Station:
    """Servers that take one after another, each the next one in the line."""

    servers: int
    busy_s: float = 0.0
    _free: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._free = [0.0] * self.servers

    def end_of(self, now: float, seconds: float) -> float:
        """Return when something that arrives now and takes so many seconds is done."""
        end = max(now, heapq.heappop(self._free)) + seconds
        heapq.heappush(self._free, end)
        self.busy_s += seconds
        return end


@dataclass
class Job:
    """A request under way."""

    request: Request
    arrived: float
    work: float = 0.0


class Replica:
    """Answers that share the throughput of an engine; work is in requests of the size that was measured."""

    def __init__(self, capacity: Capacity) -> None:
        self._users = [level.users for level in capacity.levels]
        self._rates = [level.requests_per_s for level in capacity.levels]
        self.slots = self._users[-1]
        self.running: list[tuple[float, int, Job]] = []
        self.queue: deque[Job] = deque()
        self.assigned, self.version = 0, 0
        self.seen: set[str] = set()
        self._done, self._at, self._numbers = 0.0, 0.0, itertools.count()

    def add(self, now: float, job: Job) -> None:
        """Let an answer begin, or wait."""
        self._advance(now)
        if len(self.running) < self.slots:
            heapq.heappush(self.running, (self._done + job.work, next(self._numbers), job))
        else:
            self.queue.append(job)

    def finish(self, now: float) -> Job:
        """End the answer that is next to end."""
        self._advance(now)
        job = heapq.heappop(self.running)[2]
        if self.queue:
            following = self.queue.popleft()
            heapq.heappush(self.running, (self._done + following.work, next(self._numbers), following))
        return job

    def next_end(self) -> float | None:
        """When the next answer ends, if none is added; each call is of a new `version`."""
        self.version += 1
        if not self.running:
            return None
        return self._at + max(self.running[0][0] - self._done, 0.0) / self._rate()

    def _rate(self) -> float:
        """Work a second of each answer."""
        users = len(self.running)
        at = bisect.bisect_left(self._users, users)
        if self._users[at] == users or at == 0:
            return self._rates[at] / max(users, self._users[at])
        low, high = self._users[at - 1], self._users[at]
        share = (users - low) / (high - low)
        return (self._rates[at - 1] + share * (self._rates[at] - self._rates[at - 1])) / users

    def _advance(self, now: float) -> None:
        if self.running:
            self._done += (now - self._at) * self._rate()
        self._at = now


class Ring:
    """Consistent hashing of keys over replicas."""

    def __init__(self, replicas: int) -> None:
        points = sorted((_hash(f"{replica}:{node}"), replica) for replica in range(replicas) for node in range(VIRTUAL_NODES))
        self._hashes, self._replicas = [point[0] for point in points], [point[1] for point in points]

    def walk(self, key: str) -> Iterable[int]:
        """The replicas of a key: its own, then those behind it."""
        start = bisect.bisect_right(self._hashes, _hash(key))
        seen: set[int] = set()
        for offset in range(len(self._hashes)):
            replica = self._replicas[(start + offset) % len(self._hashes)]
            if replica not in seen:
                seen.add(replica)
                yield replica


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Outcome:
    """What a number of replicas did: requests a second that arrived and that ended, the share of requests that the result cache
    answered and of prompt tokens that prefixes had, seconds of requests, and busy shares."""

    replicas: int
    offered_per_s: float
    ended_per_s: float
    hit_share: float
    prefix_share: float
    p50_s: float
    p99_s: float
    entrance_busy: float
    redis_busy: float


class Fleet:
    """One run of the simulation."""

    def __init__(self, capacity: Capacity, costs: Costs, replicas: int, ingresses: int, max_requests: int) -> None:
        self._capacity, self._costs, self._max_requests = capacity, costs, max_requests
        self._replicas = [Replica(capacity) for _ in range(replicas)]
        self._ring, self._entrance, self._redis = Ring(replicas), Station(ingresses), Station(1)
        self._events: list[tuple[float, int, str, Any]] = []
        self._numbers, self._outside = itertools.count(), deque[Job]()
        self._stored: set[str] = set()
        self._hits, self._prefix, self._prompt = 0, 0, 0
        self._seconds: list[float] = []
        token_s = capacity.levels[0].token_s.p50
        self._token_s = token_s
        self._unit_s = capacity.prompt_tokens / capacity.prompt_tokens_per_s + capacity.answer_tokens * token_s

    def run(self, arrivals: Sequence[tuple[float, Request]]) -> Outcome:
        """Serve all requests."""
        for at, request in arrivals:
            self._schedule(at, "arrived", Job(request, at))
        now = 0.0
        while self._events:
            now, _, kind, subject = heapq.heappop(self._events)
            getattr(self, f"_{kind}")(now, subject)
        seconds, offered = sorted(self._seconds), len(arrivals) / arrivals[-1][0]
        return Outcome(
            len(self._replicas), offered, len(seconds) / now, self._hits / len(seconds), self._prefix / max(self._prompt, 1),
            seconds[len(seconds) // 2], seconds[int(len(seconds) * 0.99)],
            self._entrance.busy_s / (now * self._entrance.servers), self._redis.busy_s / now,
        )  # fmt: skip

    def _schedule(self, at: float, kind: str, subject: Any) -> None:
        heapq.heappush(self._events, (at, next(self._numbers), kind, subject))

    def _arrived(self, now: float, job: Job) -> None:
        pieces = job.request.answer_tokens * self._costs.entrance_piece_s
        self._schedule(self._entrance.end_of(now, self._costs.entrance_request_s + pieces), "routed", job)

    def _routed(self, now: float, job: Job) -> None:
        for number in self._ring.walk(job.request.beginning):
            replica = self._replicas[number]
            if replica.assigned < self._max_requests:
                replica.assigned += 1
                self._schedule(self._redis.end_of(now, self._costs.redis_s), "looked_up", (replica, job))
                return
        self._outside.append(job)

    def _looked_up(self, now: float, subject: tuple[Replica, Job]) -> None:
        replica, job = subject
        if job.request.request in self._stored:
            self._hits += 1
            self._leave(now, replica, job)
            return
        request = job.request
        cached = request.shared_tokens if request.beginning in replica.seen else 0
        replica.seen.add(request.beginning)
        self._prefix, self._prompt = self._prefix + cached, self._prompt + request.prompt_tokens
        prompt_s = (request.prompt_tokens - cached) / self._capacity.prompt_tokens_per_s
        job.work = (prompt_s + request.answer_tokens * self._token_s) / self._unit_s
        replica.add(now, job)
        self._plan(replica)

    def _ended(self, now: float, subject: tuple[Replica, int]) -> None:
        replica, version = subject
        if version != replica.version:
            return  # others were added or ended since
        job = replica.finish(now)
        self._redis.end_of(now, self._costs.redis_s)
        self._stored.add(job.request.request)
        self._plan(replica)
        self._leave(now, replica, job)

    def _plan(self, replica: Replica) -> None:
        end = replica.next_end()
        if end is not None:
            self._schedule(end, "ended", (replica, replica.version))

    def _leave(self, now: float, replica: Replica, job: Job) -> None:
        self._seconds.append(now - job.arrived)
        replica.assigned -= 1
        if self._outside:
            self._routed(now, self._outside.popleft())


def capacity_of_steps(path: Path, isa: str) -> Capacity:
    """The curve that follows from measured times of steps and of a prompt, where prompts are computed one after another."""
    measured = json.loads(path.read_text(encoding="utf-8"))
    prompt_per_s = measured["median"]["prefill 512"][isa]["tokens_per_second"]
    levels = []
    for task in ("decode", "decode, batch 8"):
        step_s, users = measured["median"][task][isa]["seconds"], measured["tasks"][task]["batch"]
        round_s = users * PROMPT_TOKENS / prompt_per_s + ANSWER_TOKENS * step_s
        first, token, whole = Latency(0.0, 0.0), Latency(step_s, step_s), Latency(round_s, round_s)
        per_s = users / round_s
        levels.append(Level(users, users, round_s, per_s, per_s * ANSWER_TOKENS, first, token, whole, 1.0))
    host, date = measured["machine"]["processor"], measured["machine"]["date"]
    return Capacity(
        measured["engine"], isa, host, measured["threads"], "", date, PROMPT_TOKENS, ANSWER_TOKENS, prompt_per_s, tuple(levels)
    )


def read_trace(path: Path) -> list[Request]:
    """The requests of a file. Questions are prompts of a token for three bytes, behind a system prompt that all share."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if "question" not in lines[0]:
        return [Request(**line) for line in lines]
    texts = [line["question"] for line in lines]
    tokens = [SYSTEM_TOKENS + len(text.encode()) // 3 for text in texts]
    return [
        Request(str(number), str(number), tokens[number], SYSTEM_TOKENS, ANSWER_TOKENS)
        for number in zipf_trace(len(texts), ZIPF_REQUESTS, ZIPF_EXPONENT)
    ]


def arrivals(trace: Sequence[Request], per_s: float, seconds: float, *, shared: bool) -> list[tuple[float, Request]]:
    """Poisson arrivals of the trace, over and over. Unless `shared`, each round has beginnings and requests of its own."""
    generator, at, result = random.Random(0), 0.0, list[tuple[float, Request]]()
    for number in itertools.count():
        at += generator.expovariate(per_s)
        if at > seconds and result:
            return result
        request, rounds = trace[number % len(trace)], number // len(trace)
        if rounds and not shared:
            name = f"{request.beginning}#{rounds}", f"{request.request}#{rounds}"
            request = Request(*name, request.prompt_tokens, request.shared_tokens, request.answer_tokens)
        result.append((at, request))
    raise AssertionError("the count does not end")


def table(outcomes: Sequence[Outcome]) -> str:
    """A Markdown table."""
    lines = [
        "| replicas | offered/s | ended/s | result hits | prefix tokens | p50 s | p99 s | entrance busy | Redis busy |",
        "|" + "---|" * 9,
    ]
    for o in outcomes:
        lines.append(
            f"| {o.replicas} | {o.offered_per_s:.1f} | {o.ended_per_s:.1f} | {o.hit_share:.0%} | {o.prefix_share:.0%} "
            f"| {o.p50_s:.2f} | {o.p99_s:.2f} | {o.entrance_busy:.1%} | {o.redis_busy:.2%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capacity", type=Path)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--costs", type=Path, default=Path("benchmarks/results/scale-out-costs.json"))
    parser.add_argument("--isa", help="CAPACITY has times of steps, and these are taken")
    parser.add_argument("--ingresses", type=int, default=1)
    parser.add_argument("--load", type=float, default=0.8)
    parser.add_argument("--seconds", type=float, default=SIMULATED_S)
    parser.add_argument("--shared", action="store_true", help="all rounds of the trace have the same requests")
    parser.add_argument("--replicas", type=int, nargs="+", default=REPLICAS)
    given = parser.parse_args()
    capacity = capacity_of_steps(given.capacity, given.isa) if given.isa else read_capacity(given.capacity)
    stored = json.loads(given.costs.read_text())
    costs = Costs(**{name: stored[name] for name in Costs.__dataclass_fields__})
    trace = read_trace(given.trace)
    outcomes = []
    for replicas in given.replicas:
        fleet = Fleet(capacity, costs, replicas, given.ingresses, ScaleOutOptions().max_requests)
        per_s = given.load * replicas * capacity.levels[-1].requests_per_s
        outcomes.append(fleet.run(arrivals(trace, per_s, given.seconds, shared=given.shared)))
    print(table(outcomes))


if __name__ == "__main__":
    main()
