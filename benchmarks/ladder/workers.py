"""Processes of steps: started, asked for samples, and stopped while another one is measured."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.ladder.worker import RESULT
from benchmarks.peers.home import last_line
from benchmarks.processes import signal_tree

_START_S, _LONGEST_S, _END_S = 600.0, 1800.0, 30.0


class StepError(Exception):
    """A step whose process failed, in one line."""


class Worker:
    """The process of a step while the `with` block runs; it is stopped whenever it has no sample to take."""

    def __init__(self, name: str, settings: dict[str, Any], log: Path) -> None:
        self.name, self._log = name, log
        command = [sys.executable, "-m", "benchmarks.ladder.worker", json.dumps(settings)]
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
        self._results: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(RESULT):
                self._results.put(line.removeprefix(RESULT))
        self._results.put(None)

    def _result(self, seconds: float) -> Any:
        try:
            line = self._results.get(timeout=seconds)
        except queue.Empty:
            raise StepError(f"{self.name}: no result after {seconds:.0f} s") from None
        if line is None:
            self._process.wait(_END_S)
            text = self._log.read_text(encoding="utf-8", errors="replace")
            raise StepError(f"{self.name}: {last_line(text, self._process.returncode)} (see {self._log})")
        return json.loads(line)

    def sample(self, requests: Path, users: int, seconds: float) -> dict[str, Any]:
        """Take one sample; raises StepError where that fails."""
        assert self._process.stdin is not None
        signal_tree(self._process.pid, signal.SIGCONT)
        question = {"requests": str(requests.absolute()), "users": users, "seconds": seconds}
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        found: dict[str, Any] = self._result(seconds + _LONGEST_S)
        signal_tree(self._process.pid, signal.SIGSTOP)
        return found

    def __enter__(self) -> Worker:
        try:
            self._result(_START_S)
        except BaseException:
            self._end()
            raise
        signal_tree(self._process.pid, signal.SIGSTOP)
        return self

    def _end(self) -> None:
        signal_tree(self._process.pid, signal.SIGCONT)
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(_END_S)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()
