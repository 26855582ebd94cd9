"""Opening the GPU of a host to see whether it can run an engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from belle_compile.runtime.artifact import TargetInfo
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.cuda_device import CudaDevice, open_device
from belle_compile.runtime.executors.factory import cannot_run


@contextmanager
def opened_gpu(target: TargetInfo, otherwise: str) -> Iterator[CudaDevice]:
    """The first GPU, until the block ends; raises `EngineError` without a driver or a GPU, and for one that is too small for a
    rank of the engine. `otherwise` is what else can be done then than to end what runs on the GPU."""
    try:
        device = open_device()
    except EngineError as error:
        found = error.what + (f" ({error.found})" if error.found else "")
        raise cannot_run(target, found, "an NVIDIA GPU and its driver", error.remedy) from error
    try:
        needed, free = target.requires.memory_bytes, device.memory_bytes
        if free < needed:
            found, expected = f"{free / 2**30:.1f} GiB of free memory on {device.name}", f"{needed / 2**30:.1f} GiB"
            raise cannot_run(target, found, expected, f"end what else runs on the GPU, or {otherwise}")
        yield device
    finally:
        device.close()
