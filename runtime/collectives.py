"""What ranks do together: sums of activations, a step's inputs from rank 0 to all, results from all to rank 0."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.errors import EngineError
from runtime.memory import anonymous

SLOT_FLOATS = 64 * 1024  # of a rank in shared memory; longer sums go through in pieces, which stay in cache
_LARGE = 16 * 1024  # floats from which on a second wait takes less time than copies
_PIECE = 16 * 1024  # floats that are added up at a time, and stay in a core's own cache
_READY, _DONE, _PLACE = 0, 1, 2  # of a rank's line: sums that it is ready for and done with, and where its values are
_SHARED_FILES = "/dev/shm"
_LINE = 64
_SPINS = 300  # looks at a value in a row before giving the core away between them
_YIELDS = 20_000  # looks of a rank without work, giving the core away, before it sleeps between them: about 10 ms
_SLEEP_S = 0.0005
_LAST_WORDS_S = 0.3
_HEARD, _VERDICT, _STEP, _RESULT = 1, 2, 3, 4  # tags


class Collectives(Protocol):
    """The ranks of an engine. Every rank makes the same calls in the same order, from one thread at a time."""

    rank: int
    ranks: int
    ranks_here: int  # of this host
    rank_here: int  # among those
    sharing: int  # of these, ranks that may run on the same cores

    def memory(self, size: int) -> NDArray[np.uint8]:
        """So many zero bytes: contiguous values in it are summed the fastest. Every rank asks for some, once."""
        ...

    def all_reduce(self, values: NDArray[np.float32]) -> None:
        """Make `values` ([n], or [rows, width] with any row stride) the sum over ranks, the same bit for bit on each."""
        ...

    def broadcast(self, message: NDArray[np.int32], length: int = 0) -> None:
        """Give the first `length` numbers of rank 0's `message` to the others' buffers of at least that size."""
        ...

    def gather(self, message: NDArray[np.int32], length: int, into: list[NDArray[np.int32]]) -> None:
        """Give the first `length` numbers of every rank's `message` to rank 0, which has a buffer for each in `into`."""
        ...

    def agree(self, words: bytes, judge: Callable[[dict[int, bytes]], bytes], timeout_s: float) -> bytes:
        """Rank 0 judges what ranks said within the time (rank -> words), and all get its verdict."""
        ...

    def close(self) -> None:
        """Say that this rank leaves in good order. A process that ends without it ends all ranks."""
        ...

    def abort(self) -> None:
        """End all ranks at once, this process included."""
        ...


