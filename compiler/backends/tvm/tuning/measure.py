"""Measure linear kernels on this host: weights are read from memory, variants take turns, and medians are compared."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from belle_compile.compiler.backends.program.kernel import round_up
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.quantized_linear import INPUT_ALIGNMENT, QuantizedLinear
from belle_compile.compiler.backends.tvm.library import compile_functions
from belle_compile.runtime import host
from belle_compile.runtime.executors.native import CallList, KernelLibrary, ThreadPool
from belle_compile.runtime.memory import anonymous

SAMPLE_SECONDS = 0.002
ROUNDS = 25  # samples of a variant; many, because memory of a shared host sometimes has half its speed, and still cheap
EARLY_ROUNDS = 5  # after these, only variants within EARLY_FACTOR of the best are measured further
EARLY_FACTOR = 1.15
LEAST_ROTATED = 256 << 20  # bytes of weights that calls rotate through, at least
CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
_KINDS = {"int8": np.int8, "int32": np.int32, "float32": np.float32}


def last_level_cache() -> int:
    """Bytes of the largest cache of the first CPU; 32 MiB if the system does not report its caches."""
    sizes = [path.read_text().strip() for path in CACHE.glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=32 << 20)


class Bench:
    """Measures variants of one kernel by turns. Each call reads the next of several copies of the weights, which together are
    larger than the caches."""

    def __init__(self, kernel: QuantizedLinear, max_rows: int) -> None:
        self.kernel = kernel
        rng = np.random.default_rng(0)
        rows = round_up(max_rows, 32)
        sizes = {
            "rows": 1, "xq": rows * kernel.x.stride // 4, "xs": rows, "out": rows * kernel.out.stride,
            "weight": round_up(kernel.outputs, 16) * round_up(kernel.inputs, INPUT_ALIGNMENT),
        }  # fmt: skip
        self._weight_bytes = sizes["weight"]
        copies = -(-_rotated_bytes() // self._weight_bytes)
        self._pool = anonymous(copies * self._weight_bytes).view(np.int8)
        block = rng.integers(-127, 128, self._weight_bytes).astype(np.int8)
        for i in range(copies):
            self._pool[i * self._weight_bytes : (i + 1) * self._weight_bytes] = block
        self._arrays: dict[str, npt.NDArray[Any]] = {}
        for name, dtype in kernel.pointers():
            if name == "weight":
                continue
            count = sizes.get(name, round_up(kernel.outputs, 64))
            self._arrays[name] = anonymous(count * 4).view(_KINDS[dtype])
        self._arrays["xq"][:] = rng.integers(0, 1 << 30, len(self._arrays["xq"]))
        self._arguments = [self._bind(i) for i in range(copies)]
        self._next = 0

    def compare(self, functions: Sequence[Variant], rows: int, every: bool = False) -> list[float]:
        """Median seconds per call of each variant at a row count. Unless `every`, variants that fall behind early get fewer
        samples."""
        self._arrays["rows"][0] = rows
        for function in functions:
            self._sample(function, 1)
        calls = [max(1, round(SAMPLE_SECONDS / self._sample(function, 1))) for function in functions]
        samples: list[list[float]] = [[] for _ in functions]
        running = list(range(len(functions)))
        for turn in range(ROUNDS):
            if turn == EARLY_ROUNDS and not every:
                limit = EARLY_FACTOR * min(map(statistics.median, samples))
                running = [i for i in running if statistics.median(samples[i]) <= limit]
            for i in running:
                samples[i].append(self._sample(functions[i], calls[i]))
        return [statistics.median(taken) for taken in samples]

    def _sample(self, function: Variant, calls: int) -> float:
        """Seconds per call, where each call reads the next copy of the weights."""
        copies = len(self._arguments)
        arguments = [self._arguments[(self._next + i) % copies] for i in range(calls)]
        self._next = (self._next + calls) % copies
        bound = CallList(function.pool, [(function.address, addresses) for addresses in arguments])
        start = time.perf_counter()
        bound.run()
        return (time.perf_counter() - start) / calls

    def _bind(self, copy: int) -> list[int]:
        addresses = {name: int(array.ctypes.data) for name, array in self._arrays.items()}
        addresses["weight"] = int(self._pool.ctypes.data) + copy * self._weight_bytes
        return [addresses[name] for name, _ in self.kernel.pointers()]


def _rotated_bytes() -> int:
    """Bytes of all copies of the weights: four times the last-level cache, since the cores of a virtual machine may have
    several such caches; at most a quarter of the memory."""
    return min(max(4 * last_level_cache(), LEAST_ROTATED), host.memory_bytes() // 4)


@dataclass(frozen=True)
class Variant:
    """A loaded kernel and the threads that run it."""

    pool: ThreadPool
    address: int


def load_variants(kernels: Mapping[str, QuantizedLinear], isa: Isa, threads: int) -> dict[str, Variant]:
    """Compile and load variants of a kernel, each under its key as name."""
    code = compile_functions({name: kernel.build(isa, name) for name, kernel in kernels.items()}, isa)
    with tempfile.TemporaryDirectory(prefix="belle-tuning-") as folder:
        path = Path(folder) / "variants.so"
        path.write_bytes(code)
        library = KernelLibrary(path)
    pool = ThreadPool(library, threads)
    return {name: Variant(pool, library.address(name)) for name in kernels}
