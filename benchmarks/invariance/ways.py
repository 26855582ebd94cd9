"""The ways in which requests are answered, and what of each answer must be the same in all of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from belle_compile.runtime import Engine
from belle_compile.runtime.engine import Result
from belle_compile.runtime.program import BLOCK_SIZE
from belle_compile.runtime.serving.logprobs import TokenLogprob
from belle_compile.runtime.serving.request import Request
from belle_compile.runtime.serving.result_cache.cache import depends_on_request_alone
from belle_compile.runtime.serving.result_cache.options import ResultCacheOptions
from benchmarks.invariance import http_way
from benchmarks.invariance.requests import Case, resolve

Load = Callable[..., Engine]  # called with arguments of `Engine.load` beside the directory
Facts = dict[str, int]
ARRIVAL_S = 0.05  # within which all requests arrive, so that they press on each other


Scores = tuple[tuple[int, float], ...]


class Answer(NamedTuple):
    """What may not differ: tokens, their log probabilities and those of the prompt's tokens, the text, and why it ended.

    `alternatives` are the likely tokens in place of each, with theirs; None where a way does not tell.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    logprobs: Scores
    prompt_logprobs: Scores
    alternatives: Scores | None

    @classmethod
    def of(cls, result: Result) -> Answer:
        scored, prompt = _entries(result.logprobs), _entries(result.prompt_logprobs)
        own, of_prompt = (tuple((entry.token_id, entry.logprob) for entry in entries) for entries in (scored, prompt))
        tops = tuple(pair for entry in (*scored, *prompt) for pair in entry.top)
        return cls(tuple(result.token_ids), result.text, result.finish_reason, own, of_prompt, tops)

    def same(self, other: Answer) -> bool:
        """Whether two answers agree in what both tell, bit for bit."""
        told = self.alternatives is None or other.alternatives is None or self.alternatives == other.alternatives
        return self[:-1] == other[:-1] and told


def _entries(logprobs: Sequence[TokenLogprob | None] | None) -> list[TokenLogprob]:
    return [entry for entry in logprobs or [] if entry]


@dataclass(frozen=True)
class Way:
    """`run` answers requests with an engine loaded with the `options` for the longest request's tokens.

    `happened` names counts that must be above 0, without which this way would show nothing.
    """

    run: Callable[[Engine, Sequence[Request]], list[Answer]]
    options: Callable[[int], dict[str, Any]]
    happened: tuple[str, ...] = ()


