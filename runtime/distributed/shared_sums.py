"""The memory in which the ranks of one host sum their values; compiler/backends/tvm/native/sums.c has the C side."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

SLOT_FLOATS = 64 * 1024  # floats in each of a rank's two slots; longer sums are made in such pieces, which stay in cache
_SHARED_FILES = "/dev/shm"
_LINE = 64  # bytes of a cache line, which holds a rank's flags


class _Sums(ctypes.Structure):
    """`Sums` in sums.c."""

    _fields_ = (
        ("rank", ctypes.c_int64),
        ("ranks", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("lines", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("slot_floats", ctypes.c_int64),
        ("arenas", ctypes.c_void_p),
        ("arena_bytes", ctypes.c_int64),
    )


class SharedSums:
    """A rank's view of the memory for sums. All ranks create it together, and call `memory` together, at most once."""

    def __init__(self, comm: Any, mpi: Any) -> None:
        rank_bytes = 4 * 2 * SLOT_FLOATS + _LINE
        self._windows = [mpi.Win.Allocate_shared(rank_bytes, 1, comm=comm)]  # kept alive, since the windows own the memory
        maps = _maps(self._windows[0], int(comm.size))
        maps[comm.rank][:_LINE] = 0
        self._lines = _addresses(maps)
        self._slots = self._lines + np.uint64(_LINE)
        lines, slots = self._lines.ctypes.data, self._slots.ctypes.data
        self._sums = _Sums(int(comm.rank), int(comm.size), 0, lines, slots, SLOT_FLOATS, None, 0)
        comm.Barrier()

    @property
    def address(self) -> int:
        """The address of the structure that `belle_sum` takes."""
        return ctypes.addressof(self._sums)

    def memory(self, size: int, comm: Any, mpi: Any) -> NDArray[np.uint8] | None:
        """Allocate zeroed memory that all ranks map; None where the host's shared memory has no room for that of all ranks."""
        total = sum(comm.allgather(size))
        try:
            room = os.statvfs(_SHARED_FILES)
            fits = room.f_bavail * room.f_frsize > 2 * total
        except OSError:
            fits = False
        if self._sums.arenas or not all(comm.allgather(fits)):
            return None
        self._windows.append(mpi.Win.Allocate_shared(size, 1, comm=comm))
        maps = _maps(self._windows[1], int(comm.size))
        arena: NDArray[np.uint8] = maps[comm.rank]
        arena[:] = 0
        self._arenas = _addresses(maps)
        self._sums.arenas, self._sums.arena_bytes = self._arenas.ctypes.data, len(arena)
        comm.Barrier()
        return arena


def _maps(window: Any, ranks: int) -> list[NDArray[np.uint8]]:
    return [np.frombuffer(window.Shared_query(rank)[0], np.uint8) for rank in range(ranks)]


def _addresses(maps: list[NDArray[np.uint8]]) -> NDArray[np.uint64]:
    return np.array([each.ctypes.data for each in maps], np.uint64)
