"""What a profile counts, over a fake executor; times are the fake kernels' and not looked at."""

from __future__ import annotations

import pytest

from belle_compile.runtime import EngineError, SamplingParams
from belle_compile.runtime.profiling import Profile, kv_bytes_per_token, read_bandwidth
from tests.runtime.fakes import FakeExecutor, make_engine

GREEDY = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=4)


@pytest.fixture(autouse=True)
def bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 GB/s, then 10."""
    rates = iter([20e9, 10e9] * 5)
    monkeypatch.setattr(FakeExecutor, "read_bandwidth", lambda self: next(rates))


def profile(prompts: list[list[int]], executor: FakeExecutor | None = None) -> Profile:
    with make_engine(executor) as loaded:
        loaded.generate([[9]], GREEDY)
        with loaded.profile() as handle:
            loaded.generate(prompts, GREEDY)
        loaded.generate([[9]], GREEDY)
    assert handle.result is not None
    return handle.result


def test_steps_tokens_calls_and_bytes() -> None:
    prefill, decode = profile([[3] * 5, [4] * 7]).phases
    assert (prefill.name, prefill.steps, prefill.tokens) == ("prefill", 1, 12)
    assert (decode.name, decode.steps, decode.tokens) == ("decode", 3, 6)
    assert [(k.kind, k.rows, k.calls, k.bytes) for k in prefill.kernels] == [
        ("attention", "T", 1, 64 * (5 + 7)),
        ("linear", "R", 1, 1000),
    ]
    assert [(k.kind, k.calls, k.bytes) for k in decode.kernels] == [
        ("attention", 3, 64 * (6 + 8 + 7 + 9 + 8 + 10)),
        ("linear", 3, 3000),
    ]


def test_chunks_of_a_long_prompt_have_no_head() -> None:
    (prefill, _) = profile([[3] * 40]).phases  # two steps of at most 24 tokens
    assert (prefill.steps, prefill.tokens) == (2, 40)
    assert [(k.kind, k.calls, k.bytes) for k in prefill.kernels] == [("attention", 2, 64 * (24 + 40)), ("linear", 1, 1000)]


def test_shares_are_of_the_better_bandwidth() -> None:
    result = profile([[3] * 5])
    assert result.read_bytes_per_second == 20e9
    for phase in result.phases:
        assert 0 < phase.outside_s < phase.seconds
        for kernel in phase.kernels:
            assert kernel.bytes_per_second == pytest.approx(kernel.bytes / kernel.seconds)
            assert kernel.share_of_limit == pytest.approx(kernel.bytes_per_second / 20e9)
            assert kernel.share_of_step == pytest.approx(kernel.seconds / phase.seconds)


def test_table_has_every_kernel_and_what_is_outside() -> None:
    table = profile([[3] * 5]).table()
    assert table.startswith("prefill: 5 tokens in 1 step, ") and "\n\ndecode: 3 tokens in 3 steps, " in table
    for label in ("attention", "linear", "schedule, sample, detokenize"):
        assert table.count(f"  {label} ") == 2
    assert "read bandwidth 20.0 GB/s" in table


def test_nothing_is_timed_outside_of_the_block() -> None:
    with make_engine() as loaded:
        plain = loaded._loop._run_step
        with loaded.profile() as handle:
            assert loaded._loop._run_step != plain
        assert loaded._loop._run_step == plain and loaded.executor.recorder is None
    assert handle.result is not None and handle.result.phases == ()


def test_one_profile_at_a_time() -> None:
    with make_engine() as loaded, loaded.profile():
        with pytest.raises(EngineError, match="the engine is being profiled already"), loaded.profile():
            pass
        assert loaded.executor.recorder is not None


def test_a_failing_request_ends_the_profile() -> None:
    executor = FakeExecutor()
    with make_engine(executor) as loaded:
        executor.failure = ZeroDivisionError()
        with pytest.raises(ZeroDivisionError), loaded.profile() as handle:
            loaded.generate([3, 4], GREEDY)
        assert executor.recorder is None and handle.result is None


def test_kv_bytes_of_a_token() -> None:
    assert kv_bytes_per_token(FakeExecutor().program) == 2 * 8 * 4


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_read_bandwidth_of_a_few_pages(threads: int) -> None:
    assert read_bandwidth(threads, size=1 << 20) > 0
