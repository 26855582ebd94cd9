"""Lists of calls and the threads that share their loops, over kernels that count."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.native import CallList, FailedCall, KernelLibrary, ThreadPool

pytest.importorskip("tvm")

from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import AVX2
from belle_compile.compiler.backends.tvm.library import compile_functions

SIZE = 1000


def count() -> Any:
    """out[i] += 1 for i < n, in parallel"""

    def body(n: Any, out: Any) -> None:
        tir.parallel(tir.rows_of(n), lambda i: tir.store(out, i, out[i] + tir.T.int32(1), 1))

    return tir.prim_func("count", [("n", "int32"), ("out", "int32")], body)


def uneven() -> Any:
    """out[i] = i * (i + 1) / 2 the slow way: later iterations take much longer than early ones"""

    def body(n: Any, out: Any) -> None:
        def one(i: Any) -> None:
            total = tir.scalar(tir.T.int32(0), "int32")

            def add(j: Any) -> None:
                total[0] = total[0] + tir.T.cast(j, "int32")

            tir.for_range(i + 1, add)
            tir.store(out, i, total[0], 1)

        tir.parallel(tir.rows_of(n), one)

    return tir.prim_func("uneven", [("n", "int32"), ("out", "int32")], body)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    path = tmp_path_factory.mktemp("native") / "kernels.so"
    path.write_bytes(compile_functions({"count": count(), "uneven": uneven()}, AVX2))
    return KernelLibrary(path)


@pytest.fixture(params=[1, 2, 3, 7])
def pool(library: KernelLibrary, request: pytest.FixtureRequest) -> Iterator[ThreadPool]:
    pool = ThreadPool(library, request.param)
    yield pool
    pool.close()


class Counter:
    """A call of a kernel over the first `n` numbers of an array of its own."""

    def __init__(self, library: KernelLibrary, kernel: str, n: int) -> None:
        self.n, self.out = np.full(16, n, np.int32), np.zeros(SIZE, np.int32)
        self.call = (library.address(kernel), [self.n.ctypes.data, self.out.ctypes.data])


@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 100, SIZE])
def test_every_iteration_runs_once(library: KernelLibrary, pool: ThreadPool, n: int) -> None:
    counter = Counter(library, "count", n)
    calls = CallList(pool, [counter.call] * 50)
    for _ in range(20):
        calls.run()
    assert (counter.out[:n] == 1000).all() and not counter.out[n:].any()


def test_work_of_unequal_length(library: KernelLibrary, pool: ThreadPool) -> None:
    counter = Counter(library, "uneven", SIZE)
    CallList(pool, [counter.call] * 20).run()
    numbers = np.arange(SIZE)
    np.testing.assert_array_equal(counter.out, numbers * (numbers + 1) // 2)


def test_threads_wake_after_a_pause(library: KernelLibrary) -> None:
    pool, counter = ThreadPool(library, 2), Counter(library, "count", SIZE)
    calls = CallList(pool, [counter.call] * 3)
    for _ in range(5):
        threading.Event().wait(0.02)  # longer than they stay awake
        calls.run()
    assert (counter.out == 15).all()
    pool.close()


def test_what_is_fetched_ahead_is_not_touched(library: KernelLibrary, pool: ThreadPool) -> None:
    """Weights that are next may lie anywhere, even where there is no memory: a fetch is a hint."""
    counter, uneven = Counter(library, "count", SIZE), Counter(library, "uneven", SIZE)
    nowhere = [(1 << 40, 1 << 20), (64, 100), (0, 0), (counter.out.ctypes.data, counter.out.nbytes)]
    calls = CallList(pool, [uneven.call, counter.call] * 2, nowhere)
    for _ in range(20):
        calls.run()
    assert (counter.out == 40).all() and uneven.out[-1] == SIZE * (SIZE - 1) // 2


def test_two_pools_side_by_side(library: KernelLibrary) -> None:
    counters = [Counter(library, "count", SIZE) for _ in range(2)]

    def run(counter: Counter) -> None:
        pool = ThreadPool(library, 3)
        calls = CallList(pool, [counter.call] * 100)
        for _ in range(20):
            calls.run()
        pool.close()

    threads = [threading.Thread(target=run, args=(counter,)) for counter in counters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((counter.out == 2000).all() for counter in counters)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    path = tmp_path_factory.mktemp("other") / "kernels.so"
    path.write_bytes(compile_functions({"uneven": uneven()}, AVX2))
    return KernelLibrary(path)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_two_libraries_take_turns_on_the_same_threads(library: KernelLibrary, other: KernelLibrary, threads: int) -> None:
    first = ThreadPool(library, threads)
    second = ThreadPool(other, threads, beside=first)
    assert second.workers == first.workers and len(first.workers) == threads - 1
    counters = Counter(library, "count", SIZE), Counter(other, "uneven", SIZE)
    lists = [CallList(pool, [counter.call] * 5) for pool, counter in zip((first, second), counters, strict=True)]
    for _ in range(20):
        for calls in lists:
            calls.run()
    assert (counters[0].out == 100).all()
    np.testing.assert_array_equal(counters[1].out, np.arange(SIZE) * np.arange(1, SIZE + 1) // 2)
    short = CallList(second, [(counters[1].call[0], counters[1].call[1][:1])])
    with pytest.raises(FailedCall, match=r"call 0: .*arguments"):  # the message of its own library
        short.run()
    first.close()
    first.close()
    lists[1].run()
    assert all(worker.is_alive() for worker in second.workers)
    second.close()
    assert not any(worker.is_alive() for worker in second.workers)


@pytest.mark.parametrize(("threads", "layout"), [(3, 1), (2, 2), (2, None)])
def test_threads_that_do_not_fit_are_not_shared(
    library: KernelLibrary, tmp_path: Path, threads: int, layout: int | None
) -> None:
    """Of a pool of another size, or for a library in which a pool is, or may be, laid out in another way."""

    class Functions:
        """The library's functions, with another version of the layout, or none as before there were versions."""

        def __getattr__(self, name: str) -> Any:
            if name != "belle_pool_layout":
                return getattr(library.functions, name)
            if layout is None:
                raise AttributeError(name)
            return lambda: layout

    other: Any = object.__new__(KernelLibrary)
    other.path, other.functions = library.path, Functions()
    pools = [ThreadPool(library, 2)]
    pools.append(ThreadPool(other, threads, beside=pools[0]))
    assert not set(pools[0].workers) & set(pools[1].workers)
    counter = Counter(library, "count", SIZE)
    for pool in pools:
        CallList(pool, [counter.call] * 3).run()
        pool.close()
    assert (counter.out == 6).all()


