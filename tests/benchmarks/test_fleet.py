"""The simulation of a fleet: single requests by hand, growth with replicas, and what bounds it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from belle_compile.runtime.capacity.curve import Capacity, Latency, Level
from benchmarks.fleet import (
    ANSWER_TOKENS,
    PROMPT_TOKENS,
    Costs,
    Fleet,
    Outcome,
    Request,
    Ring,
    arrivals,
    capacity_of_steps,
    read_trace,
)

FREE = Costs(0.0, 0.0, 0.0)


def level(users: int, per_s: float) -> Level:
    token = Latency(0.01, 0.01)
    return Level(users, 100, 10.0, per_s, per_s * 10, Latency(0.1, 0.1), token, Latency(1, 1), 1.0)


# Alone, 100 tokens of prompt take 0.1 s and 10 of an answer 0.1 s; four users get 10 requests a second.
CAPACITY = Capacity("d", "k", "h", 2, "0", "2026-11-30", 100, 10, 1000.0, (level(1, 5.0), level(2, 8.0), level(4, 10.0)))


def requests(count: int, **same: str) -> list[Request]:
    return [Request(same.get("beginning", f"b{i}"), same.get("request", f"r{i}"), 100, 80, 10) for i in range(count)]


def run(at: Iterable[tuple[float, Request]], costs: Costs = FREE, replicas: int = 1, ingresses: int = 1) -> Outcome:
    return Fleet(CAPACITY, costs, replicas, ingresses, max_requests=4).run(list(at))


def test_a_request_alone_takes_its_prompt_and_its_answer() -> None:
    (request,) = requests(1)
    assert run([(1.0, request)]).p50_s == pytest.approx(0.2)
    assert run([(1.0, request)], Costs(0.3, 0.01, 0.05)).p50_s == pytest.approx(0.2 + 0.3 + 0.1 + 0.05)


def test_two_requests_share_the_throughput_of_two_users() -> None:
    outcome = run((1.0, request) for request in requests(2))
    assert outcome.p50_s == outcome.p99_s == pytest.approx(2 / 8.0)


def test_what_was_seen_costs_nothing() -> None:
    first, second = requests(2, beginning="b")
    alone = run([(1.0, first), (2.0, second)])
    assert alone.prefix_share == 0.4 and alone.p50_s in (pytest.approx(0.2), pytest.approx(0.12))
    again = run([(1.0, first), (2.0, first)])
    assert again.hit_share == 0.5 and again.p50_s == pytest.approx(0.2)


def test_full_replicas_pass_requests_on() -> None:
    same = requests(8, beginning="b")
    assert run(((1.0, request) for request in same), replicas=2).p99_s < run((1.0, request) for request in same).p99_s
    assert len(set(Ring(5).walk("key"))) == 5


def test_throughput_grows_with_replicas_until_the_entrance_is_busy() -> None:
    trace = requests(50)

    def at_load(replicas: int, costs: Costs, ingresses: int = 1) -> Outcome:
        return run(arrivals(trace, 8.0 * replicas, 60, shared=False), costs, replicas, ingresses)

    alone, ten = at_load(1, FREE), at_load(10, FREE)
    assert ten.ended_per_s == pytest.approx(10 * alone.ended_per_s, rel=0.1)
    bound = at_load(10, Costs(1 / 20, 0.0, 0.0))
    assert bound.ended_per_s == pytest.approx(20, rel=0.05) and bound.entrance_busy > 0.95
    assert at_load(10, Costs(1 / 20, 0.0, 0.0), ingresses=8).ended_per_s == pytest.approx(ten.ended_per_s, rel=0.05)
    redis = at_load(10, Costs(0.0, 0.0, 1 / 40))
    assert redis.ended_per_s < 25 and redis.redis_busy > 0.95


def test_a_curve_follows_from_step_times() -> None:
    path = Path(__file__).parents[2] / "benchmarks/results/speed-llama-1b.json"
    capacity = capacity_of_steps(path, "avx512vnni")
    assert [level.users for level in capacity.levels] == [1, 8]
    alone = PROMPT_TOKENS / capacity.prompt_tokens_per_s + ANSWER_TOKENS * capacity.levels[0].token_s.p50
    assert capacity.levels[0].requests_per_s == pytest.approx(1 / alone) and capacity.levels[1].requests_per_s > 1 / alone


def test_a_trace_is_read_or_made_of_questions(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"beginning": "b", "request": "r", "prompt_tokens": 5, "shared_tokens": 2, "answer_tokens": 3}\n')
    assert read_trace(path) == [Request("b", "r", 5, 2, 3)]
    path.write_text('{"question": "one"}\n{"question": "two"}\n')
    counts = [sum(request.request == number for request in read_trace(path)) for number in ("0", "1")]
    assert counts[0] > counts[1] > 0
