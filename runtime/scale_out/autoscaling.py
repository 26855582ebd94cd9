"""From the time that requests wait in replicas to the number of replicas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

# Ray's controller gets this file by value, without the package, so it imports nothing of it.
QUEUE_TIME = "queue_time_s"  # what a replica reports
_MOST_GROWTH = 2.0  # times the replicas that there are
_IDLE_SHARE = 0.25  # of the target: below it a replica may go
_BUSY_SHARE = 0.5  # of the requests that the remaining replicas can take, which those under way must not exceed


class Context(Protocol):
    """What the policy reads of Ray's `AutoscalingContext`."""

    current_num_replicas: int

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None: ...
    @property
    def total_num_requests(self) -> float: ...
    @property
    def total_queued_requests(self) -> float | None: ...


class QueueTimePolicy:
    """Keeps the mean queue time of the replicas below a target.

    Above it, replicas grow by its ratio to the target, by one at least and to the double at most; so they do by one while
    requests wait outside of replicas, which then all have `max_requests`. One is taken away where the time is below a quarter
    of the target and the others would have at most half of the requests that they can have. Bounds and delays are Ray's.
    """

    def __init__(self, target_s: float, max_requests: int) -> None:
        self._target_s, self._max_requests = target_s, max_requests

    def __call__(self, context: Context) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas that there should be, and no state."""
        replicas = context.current_num_replicas
        if replicas == 0:
            return 1, {}
        times = list((context.aggregated_metrics or {}).get(QUEUE_TIME, {}).values())
        mean_s = sum(times) / len(times) if times else 0.0
        if mean_s > self._target_s:
            growth = min(mean_s / self._target_s, _MOST_GROWTH)
            return max(replicas + 1, math.ceil(replicas * growth)), {}
        if (context.total_queued_requests or 0) >= 1:
            return replicas + 1, {}
        room = (replicas - 1) * self._max_requests * _BUSY_SHARE
        if times and mean_s < self._target_s * _IDLE_SHARE and context.total_num_requests <= room:
            return replicas - 1 or 1, {}
        return replicas, {}


@dataclass
class QueueTimes:
    """The mean queue time of the requests that ended between two readings of a server's /metrics."""

    total_s: float = 0.0
    requests: float = 0.0
    last_s: float = 0.0

    def update(self, total_s: float, requests: float, waiting: float) -> float:
        """Return the mean in seconds. Where no request has ended it is 0, or the one before while requests still wait."""
        ended = requests - self.requests
        if ended > 0:
            self.last_s = max(total_s - self.total_s, 0.0) / ended
        elif waiting == 0:
            self.last_s = 0.0
        self.total_s, self.requests = total_s, requests
        return self.last_s
