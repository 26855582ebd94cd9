"""Tries out grammars in another process, which may be killed, before they are compiled in this one."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.forks import finalize
from belle_compile.runtime.serving.grammar import matching

_START_S = 60.0  # loads llguidance and a vocabulary: 0.4 s, 2 s for 250,880 tokens
_REPLY_S = 30.0  # a trial takes at most `matching.CPU_S` of processor time, which may be shared
# `-c` and not the file itself, whose directory would come first in the path of modules.
_PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; import runpy; runpy.run_path(sys.argv[1], run_name='__main__')"


class Trial:
    """A process that tries out grammars, one at a time. It starts with the first one, and anew after it has failed."""

    def __init__(self, tokenizer_json: str, eos_ids: list[int]) -> None:
        self._vocabulary = (tokenizer_json, eos_ids)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def judge(self, kind: str, source: str) -> tuple[str, float]:
        """Return why a grammar cannot be used, empty if it can, and the processor time in seconds that it takes to compile it
        and to compute its first mask. Raises `EngineError` when the process does not answer."""
        with self._lock:
            running = self._process is not None
            try:
                return self._try_out(kind, source)
            except (OSError, ValueError) as error:
                if not running:
                    raise _failed(error) from error
            try:  # it may have ended since the last grammar, by a signal for example
                return self._try_out(kind, source)
            except (OSError, ValueError) as error:
                raise _failed(error) from error

    def _try_out(self, kind: str, source: str) -> tuple[str, float]:
        try:
            if self._process is None:
                self._process = self._start()
                self._ask(self._process, self._vocabulary, _START_S)
            return self._ask(self._process, (kind, source), _REPLY_S)
        except BaseException:  # what is in its pipes is unknown
            if self._process:
                _end(self._process)
            self._process = None
            raise

    def _start(self) -> subprocess.Popen[bytes]:
        path = [entry or os.getcwd() for entry in sys.path]
        command = [sys.executable, "-c", _PROGRAM, str(Path(matching.__file__)), *path]
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        process = subprocess.Popen(command, bufsize=0, stdin=pipe, stdout=pipe, stderr=nowhere)
        finalize(self, _end, process)
        self._unread = b""
        return process

    def _ask(self, process: subprocess.Popen[bytes], message: object, timeout_s: float) -> tuple[str, float]:
        """Send a line and return the reply; raises `OSError` or `ValueError`."""
        assert process.stdin is not None and process.stdout is not None
        unsent = memoryview(json.dumps(message).encode() + b"\n")
        while unsent:
            unsent = unsent[process.stdin.write(unsent) :]
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"no answer within {timeout_s:.0f} s")
            if not (data := os.read(process.stdout.fileno(), 1 << 16)):
                raise ValueError("it has ended")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        reason, seconds = json.loads(line)
        return str(reason), float(seconds)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream:
            stream.close()


def _failed(error: Exception) -> EngineError:
    what, found = "the process that tries out grammars has failed", f"{type(error).__name__}: {error}"
    return EngineError("sampling", what, found=found)
