"""Curves as a host gives them, for tests."""

from __future__ import annotations

from typing import Any

from belle_compile.runtime.capacity.curve import Capacity, Latency, Level, describe_host
from belle_compile.runtime.host import usable_cores


def level(users: int, token_ms: float, **changes: Any) -> Level:
    """A level whose tokens take `token_ms` at the 99th percentile."""
    rate = 1e3 * users / token_ms
    values: dict[str, Any] = {
        "users": users, "requests": 50, "seconds": 10.0, "requests_per_s": rate / 64, "tokens_per_s": rate,
        "first_token_s": Latency(0.1 * users, 0.2 * users), "token_s": Latency(0.8e-3 * token_ms, 1e-3 * token_ms),
        "request_s": Latency(1.0, 2.0), "busy": 0.95,
    }  # fmt: skip
    return Level(**values | changes)


def curve(*levels: Level, **changes: Any) -> Capacity:
    """The curve of some engine on this host: 10, 20, 40 and 100 ms a token with 1, 4, 8 and 16 users."""
    values: dict[str, Any] = {
        "engine": "0" * 64, "kernels": "kernels-avx2", "host": describe_host(), "threads": len(usable_cores()),
        "version": "0.1.0", "date": "2026-11-30", "prompt_tokens": 128, "answer_tokens": 64, "prompt_tokens_per_s": 1000.0,
        "levels": levels or tuple(level(users, ms) for users, ms in ((1, 10), (4, 20), (8, 40), (16, 100))),
    }  # fmt: skip
    return Capacity(**values | changes)
