"""What the CUDA executor asks of a device: memory, copies, kernels, recorded steps. `CudaDevice` is the driver's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.program import Launch

if TYPE_CHECKING:
    from belle_compile.runtime.distributed.collectives import Collectives

Bytes = NDArray[np.uint8]
Function = Any  # what a device makes of a kernel's code
Recorded = Any  # what it makes of a step


class Device(Protocol):
    """One GPU. Work is done in the order in which it is asked for; `synchronize` waits until all is done."""

    name: str
    arch: str  # "sm_80"
    memory_bytes: int  # that were free when it was opened
    shared_bytes: int  # a block of threads may have
    overlap: bool  # kernels that may do so start before those before them have ended

    def enter(self) -> None:
        """Make it the calling thread's device."""
        ...

    def allocate(self, size: int, what: str) -> int:
        """The address of so many zero bytes; raises `EngineError` that names `what` where they are not there."""
        ...

    def host_memory(self, size: int) -> Bytes:
        """Zero bytes of the host that copies read and write at full speed."""
        ...

    def load(self, name: str, code: bytes, launch: Launch) -> Function:
        """A kernel, ready to be started."""
        ...

    def launch(self, function: Function, launch: Launch, rows: int, pointers: Sequence[int]) -> None:
        """Start it for so many rows."""
        ...

    def upload(self, address: int, source: Bytes) -> None:
        """Copy from host memory; what is not from `host_memory` has been read when it returns."""
        ...

    def download(self, target: Bytes, address: int) -> None:
        """Copy to host memory."""
        ...

    def download_rows(self, target: Bytes, address: int, pitch: int) -> None:
        """Copy [rows, width] from rows that begin every `pitch` bytes."""
        ...

    def record(self, run: Callable[[], None]) -> Recorded:
        """What `run` asks for, to be done by `replay` and not now."""
        ...

    def forget(self, recorded: Recorded) -> None:
        """Give back what a recording takes; it is not replayed any more."""
        ...

    def replay(self, recorded: Recorded) -> None:
        """Do what was recorded."""
        ...

    def times(self, run: Callable[[Callable[[], None]], None]) -> list[float]:
        """Seconds between the moments at which `run` calls what it is given, on the device."""
        ...

    def join(self, collectives: Collectives) -> None:
        """Be one of several ranks from now on; waits for all of them."""
        ...

    def all_reduce(self, address: int, count: int) -> None:
        """Make so many float32 the sum over ranks."""
        ...

    def copy_bandwidth(self) -> float:
        """Bytes a second that it reads and writes when it copies memory of its own: the limit of what streams through it."""
        ...

    def synchronize(self) -> None:
        """Wait; raises `EngineError` when something failed."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...
