"""The thread that runs steps while there are jobs. Other threads submit jobs and wait for them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors import Executor, ProfilableExecutor
from belle_compile.runtime.profiling import Recorder
from belle_compile.runtime.serving.candidates import Rows
from belle_compile.runtime.serving.scheduler import Scheduler, Sequence

T = TypeVar("T")


class Job(Protocol):
    """A sequence, and what is done with its logits. All methods are called on the loop's thread."""

    sequence: Sequence
    done: threading.Event

    def start(self) -> None:
        """Take notice that the first step of the sequence is about to run."""
        ...

    def candidates(self) -> int:
        """Return how many of the largest logits of each row of the next step matter; 0 for all."""
        ...

    def accept(self, logits: Rows) -> None:
        """Take the rows of a step, which are valid during this call and may be overwritten; set `done` after the last."""
        ...

    def fail(self, error: BaseException) -> None:
        """End with an error, and set `done`."""
        ...


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


@dataclass(frozen=True)
class _Submitted:
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class _Withdrawn:
    job: Job


class StepLoop:
    """Owns executor and scheduler, and runs steps on a thread of its own, which alone touches them.

    Other threads leave messages for it: jobs, withdrawals, tasks. The lock is held for that only, and the thread never takes
    it, so that a thread which submits never waits for a step, for sampling or for detokenizing.

    A step that fails ends the jobs under way with its error, and the loop goes on with those that come after. A job that
    fails with its rows of a step ends alone.
    """

    def __init__(
        self, executor: Executor, draft_until: int | None = None, after_step: Callable[[], None] = lambda: None
    ) -> None:
        """`draft_until` is passed to the scheduler. `after_step` is called on the loop's thread after each step and message."""
        self.executor = executor
        self.scheduler = Scheduler(executor.batch, executor.num_blocks, draft_until)
        self._jobs: dict[Sequence, Job] = {}
        self._messages: queue.SimpleQueue[_Submitted | _Withdrawn | _Task | None] = queue.SimpleQueue()
        self._after_step = after_step
        self._lock = threading.RLock()  # reentrant: the garbage collector may call `stop` on a thread that holds a lock
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._run_step: Callable[[], None] = self._step

    @property
    def idle(self) -> bool:
        """Whether no job is under way. It may change at any time on another thread."""
        return not self._jobs and self._messages.empty()

    def submit(self, jobs: Iterable[Job]) -> None:
        """Queue jobs, all before the next step; raises `EngineError` when stopped."""
        self._send(_Submitted(tuple(jobs)))

    def withdraw(self, job: Job) -> None:
        """Drop a job before the next step. Takes no lock: the garbage collector may call it anywhere."""
        self._messages.put(_Withdrawn(job))

    def wake(self) -> None:
        """Let the loop's thread, if it runs, call `after_step`. Takes no lock: the garbage collector may call it anywhere."""
        self._messages.put(_Task(lambda: None))

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` between two steps and return what it does; raises `EngineError` when stopped."""
        task = _Task(function)
        self._send(task)
        result: T = task.result()
        return result

    def record(self, recorder: Recorder | None) -> None:
        """Time steps and their kernels from the next step on, or stop doing so."""

        def switch() -> None:
            if recorder and self._run_step != self._step:
                raise EngineError("profile", "the engine is being profiled already", remedy="wait for the other profile to end")
            assert isinstance(self.executor, ProfilableExecutor), "checked by `Engine.profile`"
            self.executor.record(recorder)
            timed = partial(recorder.step, self._step, lambda: self.scheduler.has_work) if recorder else self._step
            self._run_step = timed

        self.call(switch)

    def stop(self) -> None:
        """End the thread after the step under way, drop all jobs, close the executor. A second call does nothing."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            self._messages.put(None)  # wakes the thread up
        if self._thread is None:
            self._end()
        elif self._thread is not threading.current_thread():  # the garbage collector may call this on the loop's thread
            self._thread.join()

    def _send(self, message: _Submitted | _Task) -> None:
        with self._lock:  # so that no message comes after the end
            if self._stopping:
                raise _closed()
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="belle-steps", daemon=True)
                thread.start()
                self._thread = thread
            self._messages.put(message)

    def _run(self) -> None:
        while self._receive():
            try:
                self._run_step()
            except BaseException as error:
                self._fail_all(error)
            self._after_step()
        self._end()

    def _receive(self) -> bool:
        """Handle all messages, and wait for more while there is no work. Returns False once the loop is stopping."""
        while not self._stopping and not (self._messages.empty() and self.scheduler.has_work):
            self._handle(self._messages.get())
            self._after_step()
        return not self._stopping

    def _handle(self, message: _Submitted | _Withdrawn | _Task | None) -> None:
        match message:
            case _Submitted(jobs):
                for job in jobs:
                    self._add(job)
            case _Withdrawn(job):
                self._drop(job)
            case _Task():
                message.run()

    def _step(self) -> None:
        scheduler, batch, jobs = self.scheduler, self.executor.batch, self._jobs
        sequences_needing_logits = scheduler.schedule()
        for sequence in scheduler.admitted:
            jobs[sequence].start()
        if batch.candidates is not None:
            stop = 0
            for sequence in sequences_needing_logits:
                start, stop = stop, stop + sequence.logit_rows
                batch.candidates[start:stop] = jobs[sequence].candidates()
        logits = self.executor.step(batch)
        scheduler.commit()
        stop = 0
        for sequence in sequences_needing_logits:
            job = jobs[sequence]
            start, stop = stop, stop + sequence.logit_rows
            try:
                job.accept(logits[start:stop])
            except Exception as error:  # an error of this job alone, such as logits that are not finite
                job.fail(error)
            if job.done.is_set():
                self._drop(job)

    def _add(self, job: Job) -> None:
        try:
            self.scheduler.add(job.sequence)
        except EngineError as error:
            job.fail(error)
        else:
            self._jobs[job.sequence] = job

    def _drop(self, job: Job) -> None:
        if self._jobs.pop(job.sequence, None):
            self.scheduler.remove(job.sequence)
            if not job.done.is_set():
                job.fail(Withdrawn())

    def _fail_all(self, error: BaseException) -> None:
        for job in list(self._jobs.values()):
            job.fail(error)
            self._drop(job)

    def _end(self) -> None:
        while not self._messages.empty():
            match message := self._messages.get():
                case _Submitted(jobs):
                    for job in jobs:
                        job.fail(_closed())
                case _Task():
                    message.set_exception(_closed())
        self._fail_all(_closed())
        self._after_step()
        self.executor.close()


def _closed() -> EngineError:
    return EngineError("engine", "the engine is closed", remedy="load it again")
