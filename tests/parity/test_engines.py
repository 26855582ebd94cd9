"""Unquantized engines against Transformers: every variant, prefill, step-by-step decode, ragged batches, greedy answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from belle_compile.runtime import Engine, SamplingParams
from tests.parity.engines import Builder, EngineStepper
from tests.parity.stepping import relative_error
from tests.parity.variants import VARIANTS, hf_greedy, hf_logits, hf_step_logits, random_ids

TOLERANCE = 1e-5  # of the largest logit; the promise is 1e-4
PROMPT, GREEDY = 21, 64


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest, builder: Builder) -> Iterator[tuple[Path, Engine]]:
    """A variant's checkpoint and its loaded engine."""
    directory = builder.engine(request.param, "none")
    with Engine.load(directory, threads=2, kv_tokens=512) as engine:
        yield builder.checkpoint(request.param), engine


def test_prefill(case: tuple[Path, Engine]) -> None:
    checkpoint, engine = case
    ids = random_ids(checkpoint, PROMPT)
    found = engine.logits(ids)
    assert relative_error(found, hf_logits(checkpoint, ids)) < TOLERANCE
    np.testing.assert_array_equal(engine.logits(ids, start=13), found[13:])


def test_decode_step_by_step(case: tuple[Path, Engine]) -> None:
    checkpoint, engine = case
    ids = random_ids(checkpoint, PROMPT + 20, seed=1)
    steps = [ids[:13], *([token] for token in ids[13:])]
    stepper = EngineStepper(engine)
    got = np.concatenate([stepper.step({0: step})[0] for step in steps])
    assert relative_error(got, hf_step_logits(checkpoint, steps)) < TOLERANCE


def test_ragged_batch(case: tuple[Path, Engine]) -> None:
    """A prompt is read in the step in which another sequence decodes; neither notices."""
    checkpoint, engine = case
    first, second = random_ids(checkpoint, 19, seed=2), random_ids(checkpoint, 11, seed=3)
    stepper = EngineStepper(engine, sequences=2)
    steps = [{0: first[:17]}, {0: first[17:18], 1: second[:9]}, {1: second[9:], 0: first[18:]}]
    logits = [stepper.step(step) for step in steps]
    for sequence in (0, 1):
        mine = [step[sequence] for step in steps if sequence in step]
        got = np.concatenate([result[sequence] for result in logits if sequence in result])
        assert relative_error(got, hf_step_logits(checkpoint, mine)) < TOLERANCE


def test_greedy_tokens(case: tuple[Path, Engine]) -> None:
    checkpoint, engine = case
    prompts = [random_ids(checkpoint, PROMPT), random_ids(checkpoint, 5, seed=4)]
    params = SamplingParams(temperature=0, repetition_penalty=1.0, max_new_tokens=GREEDY, ignore_eos=True)
    expected = [hf_greedy(checkpoint, ids, GREEDY) for ids in prompts]
    assert [result.token_ids for result in engine.generate(prompts, params)] == expected
    assert engine.generate([prompts[1]], params)[0].token_ids == expected[1]
