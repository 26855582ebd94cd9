"""The thread that runs steps while there are jobs. Other threads submit jobs and wait for them."""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from typing import Any, TypeVar

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors import Executor, ProfilableExecutor
from belle_compile.runtime.forks import Owner
from belle_compile.runtime.profiling import Recorder
from belle_compile.runtime.serving.admission import Deadlines, Gate
from belle_compile.runtime.serving.arrivals import Arrivals
from belle_compile.runtime.serving.draft_model import DraftModel
from belle_compile.runtime.serving.messages import Job, Message, Resumed, Submitted, Task, Watched, Withdrawal
from belle_compile.runtime.serving.request import EngineIdentity
from belle_compile.runtime.serving.result_cache.store import CacheStats
from belle_compile.runtime.serving.scheduler import Scheduler
from belle_compile.runtime.serving.scheduling import DeadlineExceeded, SchedulerOptions, Withdrawn
from belle_compile.runtime.serving.sequence import Sequence
from belle_compile.runtime.serving.telemetry import End, EngineStats, StepRecord, Telemetry

_log = logging.getLogger(__name__)

_MESSAGES_S = 0.05  # for which a step waits until messages are handled
ARRIVALS_S = 0.01  # for which the first step of an idle loop waits until what arrives with its jobs is submitted
# For which a step waits for jobs that could not take their rows of the last one, and would miss it: at most this long, and at
# most this share of the last step's time.
_PATIENCE_S, _PATIENCE_SHARE = 0.001, 0.05

T = TypeVar("T")


