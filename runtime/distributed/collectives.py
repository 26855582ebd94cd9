"""Communication between ranks: sums of activations, a step's inputs from rank 0 to all, results from all to rank 0."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.distributed.ranks import Place, supervised
from belle_compile.runtime.distributed.shared_sums import SharedSums
from belle_compile.runtime.errors import EngineError, install
from belle_compile.runtime.forks import finalize
from belle_compile.runtime.memory import anonymous

_SPINS = 300  # polls in a row before yielding the core between polls
_YIELDS = 20_000  # polls of an idle rank, yielding the core, before it sleeps between polls: about 10 ms
_SLEEP_S, _LONGEST_SLEEP_S = 0.0005, 0.005
_LAST_OUTPUT_S = 0.3  # time for mpiexec to pass on what ranks have printed
_PEER_END_S = 2.0  # time for the end of another rank to be reported, and to end this one, before its own error is
_REPORT, _VERDICT, _STEP, _RESULT = 1, 2, 3, 4  # MPI tags
_MPICH_MEMORY = "/dev/shm/mpich_shm_"


class Collectives(Protocol):
    """The ranks of an engine. Every rank makes the same calls in the same order, from one thread at a time."""

    rank: int
    ranks: int
    ranks_here: int  # ranks on this host
    rank_here: int  # this rank's number among those
    sharing: int  # how many ranks of this host may run on the cores of this rank, itself included
    shared: SharedSums | None  # where all ranks are on one host: the memory in which kernel libraries sum

    def memory(self, size: int) -> NDArray[np.uint8]:
        """Allocate zeroed memory whose values are summed fastest. Every rank calls this once."""
        ...

    def all_reduce(self, values: NDArray[np.float32]) -> None:
        """Sum `values` ([n], or [rows, width] with any row stride) over ranks in place, to the same bits on each rank.

        The sum is made by messages. Where there is `shared`, kernel libraries sum faster.
        """
        ...

    def broadcast(self, message: NDArray[np.int32], length: int = 0) -> None:
        """Copy the first `length` numbers of rank 0's `message` to the `message` of the other ranks, which is no shorter."""
        ...

    def gather(self, message: NDArray[np.int32], length: int, into: list[NDArray[np.int32]]) -> None:
        """Copy the first `length` numbers of every rank's `message` to rank 0, which has a buffer for each rank in `into`."""
        ...

    def agree(self, report: bytes, judge: Callable[[dict[int, bytes]], bytes], timeout_s: float) -> bytes:
        """Send `report` to rank 0, which judges those that came in time (rank -> report); returns its verdict on every rank."""
        ...

    def close(self) -> None:
        """Leave in good order. A process that ends without this call ends all ranks."""
        ...


