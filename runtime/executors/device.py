"""The device interface of the CUDA executor: memory, copies, kernels, recorded steps. `CudaDevice` implements it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.program import Launch

if TYPE_CHECKING:
    from belle_compile.runtime.distributed.collectives import Collectives

Bytes = NDArray[np.uint8]
Box = tuple[int, int, int]  # planes, rows of a plane, and bytes of a row
Pitches = tuple[int, int]  # rows from a plane to the next one, and bytes from a row to the next one
Function = Any  # a loaded kernel, by the device's own type
Recorded = Any  # a recorded step, likewise


class Device(Protocol):
    """One GPU. What is enqueued runs in order; `synchronize` waits until all of it has run."""

    name: str
    arch: str  # "sm_80"
    memory_bytes: int  # free when the device was opened
    shared_bytes: int  # bytes of shared memory that a block of threads may have

    @property
    def stream(self) -> int:
        """The address of the stream on which everything is enqueued."""
        ...

    def enter(self) -> None:
        """Make this the calling thread's device."""
        ...

    def allocate(self, size: int, what: str) -> int:
        """Allocate zeroed memory, return its address; raises an `EngineError` with its use `what` where there is no room."""
        ...

    def host_memory(self, size: int) -> Bytes:
        """Allocate zeroed host memory that copies read and write at full speed."""
        ...

    def load(self, name: str, code: bytes, launch: Launch) -> Function:
        """Load the kernel `name` from its machine code."""
        ...

    def launch(self, function: Function, launch: Launch, rows: int, pointers: Sequence[int]) -> None:
        """Enqueue a kernel for `rows` rows, with the addresses of its arguments."""
        ...

    def upload(self, address: int, source: Bytes) -> None:
        """Enqueue a copy from host memory. Memory that is not from `host_memory` has been read when this returns."""
        ...

    def download(self, target: Bytes, address: int) -> None:
        """Enqueue a copy to memory from `host_memory`."""
        ...

    def download_rows(self, target: Bytes, address: int, pitch: int) -> None:
        """Enqueue a copy to `target` [rows, width] from rows that begin every `pitch` bytes."""
        ...

    def copy(self, target: int, source: int, size: int) -> None:
        """Enqueue a copy of `size` bytes within the device's memory; the two places do not overlap."""
        ...

    def copy_box(self, target: int, target_pitches: Pitches, source: int, source_pitches: Pitches, box: Box) -> None:
        """Enqueue a copy of planes of rows within the device's memory."""
        ...

    def record(self, run: Callable[[], None]) -> Recorded:
        """Record what `run` enqueues, without running it."""
        ...

    def forget(self, recorded: Recorded) -> None:
        """Free a recording. It is not replayed any more."""
        ...

    def replay(self, recorded: Recorded) -> None:
        """Enqueue what was recorded."""
        ...

    def times(self, run: Callable[[Callable[[], None]], None]) -> list[float]:
        """Call `run(mark)`; returns the seconds, by the device's clock, from each call of `mark` to the next."""
        ...

    def join(self, collectives: Collectives) -> None:
        """Connect to the devices of the other ranks; waits for all of them."""
        ...

    def all_reduce(self, address: int, count: int) -> None:
        """Enqueue the sum over ranks of `count` float32 values, in place."""
        ...

    def copy_bandwidth(self) -> float:
        """Bytes a second, read and written, of copies within the device: the limit of kernels that stream through memory."""
        ...

    def synchronize(self) -> None:
        """Wait until all enqueued work has run; raises `EngineError` where a part of it failed."""
        ...

    def close(self) -> None:
        """Free all memory, kernels and recordings."""
        ...
