"""What ranks do together, in as many processes under mpiexec."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mpi4py")
pytest.importorskip("tvm")

from belle_compile.compiler.backends.tvm.isa import AVX2
from belle_compile.compiler.backends.tvm.library import compile_functions
from belle_compile.runtime.distributed import collectives
from belle_compile.runtime.distributed.launcher import mpiexec
from belle_compile.runtime.errors import EngineError
from tests.runtime.executors.test_native import count

ROOT = Path(__file__).parents[3]
BEGIN = """
from pathlib import Path
import numpy as np
from belle_compile.runtime.distributed.collectives import MpiCollectives
from belle_compile.runtime.executors.native import CallList, KernelLibrary, ThreadPool
from belle_compile.runtime.distributed.shared_sums import SLOT_FLOATS
ranks = MpiCollectives(shared={shared})
comm, me, n = ranks._comm, ranks.rank, ranks.ranks
def same(array):
    return len(set(comm.allgather(array.tobytes()))) == 1
def add(values):
    if not ranks.shared:
        ranks.all_reduce(values)
        return
    rows = values.reshape(1, -1) if values.ndim == 1 else values
    count = np.array([len(rows)], np.int32)
    places = [ranks.shared.address, rows.ctypes.data, count.ctypes.data, rows.shape[1], rows.strides[0] // 4]
    CallList(pool, [(library.sum_address(), places)]).run()
if ranks.shared and {library!r}:
    library = KernelLibrary(Path({library!r}))
    pool = ThreadPool(library, {threads})
"""
END = """
comm.Barrier()
ranks.close()
if me == 0: print("well")
"""


def run(
    count: int, code: str, *, shared: bool | None = None, library: Path | str = "", threads: int = 1, before: str = ""
) -> subprocess.CompletedProcess[str]:
    program = before + BEGIN.format(shared=shared, library=str(library), threads=threads) + code + END
    command = [mpiexec(), "-n", str(count), sys.executable, "-c", program]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
        env={**os.environ, "MPIR_CVAR_POLLS_BEFORE_YIELD": "100", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def works(count: int, code: str, **more: Any) -> None:
    done = run(count, code, **more)
    assert (done.returncode, done.stdout) == (0, "well\n"), done.stderr


SUMS = """
random = np.random.default_rng(me)
for size in (1, 7, 2048, SLOT_FLOATS, 2 * SLOT_FLOATS + 3):
    for _ in range(5 if size < 5000 else 1):
        part = (random.normal(size=size) * 10.0 ** random.integers(-6, 7, size)).astype(np.float32)
        parts = comm.allgather(part)
        add(part)
        assert same(part)
        exact = np.sum(parts, axis=0, dtype=np.float64)
        assert np.allclose(part, exact, rtol=0, atol=np.abs(parts).max() * 1e-6)
arena = ranks.memory(1 << 21)
assert not arena.any()
for size in (2048, 16_384, 70_001):
    for at in (0, 64 * (me + 1)):  # ranks may have their values in different places
        own = arena[at : at + 4 * size].view(np.float32)
        own[:] = (random.normal(size=size) * 10.0 ** random.integers(-6, 7, size)).astype(np.float32)
        parts = comm.allgather(own.copy())
        guard = arena[at + 4 * size : at + 4 * size + 64]
        guard[:] = 7 + me
        comm.Barrier()
        add(own)
        assert same(own) and (guard == 7 + me).all()
        one_by_one = parts[0]
        for part in parts[1:]:
            one_by_one = one_by_one + part
        assert not ranks.shared or np.array_equal(own, one_by_one), 'in the order of ranks'
        comm.Barrier()
for height, width in ((5, 60), (300, 60), (3, 20_000), (2, SLOT_FLOATS + 1)):  # rows that lie apart
    stride = width + 4
    for start in (0, 64 * me):
        for memory in (arena[start:], np.zeros(4 * height * stride, np.uint8)):
            own = memory[: 4 * height * stride].view(np.float32).reshape(height, stride)
            own[:] = random.normal(size=own.shape)
            parts, guard = comm.allgather(own[:, :width].copy()), own[:, width:].copy()
            comm.Barrier()
            add(own[:, :width])
            assert same(own[:, :width]) and np.array_equal(own[:, width:], guard)
            one_by_one = parts[0]
            for part in parts[1:]:
                one_by_one = one_by_one + part
            assert np.allclose(own[:, :width], one_by_one, rtol=0, atol=1e-5)
            assert not ranks.shared or np.array_equal(own[:, :width], one_by_one), 'in the order of ranks'
            comm.Barrier()
rows = np.full((5, 64), me + 1, np.float32)
before = rows.copy()
add(rows[:3, :60])
assert (rows[:3, :60] == n * (n + 1) / 2).all()
rows[:3, :60] = me + 1
assert (rows == before).all()
whole = np.full((5, 64), me, np.float32)
add(whole)
assert (whole == n * (n - 1) / 2).all()
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kernel library, of which only what adds up is used."""
    path = tmp_path_factory.mktemp("native") / "kernels.so"
    path.write_bytes(compile_functions({"count": count()}, AVX2))
    return path


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_sums_by_messages_are_the_same_bit_for_bit(ranks: int) -> None:
    works(ranks, SUMS, shared=False)


@pytest.mark.parametrize(("ranks", "threads"), [(2, 1), (2, 3), (3, 1), (3, 2), (4, 1)])
def test_sums_in_shared_memory_are_those_in_the_order_of_ranks(ranks: int, threads: int, library: Path) -> None:
    works(ranks, SUMS, shared=True, library=library, threads=threads)


def test_sums_of_ranks_that_are_late(library: Path) -> None:
    works(2, library=library, code="""
import time
for i in range(40):
    if i % 4 == me: time.sleep(0.002)
    x = np.full(100, i + me, np.float32)
    add(x)
    assert (x == 2 * i + 1).all()
""")  # fmt: skip


def test_messages_to_all_and_to_rank_0() -> None:
    works(3, """
assert (n, ranks.ranks_here, ranks.sharing, ranks.rank_here) == (3, 3, 3, me)
buffer = np.full(100_000, -1, np.int32)
for length in (1, 10, 90_000):
    if me == 0: buffer[:length] = np.arange(length)
    ranks.broadcast(buffer, length)
    assert (buffer[:length] == np.arange(length)).all() and (buffer[length:] == -1).all()
    into = [np.zeros(100_000, np.int32) for _ in range(n)] if me == 0 else []
    ranks.gather(np.full(100_000, me + 1, np.int32), length + me, into)
    if me == 0: assert [int(part.sum()) for part in into] == [(rank + 1) * (length + rank) for rank in range(n)]
""")  # fmt: skip


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs 2 cores")
@pytest.mark.parametrize(
    ("bound", "sharing"),
    [([(0, 1), (0, 1), (0, 1)], [3, 3, 3]), ([(0,), (1,), (0,)], [2, 1, 2]), ([(0, 1), (1,), (0,)], [3, 2, 2])],
)
def test_ranks_that_a_launcher_has_bound(bound: list[tuple[int, ...]], sharing: list[int]) -> None:
    cores = sorted(os.sched_getaffinity(0))
    sets = [{cores[number] for number in numbers} for numbers in bound]
    before = f"import os\nos.sched_setaffinity(0, {sets}[int(os.environ['PMI_RANK'])])"
    works(3, f"assert ranks.sharing == {sharing}[me]", before=before)


def test_agreement_without_one_of_them() -> None:
    works(3, """
heard = {}
def judge(said):
    heard.update(said)
    return b"good"
assert ranks.agree(b"rank %d" % me, judge, 30) == b"good"
if me == 0: assert heard == {0: b"rank 0", 1: b"rank 1", 2: b"rank 2"}
heard.clear()
if me != 1: assert ranks.agree(b"again", judge, 0.5) == b"good"
if me == 0: assert set(heard) == {0, 2}
""")  # fmt: skip


def test_a_rank_that_leaves_in_order_waits_for_all() -> None:
    works(2, """
import time
if me == 1:
    ranks.close()
    raise SystemExit
time.sleep(1)
comm = type("Alone", (), {"Barrier": lambda self: None})()
""")  # fmt: skip


def test_a_rank_that_leaves_ends_all() -> None:
    done = run(2, "if me == 1: raise SystemExit(3)\nranks.all_reduce(np.zeros(4, np.float32))")
    assert done.returncode != 0 and "well" not in done.stdout


def test_without_mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(EngineError, match=r"MPI is missing: found .*; pip install -c constraints\.txt '\.\[ranks\]'"):
        collectives.MpiCollectives()
