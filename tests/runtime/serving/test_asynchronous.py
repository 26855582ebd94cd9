"""Answers on event loops: the same as of threads, dropped by cancellation, and handed over once a step."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from belle_compile.runtime import Engine, EngineError, SamplingParams
from belle_compile.runtime.engine import AsyncStream
from belle_compile.runtime.executors import StepBatch
from tests.runtime.fakes import FakeExecutor, hash_rule, make_engine

GREEDY = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=10)
LONG = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=100)
PROMPTS = [[7 + i] * (3 + 9 * i) for i in range(6)]
WAIT_S = 10.0


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, WAIT_S))


async def read(stream: AsyncStream) -> list[str]:
    return [piece async for piece in stream]


async def until(holds: Callable[[], bool]) -> None:
    """Wait for what the step thread does. The time limit of `run` ends what never comes."""
    while not holds():
        await asyncio.sleep(0.001)


async def assert_all_blocks_are_free(engine: Engine) -> None:
    """Answer a prompt that needs every block of a cache of as many blocks as the longest context has."""
    assert engine.executor.num_blocks == engine.executor.batch.block_table.shape[1]
    (result,) = await engine.agenerate([[9]], SamplingParams(temperature=0, max_new_tokens=engine.max_context - 1))
    assert len(result.token_ids) == engine.max_context - 1


class SteppedExecutor(FakeExecutor):
    """Each step waits until it is let through."""

    def __init__(self, **limits: int) -> None:
        super().__init__(hash_rule, **limits)
        self.permits = threading.Semaphore(0)

    def step(self, batch: StepBatch) -> np.ndarray:
        assert self.permits.acquire(timeout=WAIT_S)
        return super().step(batch)


def test_answers_are_those_of_generate_and_stream() -> None:
    async def main() -> None:
        params = SamplingParams(temperature=0.8, seed=3, n=2, logprobs=2, max_new_tokens=8)
        results = await engine.agenerate(PROMPTS, params)
        plain = engine.generate(PROMPTS, params)
        assert [(r.token_ids, r.text, r.logprobs) for r in results] == [(r.token_ids, r.text, r.logprobs) for r in plain]
        for prompt, result in zip(PROMPTS, engine.generate(PROMPTS, GREEDY), strict=True):
            stream = engine.astream(prompt, GREEDY)
            pieces = await read(stream)
            assert pieces == list(engine.stream(prompt, GREEDY)) and "".join(pieces) == result.text
            assert stream.result.token_ids == result.token_ids and await read(stream) == []

    with make_engine() as engine:
        run(main())


def test_pieces_with_their_tokens_and_log_probabilities() -> None:
    async def main() -> None:
        params = SamplingParams(temperature=0, max_new_tokens=10, logprobs=1)
        stream = engine.astream([5], params)
        deltas = [delta async for delta in stream.deltas()]
        assert deltas == list(engine.stream([5], params).deltas())
        assert [token for delta in deltas for token in delta.token_ids] == stream.result.token_ids
        assert [entry for delta in deltas for entry in delta.logprobs or ()] == stream.result.logprobs

    with make_engine() as engine:
        run(main())


def test_no_thread_for_a_request() -> None:
    async def main() -> None:
        before = threading.active_count()
        streams = [asyncio.create_task(read(engine.astream([3 + i], LONG))) for i in range(40)]
        await until(lambda: len(executor.steps) > 20)
        assert threading.active_count() <= before + 1, "the step thread alone"
        await asyncio.gather(*streams)

    executor = FakeExecutor(max_rows=64, max_sequences=64, max_tokens=64, num_blocks=400)
    with make_engine(executor) as engine:
        run(main())


def test_one_call_a_step_and_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen streams and four other answers: their tokens of one step come in one call at most."""
    calls: list[int] = []  # the number of steps at each call

    async def main() -> None:
        event_loop = asyncio.get_running_loop()
        call_soon_threadsafe = event_loop.call_soon_threadsafe

        def counted(function: Callable[..., Any], *arguments: Any, **options: Any) -> asyncio.Handle:
            calls.append(len(executor.steps))
            return call_soon_threadsafe(function, *arguments, **options)

        monkeypatch.setattr(event_loop, "call_soon_threadsafe", counted)
        streams = [read(engine.astream([3 + i], LONG)) for i in range(16)]
        texts = await asyncio.gather(*streams, engine.agenerate([[40 + i] for i in range(4)], GREEDY))
        monkeypatch.undo()
        assert all(texts)

    executor = FakeExecutor(max_rows=64, max_sequences=64, max_tokens=64, num_blocks=400)
    with make_engine(executor) as engine:
        run(main())
        assert len(calls) == len(set(calls)) <= len(executor.steps), "two calls within one step"
        assert len(calls) > 10, "pieces come as they are generated; one call may do for steps that the event loop is late for"


