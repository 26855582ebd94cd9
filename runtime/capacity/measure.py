"""Measures the curve of a loaded engine: closed loops of more and more users, each with a share of the time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from belle_compile import __version__
from belle_compile.runtime.capacity.curve import STAGE, Capacity, Latency, Level, describe_host
from belle_compile.runtime.engine import Engine
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.request import SamplingParams
from belle_compile.runtime.serving.telemetry import RequestRecord, StepRecord

_PROMPT_SHARE = 0.1  # of the time in which prompts alone are computed
_LEAST_REQUESTS = 3  # that must end at a level beside the first answers
_SEED = 20261130


@dataclass(frozen=True)
class Plan:
    """What is measured: prompts of `prompt_tokens` random tokens, answered greedily with `answer_tokens`, for `seconds` in all,
    by up to `most_users` at a time (None: as many as the engine runs)."""

    seconds: float = 120.0
    prompt_tokens: int = 128
    answer_tokens: int = 64
    most_users: int | None = None


class Watch:
    """Keeps what an engine reports while it is measured; the engine's `telemetry`."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.requests: list[RequestRecord] = []

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def ended(self, record: RequestRecord) -> None:
        self.requests.append(record)

    def clear(self) -> None:
        """Forget what was kept."""
        self.steps, self.requests = [], []


def measure(
    engine: Engine, watch: Watch, threads: int, plan: Plan, on_level: Callable[[Level], None] = lambda level: None
) -> Capacity:
    """Return the curve of an engine that reports to `watch` and computes with so many threads; `on_level` is called with each
    level.

    Each user sends its next request once the last one was answered. The first answers of all are of different lengths, so that
    they do not end together, and do not count. Levels double the users. The curve ends before a level at which fewer requests
    than users have ended after that. Raises `EngineError` where the first level does not fit into the time either, or
    prompts and answers into the engine's context.
    """
    if plan.prompt_tokens + plan.answer_tokens > engine.max_context:
        found = f"{plan.prompt_tokens} and {plan.answer_tokens} tokens"
        raise EngineError(STAGE, "prompt and answer are too long", found=found, expected=f"{engine.max_context} together")
    users = list(_users(engine, plan.most_users))
    prompts = _Prompts(engine.executor.vocab_size, plan.prompt_tokens)
    prompt_rate = _prompt_rate(engine, watch, prompts, plan.seconds * _PROMPT_SHARE)
    slot = plan.seconds * (1 - _PROMPT_SHARE) / len(users)
    levels: list[Level] = []
    for count in users:
        level = asyncio.run(_Loop(engine, watch, prompts, plan.answer_tokens, count).run(slot))
        if level is None:
            break
        levels.append(level)
        on_level(level)
    if not levels:
        found = f"fewer than {_LEAST_REQUESTS} requests of one user in {slot:.1f} s"
        raise EngineError(STAGE, "the time is too short", found=found, remedy="give more seconds, or shorter answers")
    return Capacity(
        engine.identity.digest, engine.identity.kernels, describe_host(), threads, __version__,
        time.strftime("%Y-%m-%d", time.gmtime()), plan.prompt_tokens, plan.answer_tokens, prompt_rate, tuple(levels),
    )  # fmt: skip


def _users(engine: Engine, most: int | None) -> Iterator[int]:
    """1, 2, 4 and so on, up to the answers that the engine generates at a time, those themselves last."""
    most = min(engine.most_sequences, most or engine.most_sequences)
    users = 1
    while users < most:
        yield users
        users *= 2
    yield most


class _Prompts:
    """Random prompts, all different, so that no prefix of one is cached."""

    def __init__(self, vocab_size: int, tokens: int) -> None:
        self._random, self._vocab_size, self._tokens = np.random.default_rng(_SEED), vocab_size, tokens

    def next(self) -> list[int]:
        return [int(token) for token in self._random.integers(0, self._vocab_size, self._tokens)]


def _prompt_rate(engine: Engine, watch: Watch, prompts: _Prompts, seconds: float) -> float:
    """Tokens of prompts a second in steps that compute nothing else; at least one prompt is computed after a first one."""
    params = _params(1)
    engine.generate(prompts.next(), params, raw=True)
    watch.clear()
    end = time.monotonic() + seconds
    while True:
        engine.generate(prompts.next(), params, raw=True)
        if time.monotonic() >= end:
            break
    return sum(step.tokens for step in watch.steps) / sum(step.seconds for step in watch.steps)


class _Loop:
    """A closed loop of so many users."""

    def __init__(self, engine: Engine, watch: Watch, prompts: _Prompts, answer_tokens: int, users: int) -> None:
        self._engine, self._watch, self._prompts = engine, watch, prompts
        self._answer_tokens, self._users = answer_tokens, users
        self._warm = asyncio.Event()  # set once every user has had its first answer
        self._cold = users

    async def run(self, seconds: float) -> Level | None:
        """Run for so long; returns what was measured after the first answers, None where too few requests have ended then."""
        end = time.monotonic() + seconds
        users = [asyncio.create_task(self._user(number)) for number in range(self._users)]
        try:
            await self._until(users, self._warm.wait(), end)
            self._watch.clear()
            started, before = time.monotonic(), self._engine.stats().generated_tokens
            await self._until(users, asyncio.sleep(max(0.0, end - started)), end)
            elapsed, tokens = time.monotonic() - started, self._engine.stats().generated_tokens - before
            return self._level(elapsed, tokens) if self._warm.is_set() else None
        finally:
            for task in users:
                task.cancel()
            await asyncio.gather(*users, return_exceptions=True)

    async def _until(self, users: list[asyncio.Task[None]], event: Coroutine[Any, Any, Any], end: float) -> None:
        """Wait for an event, at most until `end`; raises the error of a user that fails."""
        waiting = asyncio.ensure_future(event)
        try:
            timeout = max(0.0, end - time.monotonic())
            await asyncio.wait({waiting, *users}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        for task in users:
            if task.done():
                task.result()

    async def _user(self, number: int) -> None:
        first = max(1, self._answer_tokens * (number + 1) // self._users)
        await self._engine.agenerate(self._prompts.next(), _params(first), raw=True)
        self._cold -= 1
        if not self._cold:
            self._warm.set()
        while True:
            await self._engine.agenerate(self._prompts.next(), _params(self._answer_tokens), raw=True)

    def _level(self, elapsed: float, tokens: int) -> Level | None:
        requests = [record for record in self._watch.requests if record.end == "length"]
        if len(requests) < max(_LEAST_REQUESTS, self._users):
            return None
        rate = tokens / elapsed
        return Level(
            self._users, len(requests), elapsed, rate / self._answer_tokens, rate,
            _latency([record.first_token_s for record in requests]),
            _latency([record.decode_s / max(1, record.generated_tokens - 1) for record in requests]),
            _latency([record.total_s for record in requests]),
            min(1.0, sum(step.seconds for step in self._watch.steps) / elapsed),
        )  # fmt: skip


def _latency(seconds: list[float]) -> Latency:
    p50, p99 = np.percentile(seconds, (50, 99))
    return Latency(float(p50), float(p99))


def _params(answer_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=answer_tokens, ignore_eos=True)
