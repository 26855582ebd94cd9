"""The thread that waits for disks and networks in place of the step thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from belle_compile.runtime.serving.result_cache.audit import Auditor

MOST_TASKS = 4096  # waiting ones; more answers than this are not stored
_TICK_S = 0.01  # how often an audit is looked after, while there is one


class Background:
    """Runs tasks in order, and the audits. The thread starts with the first task and ends with `close`."""

    def __init__(self, auditor: Auditor) -> None:
        """Tasks must not raise."""
        self._auditor = auditor
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def put(self, task: Callable[[], None]) -> bool:
        """Queue a task; returns False where too many wait, or after the end."""
        with self._lock:
            if self._closed or self._tasks.qsize() >= MOST_TASKS:
                return False
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="belle-result-cache", daemon=True)
                thread.start()
                self._thread = thread
            self._tasks.put(task)
            return True

    def flush(self) -> None:
        """Wait until all tasks that were put have run."""
        done = threading.Event()
        if self.put(done.set):
            done.wait()

    def close(self, timeout_s: float) -> None:
        """Run the tasks that were put, and end the thread. Waits for at most `timeout_s` seconds."""
        with self._lock:
            self._closed = True
            self._tasks.put(None)
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            try:
                task = self._tasks.get(timeout=_TICK_S if self._auditor.active else None)
            except queue.Empty:
                pass
            else:
                if task is None:
                    return
                task()
            if not self._closed:
                self._auditor.tick()
