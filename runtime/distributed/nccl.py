"""Sums over GPUs by NCCL, called through ctypes."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path

from belle_compile.runtime.errors import EngineError

ID_BYTES = 128
_FLOAT32, _SUM = 7, 0  # ncclDataType_t, ncclRedOp_t


class _UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_char * ID_BYTES)]


class Nccl:
    """This process' communicator with the other ranks."""

    def __init__(self) -> None:
        """Load the library; raises `EngineError` where there is none."""
        self._library = _load()
        self._library.ncclGetErrorString.restype = ctypes.c_char_p
        self._comm = ctypes.c_void_p()

    def unique_id(self) -> bytes:
        """Make the identifier of a new communicator. One rank makes it and sends it to the others."""
        identifier = _UniqueId()
        self._call("ncclGetUniqueId", ctypes.byref(identifier))
        return ctypes.string_at(ctypes.byref(identifier), ID_BYTES)

    def join(self, identifier: bytes, ranks: int, rank: int) -> None:
        """Join the communicator; waits until all ranks have joined it."""
        unique_id = _UniqueId.from_buffer_copy(identifier)
        self._call("ncclCommInitRank", ctypes.byref(self._comm), ctypes.c_int(ranks), unique_id, ctypes.c_int(rank))

    def all_reduce(self, address: int, count: int, stream: int) -> None:
        """Enqueue on a stream the sum over ranks of `count` float32 at an address, in place."""
        values, size = ctypes.c_void_p(address), ctypes.c_size_t(count)
        self._call("ncclAllReduce", values, values, size, _FLOAT32, _SUM, self._comm, ctypes.c_void_p(stream))

    def close(self) -> None:
        """Leave the communicator."""
        if self._comm:
            self._library.ncclCommDestroy(self._comm)
            self._comm = ctypes.c_void_p()

    def _call(self, name: str, *arguments: object) -> None:
        error = getattr(self._library, name)(*arguments)
        if error:
            found = self._library.ncclGetErrorString(error).decode()
            raise EngineError("nccl", name, found=found, remedy="run with NCCL_DEBUG=INFO to see more")


def _load() -> ctypes.CDLL:
    """Load the system's library, else that of NVIDIA's Python package."""
    names = ["libnccl.so.2"]
    spec = find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        names += map(str, sorted(Path(folder).glob("nccl/lib/libnccl.so.2")))
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    remedy = "install it, as with pip install nvidia-nccl-cu13 (or -cu12, by the driver)"
    raise EngineError("nccl", "NCCL is missing", found="no libnccl.so.2", remedy=remedy)
