"""Requests of every kind at random, what their answers must be, and executors with little room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from belle_compile.runtime.executors import StepBatch
from belle_compile.runtime.serving.generation import Generation, Piece
from belle_compile.runtime.serving.request import EngineIdentity, Request, SamplingParams
from belle_compile.runtime.serving.scheduling import SchedulerOptions
from belle_compile.runtime.serving.step_loop import StepLoop
from belle_compile.runtime.tokenizer import Tokenizer
from tests.runtime.fakes import EOS, VOCABULARY, FakeExecutor, Rule, byte_tokenizer, hash_rule, make_request, special_tokens

IDENTITY = EngineIdentity("ab" * 32, "0.1.0", "avx2", 1)
TOKENIZER = Tokenizer(byte_tokenizer(), special_tokens())
WAIT_S = 60.0


class DynamicExecutor(FakeExecutor):
    """Keys depend on the number of tokens that their sequence has after the step, beyond `rope_from`: as with dynamic RoPE."""

    def __init__(self, rope_from: int, rule: Rule = hash_rule, **limits: int) -> None:
        super().__init__(rule, **limits)
        self.rope_from = rope_from

    def step(self, batch: StepBatch) -> Any:
        plain = batch.token_ids[: batch.tokens].copy()
        lengths = np.zeros(batch.max_sequences, np.int64)
        slots = batch.sequences[: batch.tokens]
        np.maximum.at(lengths, slots, batch.positions[: batch.tokens] + 1)
        grown = np.where(lengths > self.rope_from, 1000 * lengths, 0)
        batch.token_ids[: batch.tokens] += grown[slots].astype(np.int32)
        logits = super().step(batch)
        batch.token_ids[: batch.tokens] = plain
        return logits


class ApartExecutor(DynamicExecutor):
    """Keys of tokens of an answer differ from those of the same tokens in a prompt, and answers come token by token."""

    def __init__(self, rope_from: int, rule: Rule = hash_rule, **limits: int) -> None:
        super().__init__(rope_from, rule, **limits)
        self.batch.answers_apart = True

    def step(self, batch: StepBatch) -> Any:
        plain, tokens = batch.token_ids[: batch.tokens].copy(), slice(batch.tokens)
        answers = batch.positions[tokens] >= batch.prompt_lengths[batch.sequences[tokens]]
        assert len(set(batch.sequences[tokens][answers].tolist())) == answers.sum(), "an answer has several tokens in a step"
        batch.token_ids[tokens] += 100_000 * answers.astype(np.int32)
        logits = super().step(batch)
        batch.token_ids[: batch.tokens] = plain
        return logits


class Streamed(Generation):
    """An answer whose pieces are kept."""

    def __init__(self, request: Request) -> None:
        self.pieces: list[Piece] = []
        super().__init__(request, TOKENIZER, self.pieces.append)


def random_request(random: np.random.Generator, longest: int = 60) -> Request:
    """A request with any of the fields that an answer depends on. Many begin alike."""
    shared = [9, 8, 7, 6, 5] * 8
    start = shared[: random.integers(len(shared) + 1)] if random.random() < 0.6 else []
    prompt = [*start, *random.integers(3, VOCABULARY, random.integers(1, 12)).tolist()]
    fields: dict[str, Any] = {"temperature": float(random.choice([0.0, 0.9])), "seed": int(random.integers(3))}
    optional: dict[str, Any] = {
        "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": -0.3, "top_k": 5, "top_p": 0.9, "min_p": 0.05,
        "logprobs": 2, "prompt_logprobs": 1, "prompt_lookup": 3, "min_tokens": 2, "stop": ("e", "\n"), "logit_bias": {11: 2.0},
    }  # fmt: skip
    fields |= {name: value for name, value in optional.items() if random.random() < 0.3}
    room = longest - len(prompt)
    params = SamplingParams(max_new_tokens=max(2, int(random.integers(2, max(3, room)))), **fields)
    return make_request(prompt, params, eos=(EOS,))


def run(loop: StepLoop, jobs: Sequence[Generation]) -> None:
    """Answer all, together."""
    loop.submit(jobs)
    for job in jobs:
        assert job.done.wait(WAIT_S)


def outcome(job: Generation) -> tuple[Any, ...]:
    """Everything that an answer depends on the request for."""
    result = job.result()
    pieces = "".join(text for text, _ in job.pieces) if isinstance(job, Streamed) else result.text
    return result.token_ids, result.text, pieces, result.finish_reason, result.logprobs, result.prompt_logprobs


def alone(executor: FakeExecutor, requests: Sequence[Request], rope_from: int | None = None) -> list[tuple[Any, ...]]:
    """The outcomes of requests one after the other, in an engine with room and without a prefix cache."""
    loop = StepLoop(executor, SchedulerOptions(prefix_cache=False), IDENTITY, rope_from)
    outcomes = []
    for request in requests:
        job = Streamed(request)
        run(loop, [job])
        outcomes.append(outcome(job))
    loop.stop()
    return outcomes
