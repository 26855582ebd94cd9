"""The thread that runs steps while there are requests; everyone else submits and waits."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors import Executor
from belle_compile.runtime.profiling import Recorder
from belle_compile.runtime.serving.generation import Generation
from belle_compile.runtime.serving.scheduler import Scheduler, Sequence

T = TypeVar("T")


class _Task(Future[Any]):
    """A function that the loop runs for another thread."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__()
        self._function = function

    def run(self) -> None:
        try:
            self.set_result(self._function())
        except BaseException as error:
            self.set_exception(error)


class StepLoop:
    """Owns executor and scheduler. One thread only runs steps.

    A step that fails ends the requests under way with its error; the loop goes on with those that come after.
    """

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.scheduler = Scheduler(executor.batch, executor.num_blocks)
        self._generations: dict[Sequence, Generation] = {}
        self._tasks: deque[_Task] = deque()
        self._withdrawn: deque[Generation] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._run_step: Callable[[], None] = self._step

    def submit(self, generations: Iterable[Generation]) -> None:
        """Queue requests, all before the next step; raises `EngineError` when stopped."""
        with self._changed:
            self._start()
            for generation in generations:
                self.scheduler.add(generation.sequence)
                self._generations[generation.sequence] = generation
            self._changed.notify()

    def withdraw(self, generation: Generation) -> None:
        """Drop a request before the next step. Takes no lock: the garbage collector may call it anywhere."""
        self._withdrawn.append(generation)

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` between two steps and return what it does; raises `EngineError` when stopped."""
        task = _Task(function)
        with self._changed:
            self._start()
            self._tasks.append(task)
            self._changed.notify()
        result: T = task.result()
        return result

    def record(self, recorder: Recorder | None) -> None:
        """Time steps and their kernels from the next step on, or stop doing so."""

        def switch() -> None:
            if recorder and self._run_step != self._step:
                raise EngineError("profile", "the engine is being profiled already", remedy="wait for the other profile to end")
            self.executor.record(recorder)
            timed = partial(recorder.step, self._step, lambda: self.scheduler.has_work) if recorder else self._step
            self._run_step = timed

        self.call(switch)

    def stop(self) -> None:
        """End the thread after the step under way, drop all requests, close the executor; a second time does nothing."""
        with self._changed:
            if self._stopping:
                return
            self._stopping = True
            self._changed.notify()
        if self._thread is None:
            self._end()
        elif self._thread is not threading.current_thread():  # the collector may end us on our own thread
            self._thread.join()

    def _start(self) -> None:
        if self._stopping:
            raise _closed()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="belle-steps", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._stopping or self._tasks or self.scheduler.has_work):
                    self._changed.wait()
                if self._stopping:
                    break
                task = self._tasks.popleft() if self._tasks else None
            if task:
                task.run()
                continue
            try:
                self._run_step()
            except BaseException as error:
                self._fail_all(error)
        self._end()

    def _end(self) -> None:
        self._fail_all(_closed())
        while self._tasks:
            self._tasks.popleft().set_exception(_closed())
        self.executor.close()

    def _step(self) -> None:
        with self._changed:
            while self._withdrawn:
                self._drop(self._withdrawn.popleft())
            wanting = self.scheduler.schedule()
            for sequence in self.scheduler.running:
                self._generations[sequence].start()
            if self.executor.batch.candidates is not None:
                self._count_candidates(wanting, self.executor.batch.candidates)
        if not self.scheduler.running:
            return
        logits = self.executor.step()
        with self._changed:
            self.scheduler.commit()
            stop = 0
            for sequence in wanting:
                generation = self._generations[sequence]
                start, stop = stop, stop + 1 + sequence.drafted
                try:
                    generation.accept(logits[start:stop])
                except EngineError as error:  # this request's alone, such as logits that are not finite
                    generation.fail(error)
                if generation.done.is_set():
                    self._drop(generation)

    def _count_candidates(self, wanting: list[Sequence], candidates: NDArray[np.int32]) -> None:
        stop = 0
        for sequence in wanting:
            start, stop = stop, stop + 1 + sequence.drafted
            candidates[start:stop] = self._generations[sequence].candidates()

    def _drop(self, generation: Generation) -> None:
        if self._generations.pop(generation.sequence, None):
            self.scheduler.remove(generation.sequence)
            if not generation.done.is_set():
                generation.fail(EngineError("request", "the request was withdrawn"))

    def _fail_all(self, error: BaseException) -> None:
        with self._changed:
            for generation in list(self._generations.values()):
                generation.fail(error)
                self._drop(generation)


def _closed() -> EngineError:
    return EngineError("engine", "the engine is closed", remedy="load it again")