def test_event_loops_of_several_threads_share_the_engine() -> None:
    texts: dict[int, str] = {}

    def ask(i: int) -> None:
        async def main() -> None:
            texts[i] = "".join(await read(engine.astream(PROMPTS[i], GREEDY)))

        run(main())

    with make_engine() as engine:
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [texts[i] for i in range(len(PROMPTS))] == [result.text for result in engine.generate(PROMPTS, GREEDY)]


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    "use", [lambda engine: read(engine.astream([5] * 20, LONG)), lambda engine: engine.agenerate([[5] * 20, [6] * 20], LONG)],
    ids=["astream", "agenerate"],
)  # fmt: skip
def test_cancelling_the_task_drops_its_requests_within_a_step(use: Callable[[Engine], Coroutine[Any, Any, Any]]) -> None:
    async def main() -> None:
        task = asyncio.create_task(use(engine))
        executor.permits.release(5)
        await until(lambda: len(executor.steps) == 5)
        await cancel(task)
        executor.permits.release(1000)
        await assert_all_blocks_are_free(engine)
        # At most one more step, which the thread had begun, and those of the prompt that needs all blocks.
        assert len(executor.steps) <= 5 + 1 + engine.max_context - 1

    executor = SteppedExecutor(num_blocks=8)
    with make_engine(executor) as engine:
        run(main())


def test_a_task_that_is_cancelled_at_other_work_drops_its_request() -> None:
    async def main() -> None:
        async def reader() -> None:
            async for _ in engine.astream([5], LONG):
                await asyncio.sleep(WAIT_S)  # a client that reads slowly

        task = asyncio.create_task(reader())
        await until(lambda: len(executor.steps) > 2)
        await asyncio.sleep(0)
        await cancel(task)
        del task
        gc.collect()
        executor.permits.release(1000)
        await assert_all_blocks_are_free(engine)
        assert len(executor.steps) <= 50 + 1 + engine.max_context - 1

    executor = SteppedExecutor(num_blocks=8)
    executor.permits.release(50)  # half of the answer
    with make_engine(executor) as engine:
        run(main())


def test_leaving_a_stream_drops_its_request() -> None:
    async def main() -> None:
        async with engine.astream([5], LONG) as stream:
            await anext(stream)
        executor.permits.release(1000)
        await assert_all_blocks_are_free(engine)
        with pytest.raises(EngineError, match="the answer is not finished; read the stream to its end first"):
            _ = stream.result
        with pytest.raises(EngineError, match="the request was withdrawn"):
            await read(stream)

    executor = SteppedExecutor(num_blocks=8)
    executor.permits.release(50)  # half of the answer
    with make_engine(executor) as engine:
        run(main())


def test_a_reader_that_comes_late_misses_nothing() -> None:
    async def main() -> None:
        stream = engine.astream([5], LONG)
        await until(lambda: len(executor.steps) == 100)
        assert "".join(await read(stream)) == engine.generate([[5]], LONG)[0].text

    executor = FakeExecutor()
    with make_engine(executor) as engine:
        run(main())


def test_one_reader_a_stream() -> None:
    async def main() -> None:
        stream = engine.astream([5], GREEDY)
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match="the stream is read by another task: expected one reader"):
            await anext(stream)
        executor.permits.release(10)
        assert await first + "".join(await read(stream)) == stream.result.text

    executor = SteppedExecutor()
    with make_engine(executor) as engine:
        run(main())