class StepLoop:
    """Owns executor and scheduler, and runs steps on a thread of its own, which alone touches them.

    Other threads leave messages for it: jobs, withdrawals, tasks. The lock is held for that only, and while the thread runs
    steps it never takes it, so that a thread which submits never waits for a step, for sampling or for detokenizing.

    A job that waits for something of its own, such as what its grammar allows next, keeps its rows of the step and is in no
    further step until it has taken them; the steps of the others go on meanwhile.

    A step or a message that fails ends the jobs under way with its error, and the loop goes on with those that come after, with
    an empty cache unless the executor has failed: which blocks are in use is not known then. A job that fails with its rows of
    a step ends alone. Any other error ends the thread: all jobs end with one error, and so do those that come later.
    """

    def __init__(
        self,
        executor: Executor,
        options: SchedulerOptions | None = None,
        identity: EngineIdentity | None = None,
        dynamic_rope_from: int | None = None,
        after_step: Callable[[], None] = lambda: None,
        telemetry: Telemetry | None = None,
        drafts: DraftModel | None = None,
    ) -> None:
        """`options`, `dynamic_rope_from`, `identity` and `drafts` are passed to the scheduler. `after_step` is called on the
        loop's thread after each step and message."""
        options = options or SchedulerOptions()
        self.executor = executor
        self.owner = Owner()
        self.arrivals = Arrivals(executor.batch.max_tokens)
        self.scheduler = Scheduler(executor.batch, executor.num_blocks, options, dynamic_rope_from, identity, drafts)
        self._drafts = drafts
        # What is done with a job whose time is over, which may be one that was not submitted here but only watched.
        self.give_up: Callable[[Job, EngineError], None] = self.withdraw
        self._jobs: dict[Sequence, Job] = {}
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._after_step = after_step
        self._telemetry = telemetry
        self._gate = Gate(options.max_queue, self.scheduler.free_slots, options.first_token)
        self._deadlines: Deadlines[Job] = Deadlines()
        self._lock = threading.RLock()  # reentrant: the garbage collector may call `stop` on a thread that holds a lock
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._death: EngineError | None = None
        self._run_step: Callable[[], None] = self._step
        self._executing = False  # whether the executor computes, or has failed to
        self._starved = False  # whether there was nothing to compute when the last message was handled
        self._steps = self._prompt_tokens = self._generated_tokens = self._accepted_tokens = 0
        self._token_gaps: list[float] = []  # that were not reported yet
        self._awaited: set[Future[Any]] = set()  # what jobs wait for since the last step
        self._patient_until = 0.0
        self._last_step_at: float | None = None

    @property
    def idle(self) -> bool:
        """Whether no job is under way. It may change at any time on another thread."""
        return not self._jobs and self._messages.empty()

    def submit(self, jobs: Iterable[Job]) -> None:
        """Queue jobs, all before the next step; raises `EngineError` when stopped, and `QueueFull`."""
        submitted = tuple(jobs)
        sequences = [job.sequence for job in submitted]
        try:
            self._send(Submitted(submitted), lambda: self._gate.enter(sequences, time.monotonic()))
        except BaseException:
            self._gate.taken_back(sequences)
            raise
        self.arrivals.submitted(sum(sequence.length for sequence in sequences))

    def withdraw(self, job: Job, error: EngineError | None = None) -> None:
        """Drop a job before the next step; it ends with `error`, by default `Withdrawn`.

        Takes no lock: the garbage collector may call it anywhere.
        """
        self._messages.put(Withdrawal(job, error or Withdrawn()))

    def watch(self, job: Job) -> None:
        """Call `give_up` when the time of a job that is not submitted here is over, unless it has ended before."""
        self._send(Watched(job))

    def wake(self) -> None:
        """Let the loop's thread, if it runs, call `after_step`. Takes no lock: the garbage collector may call it anywhere."""
        self._messages.put(Task(lambda: None))

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` between two steps and return what it does; raises `EngineError` when stopped."""
        task = Task(function)
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

    def stats(self, requests: Mapping[End, int], result_cache: CacheStats | None) -> EngineStats:
        """Return what was counted; `requests` and `result_cache` are added to it. May be called on any thread."""
        scheduler, pool, prefixes = self.scheduler, self.scheduler.pool, self.scheduler.prefixes
        running = len(scheduler.running)
        return EngineStats(
            running=running,
            waiting=max(0, len(self._jobs) - running),
            preemptions=scheduler.preemptions,
            recomputed_tokens=scheduler.recomputed_tokens,
            refusals=self._gate.refusals,
            kv_blocks=pool.num_blocks,
            kv_blocks_used=pool.used,
            kv_blocks_cached=pool.cached,
            evictions=pool.evictions,
            prefix_hits=prefixes.hits if prefixes else 0,
            prefix_queries=prefixes.queries if prefixes else 0,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            steps=self._steps,
            drafted_tokens=scheduler.drafted_tokens,
            accepted_tokens=self._accepted_tokens,
            requests=requests,
            last_step_at=self._last_step_at,
            result_cache=result_cache,
        )

    def adapters_in_use(self) -> tuple[frozenset[str], frozenset[str]]:
        """The digests of the adapters of running and of waiting sequences. May be called on any thread."""
        running = tuple(self.scheduler.running)
        waiting = {*tuple(self._jobs)} - {*running}
        used, wanted = (frozenset(each.adapter for each in some if each.adapter) for some in (running, waiting))
        return used, wanted

    def alive(self, within_s: float) -> bool:
        """Whether a step ended in the last `within_s` seconds, or the thread answers a message in as many. A loop that has had
        nothing to do yet is alive; one that was stopped or whose thread has died is not, and neither is one in a fork."""
        if self._stopping or self._death or not self.owner.here:
            return False
        last = self._last_step_at
        if self._thread is None or (last is not None and time.monotonic() - last <= within_s):
            return True
        task = Task(lambda: None)
        try:
            self._send(task)
            task.result(within_s)
        except (EngineError, FutureTimeoutError):
            return False
        return True

    def stop(self) -> None:
        """End the thread after the step under way, drop all jobs, close the executor. A second call does nothing."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            self._messages.put(None)  # wakes the thread up
        if self._thread is None:
            self._end(_closed())
            self._close_executors()
        elif self._thread is not threading.current_thread():  # the garbage collector may call this on the loop's thread
            self._thread.join()
            if self._death:
                self._close_executors()

    def _close_executors(self) -> None:
        self.executor.close()
        if self._drafts:
            self._drafts.close()

    def _send(self, message: Submitted | Watched | Task, check: Callable[[], None] = lambda: None) -> None:
        self.owner.check()  # before the lock, which another thread may have held at the fork
        with self._lock:  # so that no message comes after the end
            if self._stopping:
                raise _closed()
            if self._death:
                raise self._death
            check()
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="belle-steps", daemon=True)
                thread.start()
                self._thread = thread
            self._messages.put(message)

    def _run(self) -> None:
        try:
            while self._receive():
                try:
                    self._run_step()
                except Exception as error:
                    self._fail_all(error)
                self._after_step()
        except BaseException as error:  # not of a step or a message: what the loop would do next is not known
            self._die(error)
            return
        self._end(_closed())
        self._close_executors()

    def _receive(self) -> bool:
        """Handle the messages that are there before a step, wait for more while there is nothing to compute, and a moment for
        jobs that would miss the step. Returns False once the loop is stopping. Messages that come meanwhile, or that take too
        long, wait for the step: those who send many must not keep it from running."""
        most, until = self._messages.qsize(), time.monotonic() + _MESSAGES_S
        while not self._stopping:
            now = time.monotonic()
            for job in self._deadlines.over(now):
                self._try(partial(self.give_up, job, DeadlineExceeded()))
                most = self._messages.qsize()  # it may have left a message
            empty = not self.scheduler.has_work
            idle = empty or self._starved
            patience_s = self._patient_until - now if self._awaited else 0.0
            if not idle and (most <= 0 or now > until) and patience_s <= 0:
                break
            with contextlib.suppress(queue.Empty):
                message = self._messages.get(timeout=self._deadlines.wait_s(now) if idle else max(0.0, patience_s))
                self._try(partial(self._handle, message))
            most -= 1
            if idle:
                if empty and self.scheduler.has_work:
                    self.arrivals.wait(ARRIVALS_S)
                most, until = self._messages.qsize(), time.monotonic() + _MESSAGES_S
            self._after_step()
        return not self._stopping

    def _handle(self, message: Message) -> None:
        self._starved = False
        match message:
            case Submitted(jobs):
                self._jobs.update((job.sequence, job) for job in jobs)  # so that all end, should one of them not be added
                for job in jobs:
                    self._add(job)
            case Withdrawal(job, error):
                self._drop(job, error)
            case Watched(job):
                self._deadlines.add(job)
            case Resumed(job, awaited):
                self._awaited.discard(awaited)
                if job.sequence in self._jobs:
                    self._advance(job, job.resume)
            case Task():
                message.run()

    def _step(self) -> None:
        started = time.monotonic()
        self.arrivals.taken()
        scheduler, batch, jobs = self.scheduler, self.executor.batch, self._jobs
        sequences_needing_logits = scheduler.schedule()
        for sequence in scheduler.begun:
            jobs[sequence].start()
        if scheduler.picked:
            self._gate.left(scheduler.picked, started)
        self._gate.set_free(0 if scheduler.waiting else scheduler.free_slots - len(scheduler.held))
        if not batch.tokens:
            self._starved = True
            return
        self._awaited.clear()
        if batch.candidates is not None:
            stop = 0
            for sequence in sequences_needing_logits:
                start, stop = stop, stop + sequence.logit_rows
                batch.candidates[start:stop] = jobs[sequence].candidates()
        self._executing, began = True, time.perf_counter()
        logits = self.executor.step(batch)
        self._executing = False
        if self._drafts and not scheduler.prompt_tokens:
            self._drafts.lengths.verify.add(batch.tokens, time.perf_counter() - began)
        scheduler.commit()
        stop = 0
        for sequence in sequences_needing_logits:
            start, stop = stop, stop + sequence.logit_rows
            job = jobs[sequence]
            self._advance(job, partial(job.accept, logits[start:stop]))
        self._note_step(started)

    def _advance(self, job: Job, take: Callable[[], Future[Any] | None]) -> None:
        """Let a job take rows of logits, and count the tokens that it gets from them."""
        sequence, awaited = job.sequence, None
        length, accepted = sequence.length, sequence.accepted_tokens
        try:
            awaited = take()
        except Exception as error:  # an error of this job alone, such as logits that are not finite
            job.fail(error)
        if sequence.length > length:
            self._generated_tokens += sequence.length - length
            self._accepted_tokens += sequence.accepted_tokens - accepted
            now = time.monotonic()
            if sequence.last_token_at:
                self._token_gaps.append(now - sequence.last_token_at)
            sequence.last_token_at = now
        if job.done.is_set():
            self._drop(job, Withdrawn())
        elif awaited:
            self._awaited.add(awaited)
            awaited.add_done_callback(partial(self._resume, job))

    def _resume(self, job: Job, awaited: Future[Any]) -> None:
        """Let a job take the rows that it keeps. Called on the thread that has what it waited for."""
        resumed = Resumed(job, awaited)
        try:
            self._messages.put(resumed)
        except MemoryError:  # it tries again once: without the message the job would wait forever
            self._messages.put(resumed)

    def _note_step(self, started: float) -> None:
        """Count a step and report it."""
        scheduler, batch = self.scheduler, self.executor.batch
        self._last_step_at = now = time.monotonic()
        self._patient_until = now + min(_PATIENCE_S, _PATIENCE_SHARE * (now - started))
        self._steps += 1
        self._prompt_tokens += scheduler.prompt_tokens
        gaps, self._token_gaps = self._token_gaps, []
        if self._telemetry:
            running, waiting = len(scheduler.running), len(scheduler.waiting) + len(scheduler.held)
            prompt_tokens = scheduler.prompt_tokens
            self._telemetry.step(StepRecord(now - started, batch.tokens, prompt_tokens, batch.rows, running, waiting, gaps))

    def _add(self, job: Job) -> None:
        try:
            self.scheduler.add(job.sequence)
        except EngineError as error:
            self._drop(job, error)
        else:
            if job.sequence.deadline < math.inf:
                self._deadlines.add(job)

    def release_adapter(self, digest: str) -> int:
        """Forget an adapter; returns how many jobs use it, in which case it is kept. Called on the loop's thread."""
        users = sum(sequence.adapter == digest for sequence in self._jobs)
        if not users:
            del self.scheduler.adapters[digest]
        return users

    def _drop(self, job: Job, error: EngineError) -> None:
        if job.sequence in self._jobs:
            scheduler = self.scheduler
            scheduler.remove(job.sequence)
            if not job.sequence.picked:
                self._gate.gave_up(job.sequence, time.monotonic())
            if not scheduler.waiting:
                self._gate.set_free(scheduler.free_slots - len(scheduler.held))
            if not job.done.is_set():
                job.fail(error)
            del self._jobs[job.sequence]  # now that nothing has failed that all jobs are to end with

    def _try(self, handle: Callable[[], None]) -> None:
        """Do what a message or the time asks for; where it fails, all jobs end."""
        try:
            handle()
        except Exception as error:
            self._fail_all(error)

    def _fail_all(self, error: BaseException) -> None:
        """End all jobs with the error of a step or a message."""
        scheduler, jobs, self._jobs = self.scheduler, tuple(self._jobs.values()), {}
        if self._executing:
            scheduler.discard()
            for job in jobs:
                scheduler.remove(job.sequence)
        else:
            scheduler.reset()
        self._executing = False
        for job in jobs:
            self._gate.gave_up(job.sequence, time.monotonic())
        self._gate.set_free(scheduler.free_slots)
        _end_all(jobs, error)

    def _die(self, error: BaseException) -> None:
        """End all jobs because of an error that is not one of a step, and refuse those that come."""
        found = f"{type(error).__name__}: {error}"
        death = EngineError("engine", "the step thread has died", found=found, remedy="load the engine again")
        with self._lock:
            self._death = death
        self._end(death)

    def _end(self, error: EngineError) -> None:
        """End all jobs, those that were not received yet included."""
        while not self._messages.empty():
            match message := self._messages.get():
                case Submitted(jobs):
                    for job in jobs:
                        self._jobs[job.sequence] = job
                case Task():
                    message.set_exception(error)
        left, self._jobs = tuple(self._jobs.values()), {}
        _end_all(left, error)
        self._after_step()


def _end_all(jobs: Iterable[Job], error: BaseException) -> None:
    for job in jobs:
        try:
            job.fail(error)
        except Exception:  # of whoever is told about it; the other jobs must end nevertheless
            _log.exception("A request could not be told that it has ended")


def _closed() -> EngineError:
    return EngineError("engine", "the engine is closed", remedy="load it again")
