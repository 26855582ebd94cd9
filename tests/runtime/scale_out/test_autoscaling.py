"""The number of replicas by queue time."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from belle_compile.runtime.scale_out.autoscaling import QUEUE_TIME, QueueTimePolicy, QueueTimes


@dataclass
class Context:
    current_num_replicas: int
    aggregated_metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    total_num_requests: float = 0.0
    total_queued_requests: float | None = None


def replicas(current: int, *times: float, requests: float = 0.0, queued: float | None = None) -> int:
    metrics = {QUEUE_TIME: {str(number): time for number, time in enumerate(times)}}
    return QueueTimePolicy(target_s=1.0, max_requests=10)(Context(current, metrics, requests, queued))[0]


@pytest.mark.parametrize(
    ("current", "times", "expected"),
    [(1, (1.1,), 2), (4, (1.0, 1.0, 1.0, 1.0), 4), (4, (1.5, 1.5, 1.5, 1.5), 6), (4, (100.0, 0, 0, 0), 8), (8, (0.9, 0.9), 8)],
)
def test_replicas_grow_by_the_ratio_to_the_target(current: int, times: tuple[float, ...], expected: int) -> None:
    assert replicas(current, *times, requests=80) == expected


def test_requests_that_wait_outside_ask_for_one_more() -> None:
    assert replicas(2, 0.0, 0.0, requests=20, queued=3) == 3


def test_an_idle_replica_goes_where_the_others_have_room() -> None:
    assert replicas(3, 0.0, 0.0, 0.0, requests=10) == 2
    assert replicas(3, 0.0, 0.0, 0.0, requests=11) == 3, "two would have more than half of 20 requests"
    assert replicas(3, 0.3, 0.3, 0.3, requests=0) == 3
    assert replicas(1, 0.0) == 1
    assert replicas(3) == 3, "no replica has reported anything"


def test_queue_times_are_means_between_readings() -> None:
    times = QueueTimes()
    assert times.update(total_s=6.0, requests=3, waiting=0) == 2.0
    assert times.update(total_s=7.0, requests=5, waiting=4) == 0.5
    assert times.update(total_s=7.0, requests=5, waiting=4) == 0.5, "none has ended, but they still wait"
    assert times.update(total_s=7.0, requests=5, waiting=0) == 0.0