class MpiCollectives:
    """Over MPI: messages between ranks, sums through shared memory where all ranks are on one host. One a process."""

    _joined = False

    def __init__(self, *, shared: bool | None = None, abort: Callable[[], None] | None = None) -> None:
        """Join the other ranks; waits until all do. `shared` False sums by messages even on one host, `abort` ends all ranks in
        place of MPI_Abort.

        Raises `EngineError` when mpi4py is missing.
        """
        if MpiCollectives._joined:
            remedy = "start the ranks anew, or keep the engine"
            raise EngineError("ranks", "an engine was loaded by these processes before", remedy=remedy)
        try:
            import mpi4py

            mpi4py.rc.initialize = False
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py finds no MPI library
            remedy = "pip install 'belle-compile[ranks]'"
            raise EngineError("ranks", "MPI is missing", found=str(error).splitlines()[0], remedy=remedy) from None
        if not MPI.Is_initialized():
            MPI.Init_thread(MPI.THREAD_SERIALIZED)
        self._mpi = MPI
        self._comm: Any = MPI.COMM_WORLD.Dup()
        self.rank, self.ranks = int(self._comm.rank), int(self._comm.size)
        here = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.ranks_here, self.rank_here = int(here.size), int(here.rank)
        cores = os.sched_getaffinity(0)
        self.sharing = sum(1 for others in here.allgather(cores) if others & cores)
        shared = self.ranks_here == self.ranks if shared is None else shared
        self._sums = _SharedSums(self._comm, MPI) if shared else None
        self._clean, self._abort = False, abort
        # MPI_Finalize waits for all ranks, so one that leaves in the middle of a step ends them. Finalizers run last made
        # first: an engine that nobody closed has closed itself before.
        weakref.finalize(MpiCollectives, self._leave)
        MpiCollectives._joined = True

    def memory(self, size: int) -> NDArray[np.uint8]:
        shared = self._sums.memory(size, self._comm, self._mpi) if self._sums else None
        return anonymous(size) if shared is None else shared

    def all_reduce(self, values: NDArray[np.float32]) -> None:
        if self._sums:
            self._sums.add(values.reshape(-1) if values.flags.c_contiguous else values)
        elif values.flags.c_contiguous:
            self._all_reduce(values)
        else:
            packed = np.ascontiguousarray(values)
            self._all_reduce(packed)
            values[:] = packed

    def _all_reduce(self, values: NDArray[np.float32]) -> None:
        if self.ranks == 2:
            self._comm.Allreduce(self._mpi.IN_PLACE, values)  # a + b is b + a bit for bit
        else:
            # MPI only advises that MPI_Allreduce give all ranks the same bits, and algorithms in which each of three ranks
            # begins with its own value do not. What one rank has summed and sent is the same everywhere.
            self._comm.Reduce(values if self.rank else self._mpi.IN_PLACE, values, root=0)
            self._comm.Bcast(values, root=0)

    def broadcast(self, message: NDArray[np.int32], length: int = 0) -> None:
        if self.rank:
            self._wait(self._comm.Irecv(message, 0, _STEP), sleepy=True)
            return
        sent = [self._comm.Isend(message[:length], rank, _STEP) for rank in range(1, self.ranks)]
        for request in sent:
            self._wait(request)

    def gather(self, message: NDArray[np.int32], length: int, into: list[NDArray[np.int32]]) -> None:
        if self.rank:
            self._wait(self._comm.Isend(message[:length], 0, _RESULT))
            return
        coming = [self._comm.Irecv(into[rank], rank, _RESULT) for rank in range(1, self.ranks)]
        into[0][:length] = message[:length]
        for request in coming:
            self._wait(request)

    def agree(self, words: bytes, judge: Callable[[dict[int, bytes]], bytes], timeout_s: float) -> bytes:
        if self.rank:
            self._comm.isend(words, 0, _HEARD).wait()
            verdict: bytes = self._receive(0, _VERDICT, None)
            return verdict
        until, said = time.monotonic() + timeout_s, {0: words}
        for rank in range(1, self.ranks):
            heard = self._receive(rank, _HEARD, until)
            if heard is not None:
                said[rank] = heard
        verdict = judge(said)
        for rank in said.keys() - {0}:
            self._comm.isend(verdict, rank, _VERDICT).wait()
        return verdict

    def close(self) -> None:
        self._clean = True

    def abort(self) -> None:
        if self._abort:
            self._abort()
        time.sleep(_LAST_WORDS_S)  # mpiexec passes on no more of what ranks said
        self._mpi.COMM_WORLD.Abort(1)

    def _leave(self) -> None:
        if not self._clean:
            self.abort()
        self._mpi.Finalize()  # mpi4py does so only for what it began; without it mpiexec ends the other ranks

    def _receive(self, source: int, tag: int, until: float | None) -> Any:
        """A message, or None when it has not come by the time `until`."""
        while not self._comm.iprobe(source, tag):
            if until is not None and time.monotonic() > until:
                return None
            time.sleep(_SLEEP_S)
        return self._comm.recv(source=source, tag=tag)

    def _wait(self, request: Any, *, sleepy: bool = False) -> None:
        """MPI's own waiting keeps the core even from the rank that is waited for."""
        look, looks = request.Test, 0
        while not look():
            looks += 1
            if sleepy and looks > _YIELDS:
                time.sleep(_SLEEP_S)
            elif looks > _SPINS:
                os.sched_yield()


