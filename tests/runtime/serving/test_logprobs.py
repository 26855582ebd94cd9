"""Log probabilities: their values, and that they have the same bits however an answer comes about."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from belle_compile.runtime import EngineError, Result, SamplingParams
from belle_compile.runtime.serving.logprobs import TokenLogprob, token_logprob
from tests.runtime.fakes import EOS, CandidateExecutor, FakeExecutor, hash_rule, make_engine

PROMPTS = [[7 + i] * (3 + 9 * i) for i in range(5)]
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 5}


@pytest.mark.parametrize("vocabulary", [1, 3, 5000])
def test_values_are_those_of_torch(vocabulary: int) -> None:
    torch = pytest.importorskip("torch")
    logits = (np.random.default_rng(0).normal(size=vocabulary) * 9).astype(np.float32)
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), 0).numpy()
    token = vocabulary // 2
    entry = token_logprob(logits, token, 20)
    assert entry.token_id == token and entry.logprob == pytest.approx(expected[token], abs=1e-5)
    assert [token_id for token_id, _ in entry.top] == np.argsort(-logits, kind="stable")[:20].tolist()
    np.testing.assert_allclose([value for _, value in entry.top], expected[np.argsort(-logits, kind="stable")[:20]], atol=1e-5)
    assert dict(entry.top).get(token, entry.logprob) == entry.logprob


def test_values_are_float32_numbers_and_logits_stay() -> None:
    logits = np.random.default_rng(1).normal(size=50).astype(np.float32)
    before = logits.copy()
    entry = token_logprob(logits, 3, 2)
    assert all(value == float(np.float32(value)) for value in (entry.logprob, *(value for _, value in entry.top)))
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("vocabulary", [77, 4099])
def test_where_a_row_lies_in_memory_does_not_matter(vocabulary: int) -> None:
    logits = (np.random.default_rng(2).normal(size=vocabulary) * 5).astype(np.float32)
    expected = token_logprob(logits, 5, 20)
    for offset in range(1, 18):
        moved = np.zeros(vocabulary + offset, np.float32)[offset:]
        moved[:] = logits
        assert token_logprob(moved, 5, 20) == expected


def test_of_equal_logits_the_lower_ids_come_first() -> None:
    logits = np.array([1, 5, 3, 5, 3, 3], np.float32)
    assert [token for token, _ in token_logprob(logits, 0, 4).top] == [1, 3, 2, 4]
    assert token_logprob(logits, 0, 0).top == ()


def test_logits_far_apart_do_not_overflow() -> None:
    entry = token_logprob(np.array([3e4, -3e4, 0], np.float32), 1, 1)
    assert (entry.logprob, entry.top) == (-6e4, ((0, 0.0),))


def expected(context: list[int], tokens: list[int], top: int) -> list[TokenLogprob]:
    """Of `tokens` after `context`, from the logits of a model that sees the whole context anew for each."""
    return [token_logprob(hash_rule(context + tokens[:i]), token, top) for i, token in enumerate(tokens)]


def test_a_prompt_with_logits_that_are_not_finite_fails_alone() -> None:
    def rule(context: list[int]) -> NDArray[np.float32]:
        return np.full(300, np.nan, np.float32) if context == [9, 9] else hash_rule(context)

    params = SamplingParams(temperature=0, max_new_tokens=3, prompt_logprobs=1)
    with make_engine(FakeExecutor(rule)) as engine:
        good, bad = engine.stream([3, 4], params), engine.stream([9, 9, 9, 9], params)
        with pytest.raises(EngineError, match="the model's logits are not finite"):
            list(bad)
        assert len(list(good.deltas())) > 0 and len(good.result.token_ids) == 3


@pytest.mark.parametrize("executor", [FakeExecutor, CandidateExecutor])
def test_they_are_of_the_models_own_distribution(executor: type[FakeExecutor]) -> None:
    """Before temperature, penalties, biases and cuts, which are written into the logits."""
    params = SamplingParams(**SAMPLED, logit_bias={9: 5, 11: -5}, frequency_penalty=0.3, max_new_tokens=9, logprobs=3)
    with make_engine(executor()) as engine:
        for prompt, result in zip(PROMPTS, engine.generate(PROMPTS, params), strict=True):
            assert result.logprobs == expected(prompt, result.token_ids, 3) and result.prompt_logprobs is None


@pytest.mark.parametrize("limits", [{}, {"max_tokens": 5, "max_rows": 2}, {"max_tokens": 1, "max_rows": 1}], ids=str)
def test_those_of_a_prompt(limits: dict[str, int]) -> None:
    executor = CandidateExecutor(**limits)
    params = SamplingParams(temperature=0, max_new_tokens=3, prompt_logprobs=2)
    with make_engine(executor) as engine:
        results = engine.generate(PROMPTS, params)
        logits = [engine.logits(prompt) for prompt in PROMPTS]
    for prompt, result, rows in zip(PROMPTS, results, logits, strict=True):
        assert result.prompt_logprobs == [None, *expected(prompt[:1], prompt[1:], 2)] and result.logprobs is None
        assert result.prompt_logprobs[1:] == [token_logprob(rows[i], prompt[i + 1], 2) for i in range(len(prompt) - 1)]
    assert executor.few >= 2 * len(PROMPTS), "the answer's own rows need no more than candidates"


def test_those_of_a_prompt_of_one_token() -> None:
    with make_engine() as engine:
        (result,) = engine.generate([[5]], SamplingParams(temperature=0, max_new_tokens=2, prompt_logprobs=2, logprobs=0))
    assert result.prompt_logprobs == [None] and result.logprobs == expected([5], result.token_ids, 0)


def quoting_rule(context: list[int]) -> NDArray[np.float32]:
    """Mostly chosen by the last two tokens, so that answers repeat themselves."""
    logits = hash_rule(context[-2:])
    logits[EOS] = 6 if len(context) % 13 == 0 else -20
    logits[12:] -= 8
    return logits


def facts(result: Result) -> tuple[Any, ...]:
    return result.token_ids, result.text, result.finish_reason, result.logprobs, result.prompt_logprobs


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[int], dict[str, Any]]:
    ids = st.integers(3, 11)
    params: dict[str, Any] = {
        "temperature": draw(st.sampled_from([0.0, 0.7, 1.5])),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.1, 0.9])),
        "top_p": draw(st.sampled_from([0.9, 1.0])),
        "top_k": draw(st.sampled_from([0, 4])),
        "min_p": draw(st.sampled_from([0.0, 0.1])),
        "presence_penalty": draw(st.sampled_from([0.0, 0.4, -0.2])),
        "frequency_penalty": draw(st.sampled_from([0.0, 0.1])),
        "logit_bias": draw(st.dictionaries(ids, st.sampled_from([-2.0, 1.0]), max_size=2)),
        "seed": draw(st.integers(0, 3)),
        "max_new_tokens": draw(st.integers(5, 30)),
        "min_tokens": draw(st.integers(0, 5)),
        "stop_token_ids": draw(st.lists(ids, max_size=1)),
        "ignore_eos": draw(st.booleans()),
        "logprobs": draw(st.sampled_from([None, 0, 3])),
        "prompt_logprobs": draw(st.sampled_from([None, 2])),
        "n": draw(st.integers(1, 3)),
    }
    return draw(st.lists(ids, min_size=1, max_size=24)), params


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(requests(), min_size=1, max_size=4),
    lookup=st.integers(0, 6),
    limits=st.fixed_dictionaries({
        "max_tokens": st.integers(1, 30), "max_rows": st.integers(1, 12), "max_sequences": st.integers(1, 5),
        "num_blocks": st.integers(4, 16),
    }),
)  # fmt: skip
def test_an_answer_depends_on_its_request_alone(
    asked: list[tuple[list[int], dict[str, Any]]], lookup: int, limits: dict[str, int]
) -> None:
    """Alone with all logits; then together, with prompt lookup, with candidates only, and streamed."""
    prompts = [prompt for prompt, _ in asked]
    with make_engine(FakeExecutor(quoting_rule)) as engine:
        alone = [facts(r) for prompt, params in asked for r in engine.generate([prompt], SamplingParams(**params))]
    with make_engine(CandidateExecutor(quoting_rule, **limits)) as engine:
        drafting = [SamplingParams(**params, prompt_lookup=lookup) for _, params in asked]
        assert [facts(result) for result in engine.generate(prompts, drafting)] == alone
        streams = [engine.stream(request) for request in engine.resolve_all(prompts, drafting)]
        for stream, whole in zip(streams, alone, strict=True):
            deltas = list(stream.deltas())
            assert facts(stream.result) == whole
            assert [token for delta in deltas for token in delta.token_ids] == whole[0]
            assert "".join(delta.text for delta in deltas) == whole[1]
            if whole[3] is not None:
                assert [entry for delta in deltas for entry in delta.logprobs or ()] == whole[3]
            else:
                assert all(delta.logprobs is None for delta in deltas)


def test_all_logits_are_asked_for_only_where_they_matter() -> None:
    executor = CandidateExecutor()
    with make_engine(executor) as engine:
        engine.generate(
            [[5]], SamplingParams(temperature=0, max_new_tokens=4, frequency_penalty=1, logit_bias={3: -1}, min_tokens=2)
        )
        assert (executor.few, executor.whole) == (4, 0)
        engine.generate([[5]], SamplingParams(temperature=0, max_new_tokens=4, logprobs=0))
        assert (executor.few, executor.whole) == (4, 4)
