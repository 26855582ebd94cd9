"""A device in place of a GPU, whose memory is that of the host."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from belle_compile.runtime.executors.device import Box, Pitches


class HostDevice:
    """The part of `device.Device` that executors of ONNX Runtime and TensorRT use. Addresses are those of the host."""

    name, arch, memory_bytes, shared_bytes, stream = "a host", "sm_80", 1 << 30, 0, 0

    def __init__(self) -> None:
        self.memory: list[npt.NDArray[np.uint8]] = []

    def enter(self) -> None: ...
    def synchronize(self) -> None: ...

    def close(self) -> None:
        self.memory.clear()

    def allocate(self, size: int, what: str) -> int:
        return int(self.host_memory(size).ctypes.data)

    def host_memory(self, size: int) -> npt.NDArray[np.uint8]:
        self.memory.append(np.zeros(size, np.uint8))
        return self.memory[-1]

    def upload(self, address: int, source: npt.NDArray[np.uint8]) -> None:
        ctypes.memmove(address, source.ctypes.data, source.nbytes)

    def download(self, target: npt.NDArray[np.uint8], address: int) -> None:
        ctypes.memmove(target.ctypes.data, address, target.nbytes)

    def copy(self, target: int, source: int, size: int) -> None:
        ctypes.memmove(target, source, size)

    def copy_box(self, target: int, to: Pitches, source: int, of: Pitches, box: Box) -> None:
        planes, rows, size = box
        for plane in range(planes):
            for row in range(rows):
                begin, end = source + (plane * of[0] + row) * of[1], target + (plane * to[0] + row) * to[1]
                ctypes.memmove(end, begin, size)
