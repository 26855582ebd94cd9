"""An engine in a process that was forked after it was loaded: one sentence, and nothing of the parent is touched."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from belle_compile.runtime import Engine, SamplingParams
from belle_compile.runtime.forks import finalize
from belle_compile.runtime.serving.grammar.source import Grammar
from belle_compile.runtime.serving.result_cache.options import ResultCacheOptions
from tests.runtime.fakes import make_engine

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
WAIT_S = 20.0
PARAMS = SamplingParams(temperature=0, max_new_tokens=3)


def in_fork(function: Callable[[], Any]) -> str:
    """What a function says in a fork of this process: "returned", or its error."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            function()
            said = "returned"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    timer = threading.Timer(WAIT_S, os.kill, (child, signal.SIGKILL))
    timer.start()
    with os.fdopen(reading, encoding="utf-8") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    timer.cancel()
    return said or "hangs"


USES: dict[str, Callable[[Engine], Any]] = {
    "generate": lambda engine: engine.generate("hi", PARAMS),
    "stream": lambda engine: list(engine.stream("hi", PARAMS)),
    "agenerate": lambda engine: asyncio.run(engine.agenerate("hi", PARAMS)),
    "logits": lambda engine: engine.logits([3, 4]),
    "profile": lambda engine: engine.profile().__enter__(),
    "grammar": lambda engine: engine.resolve("hi", SamplingParams(grammar=Grammar("regex", "a*"))),
    "stats": lambda engine: engine.stats(),
}


@pytest.mark.parametrize("used", [True, False], ids=["used", "unused"])
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
def test_a_fork_gets_one_sentence(used: bool, cached: bool) -> None:
    with make_engine(result_cache=ResultCacheOptions() if cached else None) as engine:
        if used:
            engine.generate("hi", PARAMS)
        for name, use in USES.items():
            said = in_fork(lambda use=use: use(engine))  # type: ignore[misc]
            assert said.startswith("EngineError: engine: the engine was loaded before this process was forked; load it"), (
                name,
                said,
            )
        assert in_fork(lambda: engine.encode("hi")) == in_fork(engine.close) == "returned"
        assert in_fork(lambda: not engine.alive(0.1) or os.abort()) == "returned"
        assert engine.alive(WAIT_S) and engine.generate("hi", PARAMS)[0].token_ids


def test_a_stream_that_a_fork_goes_on_reading() -> None:
    with make_engine() as engine, engine.stream("hi", SamplingParams(max_new_tokens=30, seed=1)) as stream:
        first = next(stream)
        assert in_fork(lambda: next(stream)).startswith("EngineError: engine: the engine was loaded before")
        assert first + "".join(stream) == stream.result.text


def test_a_fork_of_an_engine_that_is_busy() -> None:
    """Whatever the other threads hold at that moment."""
    with make_engine(result_cache=ResultCacheOptions()) as engine:
        ended = threading.Event()

        def ask() -> None:
            while not ended.is_set():
                engine.generate(["hi", "you"], SamplingParams(max_new_tokens=3))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(10):
                time.sleep(0.01)
                assert in_fork(lambda: engine.generate("hi", PARAMS)).startswith("EngineError: engine: the engine was")
        finally:
            ended.set()
            for thread in threads:
                thread.join(WAIT_S)


def test_finalizers_run_in_their_process_only() -> None:
    class Subject:
        pass

    calls: list[int] = []
    subject = Subject()
    end = finalize(subject, calls.append, 1)

    def in_child() -> None:
        end()
        assert not calls

    assert in_fork(in_child) == "returned" and not calls
    del subject
    assert calls == [1] and end() is None
