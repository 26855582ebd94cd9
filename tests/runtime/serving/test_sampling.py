"""Sampling against the logits processors of Transformers."""

from __future__ import annotations

import numpy as np
import pytest

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.request import SamplingParams
from belle_compile.runtime.serving.sampling import Sampler
from tests.runtime.fakes import make_request


def expected_distribution(logits: np.ndarray, prompt: list[int], params: SamplingParams) -> np.ndarray:
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    processors = hf.LogitsProcessorList()
    if params.repetition_penalty not in (None, 1.0):
        processors.append(hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature not in (None, 1.0):
        processors.append(hf.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p not in (None, 1.0):
        processors.append(hf.TopPLogitsWarper(params.top_p))
    scores = processors(torch.tensor([prompt]), torch.tensor(logits[None].copy()))
    return torch.softmax(scores.double(), -1)[0].numpy()


def distribution(logits: np.ndarray, prompt: list[int], params: SamplingParams) -> np.ndarray:
    ids, weights = Sampler(make_request(prompt, params)).distribution(logits.copy())
    dense = np.zeros(len(logits))
    dense[slice(None) if ids is None else ids] = weights / weights.sum()
    return dense


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.35),
        SamplingParams(temperature=1.0, top_k=30),
        SamplingParams(temperature=0.8, top_p=0.85),
        SamplingParams(temperature=1.5, top_p=0.999),
        SamplingParams(temperature=1.0, top_p=0.01),
        SamplingParams(temperature=0.35, top_k=30, top_p=0.85, repetition_penalty=1.2),
        SamplingParams(temperature=2.0, top_k=2000, top_p=0.5, repetition_penalty=0.8),
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=1.0, top_k=10**6),
    ],
    ids=str,
)
@pytest.mark.parametrize("vocabulary", [7, 5000])
def test_same_distribution_as_transformers(params: SamplingParams, vocabulary: int) -> None:
    for seed in range(4):
        random = np.random.default_rng(seed)
        logits = random.normal(size=vocabulary).astype(np.float32) * 4
        prompt = random.integers(0, vocabulary, 20).tolist()
        if params.top_k and params.top_k > 1000 and vocabulary < 1000:
            continue
        expected = expected_distribution(logits, prompt, params)
        found = distribution(logits, prompt, params)
        assert ((found > 0) == (expected > 0)).all()
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-12)


def test_ties_with_the_kth_stay() -> None:
    logits = np.array([3, 1, 3, 2, 2, 0], np.float32)
    kept = distribution(logits, [], SamplingParams(temperature=1.0, top_k=3)) > 0
    assert kept.tolist() == [True, False, True, True, True, False]


def test_greedy_with_penalty_over_prompt_and_answer() -> None:
    sampler = Sampler(make_request([0], SamplingParams(temperature=0, repetition_penalty=2.0)))
    logits = np.array([5, 4, 3, 2.1, -1], np.float32)
    chosen = [sampler.sample(logits.copy()) for _ in range(4)]
    assert chosen == [1, 2, 0, 0]  # 0 is 2.5 after the penalty, then 1 is 2, 2 is 1.5; 0 stays the best at 2.5 again


def test_the_seen_set_grows_past_its_first_size() -> None:
    sampler = Sampler(make_request([], SamplingParams(temperature=0, repetition_penalty=1e6)))
    logits = np.linspace(1, 2, 300).astype(np.float32)
    assert [sampler.sample(logits.copy()) for _ in range(300)] == list(range(299, -1, -1))


def test_ids_above_the_vocabulary_are_no_concern_of_the_penalty() -> None:
    sampler = Sampler(make_request([1, 7], SamplingParams(temperature=0, repetition_penalty=2.0)))
    assert sampler.sample(np.array([1, 1.5], np.float32)) == 0


def test_a_seed_repeats_and_others_differ() -> None:
    logits = np.random.default_rng(0).normal(size=1000).astype(np.float32)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(make_request([], SamplingParams(temperature=1.0, top_p=0.95, seed=seed)))
        return [sampler.sample(logits.copy()) for _ in range(20)]

    assert draw(1) == draw(1) != draw(2)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}, {"top_k": 4}], ids=str)
def test_draws_follow_the_distribution(cut: dict[str, float]) -> None:
    logits = np.array([2, 1, 0, -1, -2, 1.5], np.float32)
    params = SamplingParams(temperature=1.0, seed=3, **cut)  # type: ignore[arg-type]
    sampler = Sampler(make_request([], params))
    draws = np.bincount([sampler.sample(logits.copy()) for _ in range(20000)], minlength=6) / 20000
    np.testing.assert_allclose(draws, distribution(logits, [], params), atol=0.015)


def test_nucleus_larger_than_its_first_guess() -> None:
    logits = np.zeros(3000, np.float32)
    logits[5] = 1
    found = distribution(logits, [], SamplingParams(temperature=1.0, top_p=0.9))
    assert found[5] > 0 and abs((found > 0).sum() - 2700) <= 2


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}])
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_logits_that_are_not_finite(fields: dict[str, float], broken: float) -> None:
    with pytest.raises(EngineError, match=r"the model's logits are not finite"):
        Sampler(make_request([], SamplingParams(**fields))).sample(np.full(10, broken, np.float32))  # type: ignore[arg-type]
