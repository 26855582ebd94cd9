"""Sampling against the logits processors of Transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.request import SamplingParams
from belle_compile.runtime.serving.sampling import Sampler
from tests.runtime.fakes import make_request


def expected_distribution(
    logits: np.ndarray, prompt: list[int], params: SamplingParams, answer: Sequence[int] = (), eos: Sequence[int] = ()
) -> np.ndarray:
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    def frequency_and_presence(_: Any, scores: Any) -> Any:  # Transformers has neither; OpenAI's formula
        counts = torch.bincount(torch.tensor(answer, dtype=torch.long), minlength=scores.shape[1])
        return scores - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)

    processors = hf.LogitsProcessorList()
    if params.logit_bias:
        processors.append(hf.SequenceBiasLogitsProcessor({(token,): bias for token, bias in params.logit_bias}))
    if params.repetition_penalty not in (None, 1.0):
        processors.append(hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(frequency_and_presence)  # type: ignore[arg-type]
    ends = [*eos, *params.stop_token_ids]
    if params.min_tokens and ends:
        processors.append(hf.MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, ends))
    if params.temperature not in (None, 1.0):
        processors.append(hf.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p not in (None, 1.0):
        processors.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(hf.MinPLogitsWarper(params.min_p))
    scores = processors(torch.tensor([[*prompt, *answer]]), torch.tensor(logits[None].copy()))
    return torch.softmax(scores.double(), -1)[0].numpy()


def distribution(
    logits: np.ndarray, prompt: list[int], params: SamplingParams, answer: Sequence[int] = (), eos: tuple[int, ...] = ()
) -> np.ndarray:
    sampler = Sampler(make_request(prompt, params, eos=eos))
    for token in answer:
        forced = np.zeros(len(logits), np.float32)
        forced[token] = 1e6
        assert sampler.sample(forced) == token
    ids, weights = sampler.distribution(logits.copy())
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
        SamplingParams(temperature=1.0, min_p=0.03),
        SamplingParams(temperature=1.3, top_k=40, top_p=0.95, min_p=0.2),
        SamplingParams(temperature=1.0, min_p=1.0),
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


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
        {"presence_penalty": -1.0, "frequency_penalty": -0.3, "top_k": 5},
        {"logit_bias": {0: 3, 1: -30, 4: -0.5, 6: 0}},
        {"logit_bias": {2: 2.5, 4: -1}, "repetition_penalty": 1.7, "frequency_penalty": 1.1, "top_k": 6},
        {"min_tokens": 7, "stop_token_ids": [1, 5]},
        {"min_tokens": 6, "stop_token_ids": [1, 5]},  # the answer has six tokens
        {"min_tokens": 9, "repetition_penalty": 1.3, "logit_bias": {3: 9}, "top_p": 0.9, "min_p": 0.05},
        {"min_tokens": 9, "ignore_eos": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("vocabulary", [7, 5000])
def test_penalties_and_biases_are_those_of_transformers_and_openai(fields: dict[str, Any], vocabulary: int) -> None:
    params = SamplingParams(temperature=0.8, **fields)
    eos = () if params.ignore_eos else (3, 2)
    for seed in range(4):
        random = np.random.default_rng(seed)
        logits = random.normal(size=vocabulary).astype(np.float32) * 2
        prompt = random.integers(0, vocabulary, 20).tolist()
        answer = [4, 0, 4, 4, 6, 0]
        expected = expected_distribution(logits, prompt, params, answer, eos)
        found = distribution(logits, prompt, params, answer, eos)
        assert ((found > 0) == (expected > 0)).all()
        np.testing.assert_allclose(found, expected, rtol=3e-5, atol=1e-12)


def test_penalties_count_the_answer_and_not_the_prompt() -> None:
    params = SamplingParams(temperature=0, frequency_penalty=0.5, presence_penalty=1.0)
    sampler = Sampler(make_request([0, 0, 0], params))
    logits = np.array([5, 4, 3.2], np.float32)
    # 0 falls to 3.5, 1 to 2.5, then 0 to 3.0 and 2 to 1.7; at last 0 is 2.5 as 1, and the lower id is taken.
    assert [sampler.sample(logits.copy()) for _ in range(6)] == [0, 1, 0, 2, 0, 0]


def test_min_tokens_hold_back_the_end_and_then_let_it_go() -> None:
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[3])  # type: ignore[arg-type]
    sampler = Sampler(make_request([0], params, eos=(2,)))
    logits = np.array([1, 0, 9, 8], np.float32)
    assert [sampler.sample(logits.copy()) for _ in range(4)] == [0, 0, 2, 2]


def test_logits_of_a_request_without_penalties_are_not_written_to() -> None:
    logits = np.random.default_rng(0).normal(size=100).astype(np.float32)
    logits.flags.writeable = False
    Sampler(make_request([1, 2], SamplingParams(temperature=1.0, top_k=5, min_p=0.1, seed=1))).sample(logits)


def test_answers_of_a_seed_differ_and_follow_the_documented_rule() -> None:
    logits = np.zeros(1 << 16, np.float32)
    draws = {}
    requests = make_request([], SamplingParams(temperature=1.0, seed=11)).answers(4)
    for i, request in enumerate(requests):
        draws[i] = Sampler(request).sample(logits.copy())
        sequence = np.random.SeedSequence(11, spawn_key=(i,)) if i else 11
        assert draws[i] == int(np.random.default_rng(sequence).random() * len(logits))
    assert len(set(draws.values())) == 4


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
