"""A GPU that is none: engines for GPUs are built without machine code, and their kernels are interpreted on the host."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from belle_compile.compiler.backends.triton import compile as compiling
from belle_compile.compiler.backends.triton.kernels import attention, low_rank
from belle_compile.compiler.backends.triton.kernels.base import Kernel
from belle_compile.compiler.backends.triton.kernels.linear import QuantizedLinear
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors import cuda
from belle_compile.runtime.program import Launch
from tests.compiler.backends.triton.harness import interpret

Bytes = npt.NDArray[np.uint8]
KERNELS: dict[str, Kernel] = {}  # of all engines that were built
INTERPRETER = threading.Lock()  # there is one


def compile_kernels(
    needed: Iterable[Kernel], arch: str, others: Iterable[Kernel] = (), *, on_kernels: Any = None
) -> dict[str, tuple[bytes, Launch]]:
    """The names of kernels in place of their code."""
    made = {}
    for kernel in (*needed, *others):
        KERNELS[kernel.name], start = kernel, kernel.start()
        made[kernel.name] = kernel.name.encode(), Launch("", 32 * start.warps, 0, start.grid, start.rows, 0, 0, ())
    return made


class InterpretedDevice:
    """The host's memory as a GPU's; `started` counts kernels."""

    def __init__(self, arch: str = "sm_80", memory_bytes: int = 1 << 30) -> None:
        self.name, self.arch, self.memory_bytes = f"interpreted {arch}", arch, memory_bytes
        self.shared_bytes = 163 << 10
        self.started: list[str] = []
        self.closed = False
        self._memory: dict[int, Bytes] = {}
        self._recording: list[Callable[[], None]] | None = None

    def enter(self) -> None:
        """Any thread will do."""

    def allocate(self, size: int, what: str) -> int:
        if size > self.memory_bytes:
            raise EngineError("cuda", f"memory for {what}", found="too little")
        memory = np.zeros(size + 256, np.uint8)
        self._memory[memory.ctypes.data] = memory
        return int(memory.ctypes.data) + -memory.ctypes.data % 256

    def host_memory(self, size: int) -> Bytes:
        return np.zeros(size, np.uint8)

    def load(self, name: str, code: bytes, launch: Launch) -> Kernel:
        assert code.decode() == name
        kernel = KERNELS[name]
        return replace(kernel, native=False) if isinstance(kernel, QuantizedLinear) else kernel

    def launch(self, function: Kernel, launch: Launch, rows: int, pointers: Sequence[int]) -> None:
        def start() -> None:
            self.started.append(function.kind)
            with INTERPRETER:
                interpret(function, rows, pointers)

        self._do(start)

    def upload(self, address: int, source: Bytes) -> None:
        self._do(lambda: np.copyto(_at(address, source.shape), source))

    def download(self, target: Bytes, address: int) -> None:
        self._do(lambda: np.copyto(target, _at(address, target.shape)))

    def download_rows(self, target: Bytes, address: int, pitch: int) -> None:
        def copy() -> None:
            for row in range(len(target)):
                target[row] = _at(address + row * pitch, target.shape[1:])

        self._do(copy)

    def copy(self, target: int, source: int, size: int) -> None:
        assert self._recording is None, "each step copies other blocks"
        self._do(lambda: np.copyto(_at(target, (size,)), _at(source, (size,))))

    def record(self, run: Callable[[], None]) -> list[Callable[[], None]]:
        assert self._recording is None
        self._recording = recorded = []
        try:
            run()
        finally:
            self._recording = None
        return recorded

    def forget(self, recorded: list[Callable[[], None]]) -> None:
        recorded.clear()

    def replay(self, recorded: list[Callable[[], None]]) -> None:
        for work in recorded:
            self._do(work)

    def times(self, run: Callable[[Callable[[], None]], None]) -> list[float]:
        moments: list[float] = []
        run(lambda: moments.append(time.perf_counter()))
        return np.diff(moments).tolist()

    def join(self, collectives: Any) -> None:
        raise NotImplementedError

    def all_reduce(self, address: int, count: int) -> None:
        raise NotImplementedError

    def copy_bandwidth(self) -> float:
        return 1e12

    def synchronize(self) -> None:
        assert self._recording is None, "nothing is done while recording"

    def close(self) -> None:
        self.closed = True
        self._memory.clear()

    def _do(self, work: Callable[[], None]) -> None:
        if self._recording is None:
            work()
        else:
            self._recording.append(work)


class RankDevice(InterpretedDevice):
    """That of one of several threads, which sum what each has."""

    def __init__(self, rank: int, barrier: threading.Barrier, addends: dict[int, npt.NDArray[np.float32]]) -> None:
        super().__init__()
        self._rank, self._barrier, self._addends = rank, barrier, addends

    def join(self, collectives: Any) -> None:
        assert collectives.rank == self._rank

    def all_reduce(self, address: int, count: int) -> None:
        def add() -> None:
            values = _at(address, (4 * count,)).view(np.float32)
            self._addends[self._rank] = values.copy()
            self._barrier.wait(timeout=60)
            total = sum(self._addends[rank] for rank in range(self._barrier.parties))
            self._barrier.wait(timeout=60)
            values[:] = total

        self._do(add)


def _at(address: int, shape: tuple[int, ...]) -> Any:
    size = int(np.prod(shape))
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8).reshape(shape)


@pytest.fixture
def interpreted_gpu(monkeypatch: pytest.MonkeyPatch) -> InterpretedDevice:
    """Builds for GPUs, and loads on this one; a kernel's first choice is taken without measuring."""
    device = InterpretedDevice()
    monkeypatch.setattr(compiling, "compile_kernels", compile_kernels)
    monkeypatch.setattr(compiling, "toolchain", lambda: {"triton": "interpreted"})
    monkeypatch.setattr(attention, "_PROGRAMS", 8)  # the interpreter runs them one after the other
    monkeypatch.setattr(low_rank, "_BLOCKS", 1)
    monkeypatch.setattr(cuda, "open_device", lambda number: device)
    monkeypatch.setattr(cuda, "measure", lambda *given: None)
    return device