class MpiCollectives:
    """Collectives over MPI, with shared memory for sums where all ranks are on one host. A process makes one at most."""

    _joined = False

    def __init__(self, *, shared: bool | None = None, abort: Callable[[], None] | None = None) -> None:
        """Connect to the other ranks; waits until all do.

        `shared` False sums by messages even on one host. `abort`, if given, ends all ranks in place of MPI_Abort. Raises
        `EngineError` when mpi4py or MPI is missing.
        """
        if MpiCollectives._joined:
            remedy = "start the ranks anew, or keep the engine"
            raise EngineError("ranks", "an engine was loaded by these processes before", remedy=remedy)
        try:
            import mpi4py

            mpi4py.rc.initialize = False
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py finds no MPI library
            remedy = install("ranks")
            raise EngineError("ranks", "MPI is missing", found=str(error).splitlines()[0], remedy=remedy) from None
        if not MPI.Is_initialized():
            MPI.Init_thread(MPI.THREAD_SERIALIZED)
        self._mpi = MPI
        self._comm: Any = MPI.COMM_WORLD.Dup()
        self.rank, self.ranks = int(self._comm.rank), int(self._comm.size)
        host_comm = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.ranks_here, self.rank_here = int(host_comm.size), int(host_comm.rank)
        cores = os.sched_getaffinity(0)
        self.sharing = sum(1 for rank_cores in host_comm.allgather(cores) if rank_cores & cores)
        _remove_names_of_shared_memory()  # all ranks of the host have mapped it: they have sent their cores
        shared = self.ranks_here == self.ranks if shared is None else shared
        self.shared = SharedSums(self._comm, MPI) if shared else None
        self._clean, self._abort = False, abort
        # MPI_Finalize waits for all ranks, so a rank that leaves in the middle of a step must end them. The finalizer that was
        # made last runs first, so an engine that nobody closed closes itself before this one runs.
        finalize(MpiCollectives, self._leave)
        MpiCollectives._joined = True

    def memory(self, size: int) -> NDArray[np.uint8]:
        memory = self.shared.memory(size, self._comm, self._mpi) if self.shared else None
        return anonymous(size) if memory is None else memory

    def all_reduce(self, values: NDArray[np.float32]) -> None:
        packed = np.ascontiguousarray(values)
        with self._messages():
            self._all_reduce(packed)
        if packed is not values:
            values[:] = packed

    def _all_reduce(self, values: NDArray[np.float32]) -> None:
        if self.ranks == 2:
            self._comm.Allreduce(self._mpi.IN_PLACE, values)  # a + b is b + a bit for bit
        else:
            # MPI only advises that MPI_Allreduce give all ranks the same bits, and algorithms in which each of three ranks
            # begins with its own value do not. A sum that one rank makes and sends is the same everywhere.
            self._comm.Reduce(values if self.rank else self._mpi.IN_PLACE, values, root=0)
            self._comm.Bcast(values, root=0)

    def broadcast(self, message: NDArray[np.int32], length: int = 0) -> None:
        with self._messages():
            if self.rank:
                self._wait(self._comm.Irecv(message, 0, _STEP), sleepy=True)
                return
            sent = [self._comm.Isend(message[:length], rank, _STEP) for rank in range(1, self.ranks)]
            for request in sent:
                self._wait(request)

    def gather(self, message: NDArray[np.int32], length: int, into: list[NDArray[np.int32]]) -> None:
        with self._messages():
            if self.rank:
                self._wait(self._comm.Isend(message[:length], 0, _RESULT))
                return
            received = [self._comm.Irecv(into[rank], rank, _RESULT) for rank in range(1, self.ranks)]
            into[0][:length] = message[:length]
            for request in received:
                self._wait(request)

    def agree(self, report: bytes, judge: Callable[[dict[int, bytes]], bytes], timeout_s: float) -> bytes:
        if self.rank:
            self._comm.isend(report, 0, _REPORT).wait()
            verdict: bytes = self._receive(0, _VERDICT, None)
            return verdict
        deadline, reports = time.monotonic() + timeout_s, {0: report}
        for rank in range(1, self.ranks):
            received = self._receive(rank, _REPORT, deadline)
            if received is not None:
                reports[rank] = received
        verdict = judge(reports)
        for rank in reports.keys() - {0}:
            self._comm.isend(verdict, rank, _VERDICT).wait()
        return verdict

    def close(self) -> None:
        self._clean = True

    def _leave(self) -> None:
        if not self._clean:
            if self._abort:
                self._abort()
            time.sleep(_LAST_OUTPUT_S)  # MPI_Abort ends mpiexec, which passes on nothing after it
            self._mpi.COMM_WORLD.Abort(1)
        # mpi4py finalizes MPI only where it has initialized it. Where no rank finalizes MPI, mpiexec ends the others.
        self._mpi.Finalize()

    @contextlib.contextmanager
    def _messages(self) -> Iterator[None]:
        """Turn an error of MPI into an `EngineError`.

        Messages fail when another rank ends in the middle of one. Then its end is the cause to report: the error waits until
        that has been done, which ends this rank too.
        """
        try:
            yield
        except self._mpi.Exception as error:
            time.sleep(_PEER_END_S)
            found = str(error).partition("\n")[0].removesuffix(", error stack:")
            remedy = "look at why another rank ended, and start all ranks again"
            raise EngineError("ranks", "a message between ranks failed", found=found, remedy=remedy) from None

    def _receive(self, source: int, tag: int, deadline: float | None) -> Any:
        """Receive a message; None if there is none by `deadline`."""
        while not self._comm.iprobe(source, tag):
            if deadline is not None and time.monotonic() > deadline:
                return None
            time.sleep(_SLEEP_S)
        return self._comm.recv(source=source, tag=tag)

    def _wait(self, request: Any, *, sleepy: bool = False) -> None:
        """Wait for a request; a `sleepy` wait may last. MPI's own waiting would keep the core, even from the rank that the
        request depends on."""
        poll, polls, pause_s = request.Test, 0, _SLEEP_S
        while not poll():
            polls += 1
            if sleepy and polls > _YIELDS:
                time.sleep(pause_s)
                pause_s = min(1.001 * pause_s, _LONGEST_SLEEP_S)  # about a thousandth of the time waited so far
            elif polls > _SPINS:
                os.sched_yield()


def _remove_names_of_shared_memory() -> None:
    """Remove the names of MPICH's memory from /dev/shm, so that the memory goes with the last rank, however that ends.

    MPICH removes them itself, but only when it is finalized: not after a signal.
    """
    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for name in {line.split()[-1] for line in maps if _MPICH_MEMORY in line and not line.endswith(" (deleted)\n")}:
            with contextlib.suppress(OSError):  # another rank was first
                os.unlink(name)


def join_ranks(place: Place) -> MpiCollectives:
    """Connect to the other ranks that a launcher started together with this process; waits until all do the same.

    Raises `EngineError` where MPI is missing, or knows another number of ranks than the launcher's environment says.
    """
    collectives = MpiCollectives(abort=_exit if supervised() else None)
    if collectives.ranks != place.ranks:
        collectives.close()
        remedy = "start them with the mpiexec of the MPI that mpi4py uses, or with srun --mpi=pmi2"
        found, expected = f"{collectives.ranks} in MPI's world", f"{place.ranks}, as the environment says"
        raise EngineError("ranks", "MPI", found=found, expected=expected, remedy=remedy)
    return collectives


def _exit() -> None:
    """End this process at once; belle-run, which supervises it, ends the other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