def test_errors_come_where_the_answer_is_awaited() -> None:
    async def main() -> None:
        uses: list[Callable[[], Coroutine[Any, Any, Any]]] = [
            lambda: read(engine.astream([1], GREEDY)),
            lambda: engine.agenerate([[1], [2]], GREEDY),
        ]
        for use in uses:
            executor.failure = RuntimeError("kernel broke")
            with pytest.raises(RuntimeError, match="kernel broke"):
                await use()
        with pytest.raises(EngineError, match="a token id: found 300"):
            engine.astream([300])
        with pytest.raises(EngineError, match=r"n: found 2, expected 1, for a stream is one answer; stream each of Engine"):
            engine.astream([1], SamplingParams(n=2))
        assert (await engine.agenerate([], GREEDY)) == []
        engine.close()
        for use in uses:
            with pytest.raises(EngineError, match="the engine is closed; load it again"):
                await use()

    executor = FakeExecutor()
    with make_engine(executor) as engine:
        run(main())


def test_closing_the_engine_ends_what_is_awaited() -> None:
    async def main() -> None:
        tasks = [asyncio.create_task(read(engine.astream([1], LONG))), asyncio.create_task(engine.agenerate([[2]], LONG))]
        await until(lambda: len(executor.steps) > 2)
        await asyncio.to_thread(engine.close)
        for task in tasks:
            with pytest.raises(EngineError, match="the engine is closed; load it again"):
                await task

    executor = SteppedExecutor()
    executor.permits.release(20)
    engine = make_engine(executor)
    timer = threading.Timer(0.2, executor.permits.release, (1,))  # the step that `close` waits for
    timer.start()
    run(main())
    timer.join()


def test_an_event_loop_that_is_closed_harms_no_other_request() -> None:
    async def leave() -> AsyncStream:
        return engine.astream([5], LONG)

    executor = SteppedExecutor()
    with make_engine(executor) as engine:
        forgotten = asyncio.run(leave())
        executor.permits.release(200)
        (result,) = engine.generate([[3]], GREEDY)
        assert len(result.token_ids) == 10
        forgotten.close()


def test_without_an_event_loop_nothing_is_submitted() -> None:
    executor = FakeExecutor()
    with make_engine(executor) as engine:
        with pytest.raises(RuntimeError, match="no running event loop"):
            engine.astream([5], GREEDY)
    assert executor.steps == []


def test_a_shortcut_takes_pieces_only_while_the_reader_waits() -> None:
    """Otherwise a piece would overtake those that the reader has not passed on yet."""

    async def main() -> None:
        taken: list[tuple[int, str]] = []
        declined: list[str] = []

        def shortcut(index: int, piece: tuple[str, int]) -> bool:
            (declined if len(taken) == 4 else taken).append((index, piece[0]))  # type: ignore[arg-type]
            return not declined

        async def pieces(count: int) -> None:
            """Let steps run until the event loop has got so many pieces."""
            before = len(executor.steps)
            executor.permits.release(count)
            await until(lambda: len(executor.steps) == before + count)
            await asyncio.sleep(0.01)

        request = engine.resolve([7], SamplingParams(temperature=0, max_new_tokens=20, logit_bias={70: 100}))
        text = engine.tokenizer.decode([70])
        with engine.astream_all([request]) as streams:
            streams.take_shortcut(shortcut)
            await pieces(3)
            assert not taken, "nobody waits"
            assert [piece for _, piece in await streams.ready() if piece] == [(text, 2), (text, 3), (text, 4)]
            await pieces(1)
            assert not taken, "the reader is busy"
            assert await streams.ready() == [(0, (text, 5))]
            waiting = asyncio.ensure_future(streams.ready())
            await asyncio.sleep(0)
            await pieces(4)
            assert taken == [(0, text)] * 4 and not waiting.done()
            await pieces(2)
            assert len(taken) == 4 and len(declined) == 1, "the reader is about to get the piece that was declined"
            events = await waiting
            executor.permits.release(100)
            while events[-1][1] is not None:
                events += await streams.ready()
            assert [event for event in events if event[1] is None] == events[-1:]
            assert streams.result(0).text == text * 20

    executor = SteppedExecutor()
    with make_engine(executor) as engine:
        run(main())
        executor.permits.release(1000)
