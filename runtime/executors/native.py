"""Kernel libraries without TVM: lists of kernel calls that one foreign call walks, and the threads that share their loops.

compiler/backends/tvm/native has the C side, which is linked into every kernel library.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.forks import finalize

_COPY_AGAIN = "copy the engine again or rebuild it"
_PREFIX = "__tvm_ffi_"
_OPAQUE_POINTER = 4  # TVM's tag of an argument that is an address
_ARGUMENT = np.dtype([("type", np.int32), ("zero", np.uint32), ("value", np.uint64)])
_CALL = np.dtype([("kernel", "u8"), ("arguments", "u8"), ("count", "i8"), ("next", "u8"), ("next_bytes", "i8")])


class KernelLibrary:
    """A shared library with the kernels for one instruction set and the functions that run them.

    What runs is a private copy of the file in memory. The code of a mapped file would change under the running engine, up to
    the functions that the system calls at the end of the process, when another engine is copied over the file in place. And
    the system would take a file that was written anew for the library that it had loaded from there before.
    """

    def __init__(self, path: Path) -> None:
        """Load the library; raises `EngineError` when it is missing or does not load."""
        self.path = path
        if not path.is_file():
            raise EngineError("engine", f"file {path} is missing", remedy=_COPY_AGAIN)
        try:
            self.functions = _load_copy(path)
            self.functions.belle_walk.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
            self.functions.belle_walk.restype = ctypes.c_int64
            self.functions.belle_pool_bytes.restype = ctypes.c_size_t
            self.functions.belle_error.restype = ctypes.c_char_p
            self.functions.belle_pool_init.argtypes = self.functions.belle_work.argtypes = (ctypes.c_void_p, ctypes.c_int32)
            self.functions.belle_stop.argtypes = (ctypes.c_void_p,)
        except (OSError, AttributeError) as error:
            raise EngineError("engine", f"{path} does not load", found=str(error), remedy=_COPY_AGAIN) from None

    def address(self, kernel: str) -> int:
        """The address of a kernel; raises `EngineError` when the library has none of this name."""
        try:
            function = self.functions[_PREFIX + kernel]
        except AttributeError:
            raise EngineError("engine", f"kernel {kernel} is missing from {self.path}", remedy=_COPY_AGAIN) from None
        return ctypes.cast(function, ctypes.c_void_p).value or 0

    def pool_layout(self) -> int:
        """The version of the layout of pools, which libraries that share one have in common; 0 for a library that was compiled
        before there were versions, and shares none."""
        function = getattr(self.functions, "belle_pool_layout", None)
        return int(function()) if function else 0

    def sum_address(self) -> int:
        """The address of the function that sums over the ranks of a host; raises `EngineError` when the library has none."""
        try:
            function = self.functions.belle_sum
        except AttributeError:
            raise EngineError("engine", f"belle_sum is missing from {self.path}", remedy=_COPY_AGAIN) from None
        return ctypes.cast(function, ctypes.c_void_p).value or 0


_loaded: dict[
    bytes, tuple[ctypes.CDLL, int]
] = {}  # libraries by the SHA-256 of their bytes, with the descriptors of the copies
_loading = threading.Lock()


def _load_copy(path: Path) -> ctypes.CDLL:
    """Load a library from a copy of the file in anonymous memory. Files of equal contents share one copy.

    Neither library nor descriptor is ever released. The loader knows a library by its name, which is that of the descriptor:
    where the number is used again, it would return the library that it knows. Raises OSError.
    """
    code = path.read_bytes()
    digest = hashlib.sha256(code).digest()
    with _loading:
        if digest not in _loaded:
            descriptor = os.memfd_create(path.name)
            try:
                with open(descriptor, "wb", closefd=False) as copy:
                    copy.write(code)
                _loaded[digest] = ctypes.CDLL(f"/proc/self/fd/{descriptor}"), descriptor
            except BaseException:
                os.close(descriptor)
                raise
        return _loaded[digest][0]


class _Workers:
    """The threads of one pool or of several, and the memory by which they are given work.

    They end with the last pool that uses them.
    """

    def __init__(self, library: KernelLibrary, threads: int) -> None:
        functions = library.functions
        most = int(functions.belle_most_threads())
        if not 1 <= threads <= most:
            raise EngineError("cpu", "threads", found=str(threads), expected=f"1 to {most}")
        self.count, self.layout, self.pools = threads, library.pool_layout(), 0
        memory = np.zeros(int(functions.belle_pool_bytes()) + 64, np.uint8)
        self.address = memory.ctypes.data + -memory.ctypes.data % 64
        functions.belle_pool_init(self.address, threads)
        self._memory = memory
        self.threads = [
            # The threads hold a reference to the memory and none to this object, which may be collected while they sleep.
            threading.Thread(target=_work, args=(functions, self.address, i, memory), name=f"kernels-{i}", daemon=True)
            for i in range(1, threads)
        ]
        for thread in self.threads:
            thread.start()
        self._stop = finalize(self, functions.belle_stop, self.address)

    def fit(self, library: KernelLibrary, threads: int) -> bool:
        """Whether they can run the loops of a library, in this number."""
        return self.count == threads and self.layout == library.pool_layout() != 0

    def release(self) -> None:
        """End them where no pool uses them any more."""
        self.pools -= 1
        if not self.pools:
            self._stop()
            for thread in self.threads:
                thread.join()


class ThreadPool:
    """Threads that share the loops of a library's kernels with the thread that runs a list of calls; one list runs at a time.

    They sleep when nothing has run for a millisecond, and end with `close` or with this object. Where lists of two libraries
    take turns, as those of a model and of its draft model do, their pools have the same threads: those of the one that waits
    would be polling for work on the cores that the other one needs.
    """

    def __init__(self, library: KernelLibrary, threads: int, beside: ThreadPool | None = None) -> None:
        """`threads` counts the one that runs a list of calls; the others are started here, or are those of the pool `beside`,
        whose lists never run at the same time. That has to have as many, for a library of the same layout of pools."""
        self.functions, self.threads = library.functions, threads
        shared = beside._workers if beside and beside._workers.fit(library, threads) else None
        self._workers: _Workers = shared or _Workers(library, threads)
        self._workers.pools += 1
        self.address, self.workers = self._workers.address, tuple(self._workers.threads)
        self._closed = False

    def close(self) -> None:
        """End the threads, unless another pool has them too. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self._workers.release()


