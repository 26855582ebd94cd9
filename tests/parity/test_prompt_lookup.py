"""What prompt lookup rests on: a token's logits are the same bits in steps of any size, so guessing changes no answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from belle_compile.runtime import Engine, SamplingParams
from tests.parity.engines import Builder, EngineStepper
from tests.parity.variants import random_ids

CASES = [("llama_gqa", "none"), ("llama_gqa", "int8"), ("bloom_3_heads", "int8"), ("llama_gqa", "int4")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, builder: Builder) -> Iterator[tuple[Path, Engine]]:
    """A checkpoint and its loaded engine."""
    variant, quantization = request.param
    with Engine.load(builder.engine(variant, quantization), threads=2, kv_tokens=512) as engine:
        yield builder.checkpoint(variant), engine


@pytest.mark.parametrize("cuts", [[2] * 12, [3, 5] * 3, [9, 15], [24]], ids=str)
def test_logits_do_not_depend_on_the_size_of_a_step(case: tuple[Path, Engine], cuts: list[int]) -> None:
    checkpoint, engine = case
    ids = random_ids(checkpoint, 90 + 24)

    def steps(sizes: list[int]) -> np.ndarray:
        stepper = EngineStepper(engine)
        stepper.step({0: ids[:60]})
        stepper.step({0: ids[60:90]})
        stops = 90 + np.cumsum(sizes)
        return np.concatenate([stepper.step({0: ids[stop - n : stop]})[0] for stop, n in zip(stops, sizes, strict=True)])

    np.testing.assert_array_equal(steps(cuts), steps([1] * 24))


def test_nothing_is_guessed_where_rope_depends_on_what_else_is_in_the_step(builder: Builder) -> None:
    prompt = random_ids(builder.checkpoint("llama_dynamic_rope"), 4) * 2
    with Engine.load(builder.engine("llama_dynamic_rope", "none"), threads=2, kv_tokens=256) as engine:
        params = [SamplingParams(temperature=1, top_k=2, repetition_penalty=1, seed=3, max_new_tokens=60, ignore_eos=True,
                                 prompt_lookup=n) for n in (0, 5)]  # fmt: skip
        plain, guessed = (engine.generate([prompt], one)[0] for one in params)
    assert guessed.token_ids == plain.token_ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_without_lookup(case: tuple[Path, Engine], temperature: float) -> None:
    checkpoint, engine = case
    prompts = [random_ids(checkpoint, n, seed=n) * 3 for n in (4, 9, 17)]

    def answers(prompt_lookup: int) -> list[list[int]]:
        params = SamplingParams(temperature=temperature, top_k=2, repetition_penalty=1.0, seed=3, max_new_tokens=60,
                                ignore_eos=True, prompt_lookup=prompt_lookup)  # fmt: skip
        results = engine.generate(prompts, params)
        assert (sum(result.drafted for result in results) > 0) == (prompt_lookup > 0)
        return [result.token_ids for result in results]

    assert answers(5) == answers(0)


SAMPLED = {"temperature": 1.0, "top_k": 5, "frequency_penalty": 0.2, "seed": 3}


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, SAMPLED], ids=["greedy", "sampled"])
def test_log_probabilities_have_the_same_bits_alone_in_a_batch_and_with_lookup(
    case: tuple[Path, Engine], fields: dict[str, Any]
) -> None:
    checkpoint, engine = case
    prompts = [random_ids(checkpoint, n, seed=n) * 3 for n in (4, 9, 17)]

    def answers(batches: list[list[list[int]]], lookup: int) -> list[Any]:
        scored = SamplingParams(**fields, max_new_tokens=30, ignore_eos=True, logprobs=3, prompt_logprobs=2)
        params = dataclasses.replace(scored, repetition_penalty=1, prompt_lookup=lookup)
        results = [result for batch in batches for result in engine.generate(batch, params)]
        return [(result.token_ids, result.logprobs, result.prompt_logprobs) for result in results]

    alone = answers([[prompt] for prompt in prompts], 0)
    assert answers([prompts], 0) == alone and answers([prompts], 5) == alone
    logits = engine.logits(prompts[0]).astype(np.float64)
    expected = [row[token] - np.logaddexp.reduce(row) for row, token in zip(logits, prompts[0][1:], strict=False)]
    np.testing.assert_allclose([entry.logprob for entry in alone[0][2][1:]], expected, atol=1e-5)
