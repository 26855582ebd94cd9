"""The engine over a fake model: answers do not depend on who shares the batch."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

from belle_compile.runtime import Engine, EngineError, Result, SamplingParams
from belle_compile.runtime.artifact import GenerationDefaults
from belle_compile.runtime.executors import StepBatch
from belle_compile.runtime.serving.request import Request
from belle_compile.runtime.serving.sampling import Sampler
from tests.runtime.fakes import (
    EOS,
    NOTHING_ELSE,
    FakeExecutor,
    byte_tokenizer,
    hash_rule,
    make_directory,
    make_engine,
    make_request,
    script_rule,
    special_tokens,
)

GREEDY = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=10)
SAMPLED = SamplingParams(temperature=1.0, top_k=0, top_p=0.9, seed=11, max_new_tokens=9)
PROMPTS = [[7 + i] * (3 + 9 * i) for i in range(6)]


def expected(prompt: list[int], params: SamplingParams) -> list[int]:
    """Tokens of a model that sees the whole context anew for each."""
    sampler, context = Sampler(make_request(prompt, params)), list(prompt)
    for _ in range(params.max_new_tokens or 0):
        context.append(sampler.sample(hash_rule(context)))
    return context[len(prompt) :]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_tokens": 5, "max_rows": 2},
        {"num_blocks": 5},
        {"max_sequences": 1},
        {"max_tokens": 1, "max_rows": 1},
        {"max_tokens": 512, "max_rows": 64, "max_sequences": 64, "num_blocks": 400},
    ],
    ids=str,
)
def test_batch_and_limits_change_no_answer(limits: dict[str, int], params: SamplingParams) -> None:
    params = SamplingParams(**params.__dict__ | {"repetition_penalty": 1.3})
    with make_engine(FakeExecutor(**limits)) as engine:  # type: ignore[arg-type]
        for _ in range(2):  # the second time in blocks that others wrote to
            results = engine.generate(PROMPTS, params)
            assert [result.token_ids for result in results] == [expected(prompt, params) for prompt in PROMPTS]
            assert [result.prompt_token_ids for result in results] == PROMPTS
            assert {result.finish_reason for result in results} == {"length"}


def test_requests_share_steps() -> None:
    executor = FakeExecutor()
    with make_engine(executor) as engine:
        engine.generate([[1, 2], [3], [4, 5, 6]], GREEDY)
    assert executor.steps[0] == (6, 3) and executor.steps[1:] == [(3, 3)] * 9
    assert executor.closed


def test_answer_ends_at_eos_and_text_before_it() -> None:
    with make_engine() as engine:
        answer = engine.tokenizer.encode("你好,世界")
        prompt = engine.encode("hello")
    with make_engine(FakeExecutor(script_rule(len(prompt), answer))) as engine:
        (result,) = engine.generate(["hello"], SamplingParams(max_new_tokens=50))
        assert result.text == "你好,世界" and result.finish_reason == "stop"
        assert result.token_ids == [*answer, EOS]
        assert engine.tokenizer.decode(result.prompt_token_ids) == "user: hello\nassistant:"
        (longer,) = engine.generate(["hello"], SamplingParams(max_new_tokens=50, ignore_eos=True))
        assert longer.finish_reason == "length" and len(longer.token_ids) == 50
        (cut,) = engine.generate(["hello"], SamplingParams(max_new_tokens=50, stop=("世", "x")))
        assert cut.text == "你好," and cut.finish_reason == "stop" and len(cut.token_ids) < len(result.token_ids)
        streamed = engine.stream("hello", SamplingParams(max_new_tokens=50))
        assert "".join(streamed) == streamed.result.text == result.text


def test_the_token_that_ends_an_answer_is_not_in_its_text_though_it_has_one() -> None:
    with make_engine() as engine:
        answer, length = engine.tokenizer.encode("one."), len(engine.encode("q"))
    special = special_tokens(eos=(answer[-1],))
    with make_engine(FakeExecutor(script_rule(length, answer)), special_tokens=special) as engine:
        (result,), streamed = engine.generate(["q"]), engine.stream("q")
        assert "".join(streamed) == result.text == "one" and result.token_ids == streamed.result.token_ids == answer


@pytest.mark.parametrize(
    ("stop", "text", "count"), [("<s>", "one two", -1), ("two<s>", "one ", -1), ("</s>", "one twothree", None)]
)
def test_stop_strings_that_are_special_tokens(stop: str, text: str, count: int | None) -> None:
    with make_engine() as engine:
        one, three = engine.tokenizer.encode("one two"), engine.tokenizer.encode("three")
        length = len(engine.encode("q"))
    answer = [*one, 1, *three]
    with make_engine(FakeExecutor(script_rule(length, answer))) as engine:
        params = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=20, stop=(stop,), ignore_eos=True)
        (result,), streamed = engine.generate(["q"], params), engine.stream("q", params)
        assert "".join(streamed) == result.text == text and streamed.result.token_ids == result.token_ids
        assert result.token_ids == (answer[: len(one) + 1] if count else [*answer, EOS]) and result.finish_reason == "stop"


def test_stop_string_that_never_completes_is_text() -> None:
    with make_engine() as engine:
        answer, length = engine.tokenizer.encode("hello wor"), len(engine.encode("q"))
    with make_engine(FakeExecutor(script_rule(length, answer))) as engine:
        (result,) = engine.generate(["q"], SamplingParams(stop=("world",)))
        assert result.text == "hello wor" and result.finish_reason == "stop"
        (result,) = engine.generate(["q"], SamplingParams(stop=("world",), max_new_tokens=len(answer)))
        assert result.text == "hello wor" and result.finish_reason == "length"


def test_stream_gives_the_generated_text_in_pieces() -> None:
    with make_engine() as engine:
        (result,) = engine.generate(["hello"], SAMPLED)
        stream = engine.stream("hello", SAMPLED)
        pieces = list(stream)
        assert "".join(pieces) == result.text and len(pieces) > 1
        assert stream.result.token_ids == result.token_ids
        assert list(stream) == []


def test_streams_in_turn_share_the_engine() -> None:
    with make_engine() as engine:
        texts = [engine.generate([prompt], GREEDY)[0].text for prompt in PROMPTS[:3]]
        streams = [engine.stream(prompt, GREEDY) for prompt in PROMPTS[:3]]
        pieces = ["", "", ""]
        for _ in range(40):
            for i, stream in enumerate(streams):
                pieces[i] += next(stream, "")
        assert pieces == texts


def test_dropped_stream_frees_its_place() -> None:
    executor = FakeExecutor(max_sequences=1)
    with make_engine(executor) as engine:
        for _ in range(3):
            with engine.stream([5] * 20, SamplingParams(max_new_tokens=90)) as stream:
                next(stream)
        next(engine.stream([5] * 20, SamplingParams(max_new_tokens=90)))  # dropped by the collector
        gc.collect()
        assert engine.generate([[3]], GREEDY)[0].token_ids == expected([3], GREEDY)


def test_result_of_a_stream_that_is_not_through() -> None:
    with make_engine() as engine, engine.stream([1], GREEDY) as stream:
        with pytest.raises(EngineError, match="the answer is not finished; read the stream to its end first"):
            _ = stream.result


def test_threads_share_the_engine() -> None:
    results: dict[int, Result] = {}
    with make_engine() as engine:

        def ask(i: int) -> None:
            results[i] = engine.generate([PROMPTS[i]], GREEDY)[0]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [results[i].token_ids for i in range(len(PROMPTS))] == [expected(prompt, GREEDY) for prompt in PROMPTS]


def test_logits_are_those_of_every_prefix() -> None:
    with make_engine(FakeExecutor(max_tokens=10, max_rows=4)) as engine:
        ids = [3, 9, 27, 81, 5, 4, 3, 2, 1, 17, 18]
        logits = engine.logits(ids)
        assert logits.dtype == np.float32
        np.testing.assert_array_equal(logits, [hash_rule(ids[: i + 1]) for i in range(len(ids))])
        np.testing.assert_array_equal(engine.logits(ids[:2]), logits[:2])
        for start in range(len(ids)):
            np.testing.assert_array_equal(engine.logits(ids, start=start), logits[start:])
        for start in (-1, len(ids)):
            with pytest.raises(EngineError, match=f"start: found {start}, expected 0 to 10, a place in the sequence"):
                engine.logits(ids, start=start)


def test_chat_messages_and_raw_text() -> None:
    with make_engine() as engine:
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
        assert engine.tokenizer.decode(engine.encode(chat)) == "user: a\nassistant: b\nuser: c\nassistant:"
        assert engine.encode("hello", raw=True) == engine.tokenizer.encode("hello")
        assert engine.encode(np.array([4, 5])) == [4, 5]  # type: ignore[arg-type]
        one = engine.generate(chat, GREEDY)
        assert len(one) == 1 and one[0].prompt_token_ids == engine.encode(chat)
        assert len(engine.generate("hello", GREEDY)) == len(engine.generate([4, 5], GREEDY)) == 1
        assert engine.generate([], GREEDY) == []


def test_parameters_of_their_own_for_each_prompt() -> None:
    with make_engine() as engine:
        results = engine.generate([[1], [1]], [GREEDY, SamplingParams(temperature=0, max_new_tokens=3)])
        assert [len(result.token_ids) for result in results] == [10, 3]
        with pytest.raises(EngineError, match="sampling parameters: found 1, expected 2, one a prompt"):
            engine.generate([[1], [1]], [GREEDY])
        for wrong in ({"seed": 1}, [{"seed": 1}], 5):
            with pytest.raises(EngineError, match=r"params(\[0\])?: found (dict|5 \(int\)), expected SamplingParams"):
                engine.generate([[1]], wrong)  # type: ignore[arg-type]


def test_manifest_defaults_are_used() -> None:
    defaults = GenerationDefaults(max_new_tokens=4, temperature=0.0, repetition_penalty=1.1)
    with make_engine(generation=defaults) as engine:
        (result,) = engine.generate([[5, 6]])
    assert result.token_ids == expected([5, 6], SamplingParams(temperature=0, repetition_penalty=1.1, max_new_tokens=4))


def test_a_request_is_resolved_as_it_is_served() -> None:
    with make_engine() as engine:
        request = engine.resolve("hello", SamplingParams(seed=1, top_k=5, stop="x"))  # type: ignore[arg-type]
        assert request == Request(tuple(engine.encode("hello")), 12, 0.7, 5, 0.9, 1.2, 1, ("x",), (EOS,), 0, *NOTHING_ELSE)
        assert engine.resolve("hello", SamplingParams(ignore_eos=True), raw=True).prompt == tuple(
            engine.tokenizer.encode("hello")
        )
        (result,) = engine.generate([list(request.prompt)], SamplingParams(0.7, 5, 0.9, 1.2, 1, 12, ("x",)))
        assert engine.generate(["hello"], SamplingParams(seed=1, top_k=5, stop="x"))[0].token_ids == result.token_ids  # type: ignore[arg-type]


def test_default_length_yields_to_the_context_but_a_wanted_one_is_refused() -> None:
    with make_engine(FakeExecutor(max_blocks=2)) as engine:  # 32 tokens; the defaults want 12 new ones
        (result,) = engine.generate([[1] * 30], SamplingParams(temperature=0))
        assert len(result.token_ids) == 2 and result.finish_reason == "length"
        with pytest.raises(EngineError, match="prompt and max_new_tokens are too long: found 40 tokens, expected at most 32"):
            engine.generate([[1] * 30], GREEDY)
        with pytest.raises(EngineError, match=r"the prompt and one token are too long: found 33 tokens.*longest context"):
            engine.generate([[1] * 32])
        with pytest.raises(EngineError, match="the token sequence is too long: found 33 tokens"):
            engine.logits([1] * 33)
    with make_engine(FakeExecutor(num_blocks=1)) as engine:
        with pytest.raises(EngineError, match="found 20 tokens, expected at most 16, the KV cache's capacity; load with more"):
            engine.generate([[1] * 19])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1, 300], "a token id: found 300, expected 0 to 299"),
        ([-1], "a token id: found -1"),
        ([], "the prompt: found no tokens, expected text, chat messages or token ids"),
        ([1.5], "the prompt: found float"),
        ([{"role": "user"}], "a chat message does not fit"),
    ],
)
def test_prompts_that_do_not_fit(prompt: list[object], message: str) -> None:
    with make_engine() as engine, pytest.raises(EngineError, match=message):
        engine.generate([prompt])  # type: ignore[list-item]


def test_timings_add_up() -> None:
    with make_engine() as engine:
        (result,) = engine.generate([[1, 2, 3]], GREEDY)
        (one,) = engine.generate([[1]], SamplingParams(max_new_tokens=1))
    timings = result.timings
    assert 0 < timings.prefill_s <= timings.first_token_s and timings.decode_s > 0
    assert timings.tokens_per_second == pytest.approx(9 / timings.decode_s)
    assert one.timings.decode_s == one.timings.tokens_per_second == 0


def test_step_that_fails_ends_its_requests_and_the_engine_goes_on() -> None:
    executor = FakeExecutor()
    with make_engine(executor) as engine:
        executor.failure = RuntimeError("kernel broke")
        with pytest.raises(RuntimeError, match="kernel broke"):
            engine.generate(PROMPTS[:2], GREEDY)
        executor.failure = RuntimeError("again")
        with pytest.raises(RuntimeError, match="again"):
            list(engine.stream([1], GREEDY))
        assert engine.generate([[3]], GREEDY)[0].token_ids == expected([3], GREEDY)


def test_logits_that_are_not_finite_end_one_request_only() -> None:
    def rule(context: list[int]) -> np.ndarray:
        return np.full(300, np.nan, np.float32) if context[0] == 9 and len(context) > 4 else hash_rule(context)

    with make_engine(FakeExecutor(rule)) as engine:
        good, bad = engine.stream([3], GREEDY), engine.stream([9, 9], GREEDY)
        with pytest.raises(EngineError, match="the model's logits are not finite"):
            list(bad)
        list(good)
        assert good.result.token_ids == expected([3], GREEDY)


def test_closed_engine_refuses_and_drops_what_is_under_way() -> None:
    class Slow(FakeExecutor):
        def step(self, batch: StepBatch) -> np.ndarray:
            time.sleep(0.01)
            return super().step(batch)

    executor = Slow()
    engine = make_engine(executor)
    stream = engine.stream([1], SamplingParams(max_new_tokens=100))
    next(stream)
    engine.close()
    engine.close()
    assert executor.closed
    for use in (lambda: list(stream), lambda: engine.generate([[1]]), lambda: engine.logits([1])):
        with pytest.raises(EngineError, match="the engine is closed; load it again"):
            use()


def test_forgotten_engine_closes_itself() -> None:
    executor = FakeExecutor()
    engine = make_engine(executor)
    engine.generate([[1]], GREEDY)
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None and executor.closed


def test_load_refuses_before_it_touches_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"is not an engine: found no manifest\.json"):
        Engine.load(tmp_path)
    directory = make_directory(tmp_path / "e", {"tokenizer.json": byte_tokenizer().to_str().encode()})
    with pytest.raises(EngineError, match='verify: found \'some\', expected "header" or "full"'):
        Engine.load(directory, verify="some")  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"program\.json is missing"):
        Engine.load(directory)
    monkeypatch.setattr("belle_compile.runtime.host.cpu_flags", lambda: frozenset())
    with pytest.raises(EngineError, match="this host cannot run the engine built for cpu: found instruction sets none known"):
        Engine.load(directory)


def test_bos_goes_before_text_only() -> None:
    with make_engine(special_tokens=special_tokens(add_bos=True)) as engine:
        assert engine.encode("x")[0] == 1 and engine.encode([5]) == [5]


def test_n_answers_of_each_prompt_side_by_side() -> None:
    one = SamplingParams(temperature=1.0, seed=11, max_new_tokens=9)
    several = SamplingParams(temperature=1.0, seed=11, max_new_tokens=9, n=3)
    with make_engine() as engine:
        first = [result.token_ids for result in engine.generate(PROMPTS[:2], one)]
        results = engine.generate(PROMPTS[:2], [several, one])
        answers = [result.token_ids for result in results]
        assert [result.prompt_token_ids for result in results] == [PROMPTS[0]] * 3 + [PROMPTS[1]]
        assert (answers[0], answers[3]) == (first[0], first[1]) and len({tuple(answer) for answer in answers[:3]}) == 3
        assert [result.token_ids for result in engine.generate([PROMPTS[0]], several)] == answers[:3]
        requests = engine.resolve(PROMPTS[0], several).answers(3)
        assert [list(engine.stream(request)) for request in requests[1:]] == [
            list(engine.stream(request)) for request in engine.resolve_all([PROMPTS[0]], several)[1:]
        ]
        assert engine.generate(requests[2])[0].token_ids == answers[2]
        greedy = engine.generate(PROMPTS[0], SamplingParams(temperature=0, max_new_tokens=5, n=4))
        assert [result.token_ids for result in greedy] == [greedy[0].token_ids] * 4
        with pytest.raises(EngineError, match="n: found 3, expected 1, for a stream is one answer"):
            engine.stream(PROMPTS[0], several)


def test_a_resolved_request_is_served_as_it_is() -> None:
    with make_engine() as engine:
        request = engine.resolve("hello", SAMPLED)
        assert engine.resolve(request) is request and engine.encode(request) == list(request.prompt)
        (result,) = engine.generate([request])
        assert result.token_ids == engine.generate("hello", SAMPLED)[0].token_ids
        with pytest.raises(EngineError, match="sampling parameters: found a request and parameters, expected one of them"):
            engine.generate([request], SAMPLED)


def test_stop_token_ends_the_answer_and_is_not_in_its_text() -> None:
    with make_engine() as engine:
        answer, length = engine.tokenizer.encode("one.two."), len(engine.encode("q"))
        stop = engine.tokenizer.encode(".")
    with make_engine(FakeExecutor(script_rule(length, answer))) as engine:
        for ignore_eos in (False, True):
            params = SamplingParams(stop_token_ids=stop, ignore_eos=ignore_eos)  # type: ignore[arg-type]
            (result,), streamed = engine.generate(["q"], params), engine.stream("q", params)
            assert "".join(streamed) == result.text == "one" and result.finish_reason == "stop"
            assert result.token_ids == streamed.result.token_ids == answer[: answer.index(stop[0]) + 1]
        held = SamplingParams(temperature=0, stop_token_ids=stop, min_tokens=len(answer) - 1)  # type: ignore[arg-type]
        (result,) = engine.generate(["q"], held)
        assert result.token_ids[-1] == stop[0] and len(result.token_ids) == len(answer)
        assert result.token_ids[answer.index(stop[0])] != stop[0], "another token is in the place of the first"


def test_pieces_carry_the_tokens_that_came_since_the_one_before() -> None:
    with make_engine() as engine:
        answer, length = engine.tokenizer.encode("你好x"), len(engine.encode("q"))
    with make_engine(FakeExecutor(script_rule(length, answer))) as engine:
        for params in (SamplingParams(temperature=0, stop=("xyz",), logprobs=0), SamplingParams(temperature=0)):
            stream = engine.stream("q", params)
            deltas = list(stream.deltas())
            assert "".join(delta.text for delta in deltas) == "你好x"
            assert [token for delta in deltas for token in delta.token_ids] == [*answer, EOS] == stream.result.token_ids
            for delta in deltas:
                ids = None if delta.logprobs is None else tuple(entry.token_id for entry in delta.logprobs)
                assert ids == (delta.token_ids if params.logprobs == 0 else None)
        assert deltas[-1].text == "" and deltas[-1].token_ids == (EOS,)


def test_the_engine_s_own_stop_strings_end_answers() -> None:
    greedy = SamplingParams(temperature=0)
    with make_engine() as plain, make_engine(generation=GenerationDefaults(stop=("好",))) as engine:
        (whole,) = plain.generate(["hello"], greedy)
        (cut,) = engine.generate(["hello"], greedy)
        (other,) = engine.generate(["hello"], SamplingParams(temperature=0, stop=("=",)))
        (off,) = engine.generate(["hello"], SamplingParams(temperature=0, ignore_eos=True, max_new_tokens=12))
    assert (cut.text, cut.finish_reason) == (whole.text.partition("好")[0], "stop") and "好" in whole.text
    assert other.text == whole.text.partition("=")[0] and "好" in off.text