def _work(functions: Any, address: int, number: int, memory: NDArray[np.uint8]) -> None:
    """Run a worker thread to its end, without the interpreter's lock. The argument `memory` keeps the pool's memory alive."""
    functions.belle_work(address, number)


class CallList:
    """Kernel calls with their arguments, in the layout that the library's `belle_walk` reads."""

    def __init__(
        self, pool: ThreadPool, calls: Sequence[tuple[int, Sequence[int]]], prefetches: Sequence[tuple[int, int]] = ()
    ) -> None:
        """`calls` are the address of a kernel and those of its arguments. `prefetches` has for each call the address and size
        of memory that waiting threads fetch into the cache."""
        self._functions, self._pool = pool.functions, pool
        self._arguments = np.zeros(sum(len(arguments) for _, arguments in calls), _ARGUMENT)
        self._calls = np.zeros(len(calls), _CALL)
        self._times = np.zeros(len(calls) + 1, np.int64)
        self._arguments["type"] = _OPAQUE_POINTER
        self._arguments["value"] = [address for _, arguments in calls for address in arguments]
        first, size = self._arguments.ctypes.data, _ARGUMENT.itemsize
        for i, (kernel, arguments) in enumerate(calls):
            self._calls[i] = (kernel, first, len(arguments), *(prefetches[i] if prefetches else (0, 0)))
            first += size * len(arguments)
        self._bound = (pool.address, self._calls.ctypes.data, len(calls))

    def run(self) -> None:
        """Make the calls in order; raises `FailedCall` at the first that fails."""
        failed = self._functions.belle_walk(*self._bound, None)
        if failed >= 0:
            raise FailedCall(failed, self._functions.belle_error().decode(errors="replace"))

    def run_timed(self) -> NDArray[np.int64]:
        """As `run`. Returns the nanoseconds, int64 [calls + 1], at which the first call began and each ended, valid until the
        next run."""
        failed = self._functions.belle_walk(*self._bound, self._times.ctypes.data)
        if failed >= 0:
            raise FailedCall(failed, self._functions.belle_error().decode(errors="replace"))
        return self._times


class FailedCall(Exception):
    """A kernel refused its arguments: `number` is that of the call in its list, `message` the kernel's."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(f"call {number}: {message}")
        self.number, self.message = number, message
