"""How fast memory can be read here: the roofline of decoding, measured with the engine's own threads."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import ClassVar

import numpy as np

from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import AVX2, AVX512VNNI, Isa
from belle_compile.compiler.backends.tvm.kernels.base import Kernel
from belle_compile.compiler.backends.tvm.library import compile_library
from belle_compile.compiler.backends.tvm.tir import Buffer, Expr, T
from belle_compile.runtime.executors.native import CallList, KernelLibrary, ThreadPool
from belle_compile.runtime.host import host_isas

STREAMS = 16  # places a task reads at once
PREFETCH_BYTES = 2048
PARTS = 4
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class ReadBytes(Kernel):
    """Sums `chunks` pieces of 1 MiB; as little else as reading allows."""

    kind: ClassVar[str] = "read"
    chunks: int

    def pointers(self) -> tuple[tuple[str, str], ...]:
        return (("data", "int32"), ("sums", "int32"))

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        data, sums = buffers
        piece = MEBIBYTE // 4 // STREAMS

        def chunk(index: Expr) -> None:
            acc = tir.Registers(STREAMS, tir.I16, tir.splat_i32(0))

            def step(i: Expr) -> None:
                for s in range(STREAMS):
                    place = tir.bind(index * (MEBIBYTE // 4) + s * piece + i * tir.LANES)
                    tir.prefetch(data, place + PREFETCH_BYTES // 4)
                    acc[s] = acc[s] + tir.load(data, place)

            tir.for_range(piece // tir.LANES, step)
            total = acc[0]
            for s in range(1, STREAMS):
                total = total + acc[s]
            tir.store(sums, index * tir.LANES, total)

        tir.parallel(T.int64(self.chunks), chunk)


def load_kernel(kernel: Kernel, isa: Isa, threads: int, *calls: Sequence[int]) -> list[Callable[[], None]]:
    """Compile one kernel and bind it to addresses, those of each of `calls`, and a pool of `threads` threads, as the
    engine's executor does."""
    with tempfile.TemporaryDirectory(prefix="belle-benchmark-") as folder:
        path = Path(folder) / "kernel.so"
        path.write_bytes(compile_library([kernel], isa))
        library = KernelLibrary(path)
    pool = ThreadPool(library, threads)
    return [CallList(pool, [(library.address(kernel.name), arguments)]).run for arguments in calls]


class ReadBandwidth:
    """Reads memory with `threads` threads, `mebibytes` of it in `PARTS` that take turns; call it between the runs it is
    compared with."""

    def __init__(self, threads: int, mebibytes: int = 1536) -> None:
        raw = np.ones(mebibytes * MEBIBYTE + 4096, np.uint8)
        part = mebibytes // PARTS
        sums = np.zeros(part * 16 + 16, np.int32)
        self._keep = raw, sums
        self._bytes = part * MEBIBYTE
        isa = AVX512VNNI if "avx512vnni" in host_isas() else AVX2
        start, to = (-(-array.ctypes.data // 64) * 64 for array in (raw, sums))
        calls = [[start + number * self._bytes, to] for number in range(PARTS)]
        self._parts = cycle(load_kernel(ReadBytes(part), isa, threads, *calls))

    def read(self) -> None:
        """Read one part."""
        next(self._parts)()

    def rate(self, readings: Sequence[float]) -> float:
        """GB/s of readings that took so many seconds, on average."""
        return self._bytes * len(readings) / sum(readings) / 1e9

    def measure(self, repeats: int = 5) -> float:
        """GB/s, the best of `repeats` reads of everything: what the memory can do."""
        return max(self._everything() for _ in range(repeats))

    def _everything(self) -> float:
        started = time.perf_counter()
        for _ in range(PARTS):
            self.read()
        return self.rate([(time.perf_counter() - started) / PARTS])