def alone(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    """Answer one request after the other."""
    return [Answer.of(engine.generate([request])[0]) for request in requests]


def together(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    """Submit all requests at once."""
    return [Answer.of(result) for result in engine.generate(requests)]


def twice(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    """Answer all requests, and return the answers of a second time, in another order."""
    engine.generate(requests)
    if engine.result_cache:
        engine.result_cache.flush()
    order = random.Random(1).sample(range(len(requests)), len(requests))
    results = dict(zip(order, engine.generate([requests[i] for i in order]), strict=True))
    if engine.result_cache:
        missed = [i for i, request in enumerate(requests) if depends_on_request_alone(request) and not results[i].cached]
        assert not missed, f"requests {missed[:5]} were not answered from the result cache"
    return [Answer.of(results[i]) for i in range(len(requests))]


def streamed(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    """Stream one request after the other, and compare the pieces with the result."""
    answers = []
    for request in requests:
        with engine.stream(request) as stream:
            deltas = list(stream.deltas())
            answer = Answer.of(stream.result)
        assert "".join(delta.text for delta in deltas) == answer.text, "the pieces are not the text"
        assert tuple(token for delta in deltas for token in delta.token_ids) == answer.token_ids, "the pieces lack tokens"
        answers.append(answer)
    return answers


def pressed(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    """Stream all requests at the same time, arriving at random, beside as many that are given up after some pieces."""
    return asyncio.run(_pressed(engine, requests))


async def _pressed(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    chance = random.Random(2)

    async def answer(request: Request, delay: float) -> Answer:
        await asyncio.sleep(delay)
        async with engine.astream(request) as stream:
            async for _ in stream.deltas():
                pass
            return Answer.of(stream.result)

    async def give_up(request: Request, delay: float, pieces: int) -> None:
        await asyncio.sleep(delay)
        async with engine.astream(request) as stream:
            async for _ in stream.deltas():
                pieces -= 1
                if pieces < 0:
                    return

    answers, given_up = [], []
    for request in requests:
        answers.append(asyncio.create_task(answer(request, chance.uniform(0, ARRIVAL_S))))
        given_up.append(asyncio.create_task(give_up(request, chance.uniform(0, ARRIVAL_S), chance.randint(0, 4))))
    await asyncio.gather(*given_up)
    return await asyncio.gather(*answers)


def ask(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    """Send requests to a server, several at a time."""
    return [_told(request, *told) for request, told in zip(requests, http_way.ask(engine, requests, False), strict=True)]


def ask_streaming(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    """Send requests to a server, several at a time, and put the answers together from events."""
    return [_told(request, *told) for request, told in zip(requests, http_way.ask(engine, requests, True), strict=True)]


def _told(request: Request, prompt: list[dict[str, Any] | None] | None, choices: list[dict[str, Any]]) -> Answer:
    """Put an answer together from the choices of its events."""
    tokens = tuple(token for choice in choices for token in choice.get("token_ids") or ())
    text = "".join(choice["text"] for choice in choices)
    reason = next(choice["finish_reason"] for choice in reversed(choices) if choice["finish_reason"])
    values = [value for choice in choices if choice.get("logprobs") for value in choice["logprobs"]["token_logprobs"]]
    scores = tuple(zip(tokens, values, strict=True)) if request.logprobs is not None else ()
    own: list[tuple[int, float]] = []
    if request.prompt_logprobs is not None and prompt is not None:
        pairs = zip(request.prompt, prompt, strict=True)
        own = [(token, entry[str(token)]["logprob"]) for token, entry in pairs if entry is not None]
    return Answer(tokens, text, reason, scores, tuple(own), None)


def _few_blocks(longest: int) -> dict[str, Any]:
    """A KV cache for little more than the longest request, so that requests take blocks from each other."""
    return {"kv_tokens": longest + BLOCK_SIZE}


def _cached_by(store: str) -> Callable[[int], dict[str, Any]]:
    # A busy host may take longer than the default to answer from Redis, which would count as a miss.
    return lambda longest: {"result_cache": ResultCacheOptions(store, timeout_s=5.0)}


def ways(sqlite: str | None = None, redis: str | None = None) -> dict[str, Way]:
    """Return the ways by name. The first gives the answers that the others are compared with."""
    stores = {"memory": "memory"} | ({"sqlite": sqlite} if sqlite else {}) | ({"redis": redis} if redis else {})
    return {
        "alone and cold": Way(alone, lambda longest: {"prefix_cache": False}),
        "together": Way(together, lambda longest: {"prefix_cache": False}),
        "few blocks, others given up": Way(pressed, _few_blocks, ("preemptions", "cancellations")),
        "prefix hits": Way(twice, lambda longest: {}, ("prefix_hits",)),
        "prefix hits, streamed": Way(streamed, lambda longest: {}, ("prefix_hits",)),
        "HTTP": Way(ask, lambda longest: {}, ("prefix_hits",)),
        "HTTP, streamed": Way(ask_streaming, lambda longest: {}, ("prefix_hits",)),
        **{f"result cache, {name}": Way(twice, _cached_by(store)) for name, store in stores.items()},
    }


def answer(way: Way, load: Load, calls: Sequence[Case], longest: int) -> tuple[list[Answer], Facts]:
    """Answer calls in one way; returns the answers and what was counted."""
    with load(**way.options(longest)) as engine:
        answers = way.run(engine, resolve(engine, calls))
        stats = engine.stats()
    facts = {name: getattr(stats, name) for name in ("preemptions", "cancellations", "prefix_hits", "evictions", "steps")}
    missing = [name for name in way.happened if not facts[name]]
    assert not missing, f"{', '.join(missing)}: none, so that nothing was shown"
    return answers, facts