class _SharedSums:
    """Sums of ranks of one host through memory that all of them map.

    Small ones: every rank copies its values to its slot, raises its flag, waits for all flags, and adds all slots up in the
    order of ranks: so all have the same bits. Slots are there twice: who is at sum n + 2 knows that all have raised the flag
    for n + 1, and so have read the slots of n, which are written again only now. On x86 stores are seen in the order in which
    they were made.

    Large ones whose values lie in `memory`: nobody copies anything. When all ranks have said where their values are, each adds
    up its share of them, in the order of ranks, and writes that to all; they go on when all have said that they are done.
    """

    def __init__(self, comm: Any, mpi: Any) -> None:
        ranks = int(comm.size)
        own = 4 * 2 * SLOT_FLOATS + _LINE
        self._window = mpi.Win.Allocate_shared(own, 1, comm=comm)  # kept: it is the memory
        self._slots: list[list[NDArray[np.float32]]] = [[], []]
        lines = []
        for rank in range(ranks):
            memory, _ = self._window.Shared_query(rank)
            whole = np.frombuffer(memory, np.uint8)
            floats = whole[_LINE:own].view(np.float32)
            self._slots[0].append(floats[:SLOT_FLOATS])
            self._slots[1].append(floats[SLOT_FLOATS:])
            lines.append(memoryview(whole[:24].view(np.int64)))  # type: ignore[arg-type]  # quicker to look at than an array
        self._rank, self._lines = int(comm.rank), lines
        self._own = lines[self._rank]
        self._others = [line for rank, line in enumerate(lines) if rank != self._rank]
        self._own[_READY] = self._own[_DONE] = self._count = 0
        self._arenas: list[NDArray[np.uint8]] = []
        self._sum = np.empty(_PIECE, np.float32)
        comm.Barrier()

    def memory(self, size: int, comm: Any, mpi: Any) -> NDArray[np.uint8] | None:
        """Zero bytes that all ranks map, or None where the host's shared memory has no room for those of all."""
        wanted = sum(comm.allgather(size))
        try:
            room = os.statvfs(_SHARED_FILES)
            fits = room.f_bavail * room.f_frsize > 2 * wanted
        except OSError:
            fits = False
        if self._arenas or not all(comm.allgather(fits)):
            return None
        self._arena_window = mpi.Win.Allocate_shared(size, 1, comm=comm)
        for rank in range(len(self._lines)):
            memory, _ = self._arena_window.Shared_query(rank)
            self._arenas.append(np.frombuffer(memory, np.uint8))
        own = self._arenas[self._rank]
        own[:] = 0
        comm.Barrier()
        return own

    def add(self, values: NDArray[np.float32]) -> None:
        """Make `values`, a vector or rows that lie apart, the sum over ranks."""
        if values.size >= _LARGE and self._arenas:
            arena = self._arenas[self._rank]
            offset = values.ctypes.data - arena.ctypes.data
            end = offset + sum((n - 1) * step for n, step in zip(values.shape, values.strides, strict=True)) + values.itemsize
            if 0 <= offset and end <= len(arena):
                self._add_in_place(offset, values)
                return
        at_once = SLOT_FLOATS // max(values[0].size, 1)
        if not at_once:
            for row in values:
                self.add(row)
            return
        for start in range(0, len(values), at_once):
            self._add(values[start : start + at_once])

    def _add(self, values: NDArray[np.float32]) -> None:
        self._count = count = self._count + 1
        slots = [slot[: values.size].reshape(values.shape) for slot in self._slots[count & 1]]
        slots[self._rank][:] = values
        self._own[_READY] = count
        self._wait(_READY, count)
        np.add(slots[0], slots[1], out=values)
        for slot in slots[2:]:
            np.add(values, slot, out=values)

    def _add_in_place(self, offset: int, values: NDArray[np.float32]) -> None:
        self._count = count = self._count + 1
        self._own[_PLACE] = offset
        self._own[_READY] = count
        self._wait(_READY, count)
        starts = (line[_PLACE] for line in self._lines)
        parts = [
            np.ndarray(values.shape, np.float32, arena, start, values.strides)
            for arena, start in zip(self._arenas, starts, strict=True)
        ]
        ranks, size, width = len(parts), len(values), values[0].size
        first, last = (size * number // ranks for number in (self._rank, self._rank + 1))
        at_once = max(1, _PIECE // width)
        for start in range(first, last, at_once):
            piece = slice(start, min(start + at_once, last))
            total = self._sum_of(parts[0][piece].shape)
            np.add(parts[0][piece], parts[1][piece], out=total)
            for part in parts[2:]:
                np.add(total, part[piece], out=total)
            for part in parts:
                part[piece] = total
        self._own[_DONE] = count
        self._wait(_DONE, count)

    def _sum_of(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        size = prod(shape)
        if size > self._sum.size:  # a row longer than a piece
            self._sum = np.empty(size, np.float32)
        return self._sum[:size].reshape(shape)

    def _wait(self, what: int, count: int) -> None:
        for line in self._others:
            looks = 0
            while line[what] < count:
                looks += 1
                if looks > _SPINS:
                    os.sched_yield()