def test_times_ascend(library: KernelLibrary, pool: ThreadPool) -> None:
    counter = Counter(library, "count", SIZE)
    times = CallList(pool, [counter.call] * 4).run_timed()
    assert len(times) == 5 and (np.diff(times) > 0).all() and (counter.out == 4).all()


def test_a_call_that_fails_ends_the_list(library: KernelLibrary, pool: ThreadPool) -> None:
    counter = Counter(library, "count", SIZE)
    calls = CallList(pool, [counter.call, (counter.call[0], counter.call[1][:1]), counter.call])
    with pytest.raises(FailedCall, match=r"call 1: .*arguments") as failed:
        calls.run()
    assert failed.value.number == 1 and (counter.out == 1).all()


def test_threads_end_with_their_pool(library: KernelLibrary) -> None:
    pool = ThreadPool(library, 4)
    workers = pool.workers
    assert len(workers) == 3 and all(worker.is_alive() for worker in workers)
    del pool
    gc.collect()
    for worker in workers:
        worker.join(5)
    assert not any(worker.is_alive() for worker in workers)


def test_wrong_thread_counts(library: KernelLibrary) -> None:
    for threads in (0, 257):
        with pytest.raises(EngineError, match=f"threads: found {threads}, expected 1 to 256"):
            ThreadPool(library, threads)


def test_what_is_no_library(tmp_path: Path, library: KernelLibrary) -> None:
    with pytest.raises(EngineError, match=r"absent\.so is missing; copy the engine again"):
        KernelLibrary(tmp_path / "absent.so")
    (tmp_path / "text.so").write_text("text")
    with pytest.raises(EngineError, match=r"text\.so does not load: found .*; copy the engine again"):
        KernelLibrary(tmp_path / "text.so")
    with pytest.raises(EngineError, match=r"kernel cuont is missing from .*kernels\.so"):
        library.address("cuont")


_OVERWRITE = """
import sys
from pathlib import Path
from belle_compile.runtime.executors.native import KernelLibrary

path, new = map(Path, sys.argv[1:])
old = KernelLibrary(path)
count = old.address("count")
path.write_bytes(new.read_bytes())
assert KernelLibrary(path).address("uneven") and old.address("count") == count
path.write_bytes(b"")
assert old.functions.belle_most_threads() == 256
print("the end")
"""


@pytest.mark.parametrize("kernels", ["uneven", "count uneven"])
def test_a_library_that_is_overwritten_while_it_is_loaded(tmp_path: Path, kernels: str) -> None:
    """As `cp` and `rsync --inplace` write: into the file that is there."""
    functions = {"count": count(), "uneven": uneven()}
    (tmp_path / "kernels.so").write_bytes(compile_functions({"count": functions["count"]}, AVX2))
    new = compile_functions({name: functions[name] for name in kernels.split()}, AVX2)
    (tmp_path / "new.so").write_bytes(new)
    done = subprocess.run([sys.executable, "-c", _OVERWRITE, tmp_path / "kernels.so", tmp_path / "new.so"],
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "the end\n"), done.stderr


def test_equal_files_are_loaded_once(tmp_path: Path) -> None:
    code = compile_functions({"count": count()}, AVX2)
    paths = [tmp_path / f"{name}.so" for name in ("one", "two")]
    for path in paths:
        path.write_bytes(code)
    one, two = map(KernelLibrary, paths)
    assert one.address("count") == two.address("count") and one.path != two.path
    with pytest.raises(EngineError, match=r"kernel uneven is missing from .*two\.so"):
        two.address("uneven")
    pieces = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    assert not pieces & {str(path) for path in paths}
