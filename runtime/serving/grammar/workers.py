"""Threads that compute the masks of all answers of a process, beside the steps."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from typing import Any

from belle_compile.runtime.serving.grammar.matching import on_deep_stack
from belle_compile.runtime.serving.grammar.source import GrammarFailure

Task = Callable[[], Any]
# Beside a kernel's thread (0), a thread of this niceness gets a tenth of a core.
_NICENESS = 10


class Workers:
    """Threads with a deep stack, since llguidance recurses along what it matches. They begin tasks in their order."""

    def __init__(self, number: int, niceness: int = 0) -> None:
        """`niceness` is added to that of the process: the scheduler of Linux gives less time to threads of a higher one."""
        self._niceness = niceness
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Task]] = queue.SimpleQueue()
        for _ in range(number):
            on_deep_stack(self._run)

    def submit(self, task: Task) -> Future[Any]:
        """Run a task on one of the threads, unless the future is cancelled before."""
        future: Future[Any] = Future()
        self._tasks.put((future, task))
        return future

    def _run(self) -> None:
        if self._niceness:
            self._yield_to_others()
        while True:
            future, task = self._tasks.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(task())
                except Exception as error:
                    future.set_exception(error)
                except BaseException as error:  # llguidance has panicked: this answer has failed, no other one
                    future.set_exception(GrammarFailure(f"{type(error).__name__}: {error}"))
            del future, task  # a matcher may be large

    def _yield_to_others(self) -> None:
        thread = threading.get_native_id()  # of which Linux keeps a niceness of its own
        with contextlib.suppress(OSError):  # a sandbox may refuse; what the threads compute is the same
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + self._niceness)


@cache
def quick_workers() -> Workers:
    """The threads for usual masks, which start with the first answer that needs one."""
    return Workers(_number())


@cache
def slow_workers() -> Workers:
    """The threads for masks that may take long: these hold up no usual ones, and kernels little."""
    return Workers(_number(), _NICENESS)


for _workers in (quick_workers, slow_workers):  # a fork has none of the threads, and starts its own
    os.register_at_fork(after_in_child=_workers.cache_clear)


def _number() -> int:
    return max(1, min(4, len(os.sched_getaffinity(0)) // 2))
