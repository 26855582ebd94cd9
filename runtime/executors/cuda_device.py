"""A GPU, used through NVIDIA's driver with no other package than `cuda-bindings`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from belle_compile.runtime.distributed.nccl import ID_BYTES, Nccl
from belle_compile.runtime.errors import EngineError, install
from belle_compile.runtime.executors.device import Box, Bytes, Pitches
from belle_compile.runtime.program import Launch

if TYPE_CHECKING:
    from belle_compile.runtime.distributed.collectives import Collectives

STAGE = "cuda"
_OLDEST_DRIVER = 12_080  # as the driver reports its version: CUDA 12.8
_START = "cuLaunchKernelEx"
_UNASKED_SHARED = 48 << 10  # bytes of shared memory that a kernel may use without an attribute
_COPIED, _COPIES = 512 << 20, 4  # bytes of each copy that measures the bandwidth, and number of copies at each distance
_DISTANCES = tuple(megabytes << 20 for megabytes in (0, 1, 2, 5, 16, 33))  # from the end of the source to the target
_STAGING = 64 << 20  # bytes of each of the two pinned buffers through which weights are copied


def open_device(number: int = 0) -> CudaDevice:
    """Open the GPU with this number; raises `EngineError` where there is no driver, one that is too old, or no such GPU."""
    try:
        ctypes.CDLL("libcuda.so.1")  # where it is missing, cuda-bindings may hang
    except OSError:
        remedy = "install NVIDIA's driver, or give the container access to the GPU"
        raise EngineError(STAGE, "no NVIDIA driver on this host", found="no libcuda.so.1", remedy=remedy) from None
    try:
        from cuda.bindings import driver
    except ImportError:
        remedy = install("cuda")
        raise EngineError(STAGE, "the package cuda-bindings is missing", remedy=remedy) from None
    return CudaDevice(driver, number)


class CudaDevice:
    """The primary context of a GPU, with one stream."""

    def __init__(self, driver: Any, number: int) -> None:
        self._driver = driver
        self._behind_kernel = False  # whether the last thing enqueued on the stream is a kernel
        self._call("cuInit", 0)
        version = self._call("cuDriverGetVersion")
        if version < _OLDEST_DRIVER:
            found, expected = (f"CUDA {number // 1000}.{number % 1000 // 10}" for number in (version, _OLDEST_DRIVER))
            raise EngineError(STAGE, "NVIDIA driver", found=found, expected=f"{expected} or newer", remedy="update the driver")
        count = self._call("cuDeviceGetCount")
        if not 0 <= number < count:
            raise EngineError(STAGE, "GPU", found=f"{count} on this host", expected=f"number {number}")
        self._device = self._call("cuDeviceGet", number)
        self.name = self._call("cuDeviceGetName", 128, self._device).split(b"\0")[0].decode()
        attribute = driver.CUdevice_attribute
        major, minor, self.shared_bytes = (
            self._call("cuDeviceGetAttribute", which, self._device)
            for which in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            )
        )
        self.arch = f"sm_{major}{minor}"
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self.enter()
        self.memory_bytes = self._call("cuMemGetInfo")[0]
        self._stream = self._call("cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self._allocated: list[Any] = []
        self._modules: list[Any] = []
        self._host: dict[int, int] = {}  # pinned memory: size by address
        self._graphs: list[Any] = []
        self._overlapping = driver.CUlaunchAttribute()
        self._overlapping.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        allowed = driver.CUlaunchAttributeValue()
        allowed.programmaticStreamSerializationAllowed = 1
        self._overlapping.value = allowed
        self._nccl: Nccl | None = None

    @property
    def stream(self) -> int:
        """The address of the stream on which everything is enqueued."""
        return int(self._stream)

    def enter(self) -> None:
        """Make this the calling thread's device."""
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, size: int, what: str) -> int:
        """Allocate zeroed memory of the device; raises an `EngineError` that names its use `what` where there is too little."""
        error, address = self._driver.cuMemAlloc(max(size, 1))
        if error != self._driver.CUresult.CUDA_SUCCESS:
            free = self._call("cuMemGetInfo")[0]
            raise EngineError(
                STAGE, f"memory of {self.name} for {what}", found=f"{free / 2**30:.2f} GiB free",
                expected=f"{size / 2**30:.2f} GiB", remedy="load with less memory for the KV cache, or use a larger GPU",
            )  # fmt: skip
        self._allocated.append(address)
        self._call("cuMemsetD8Async", address, 0, max(size, 1), self._stream)
        return int(address)

    def host_memory(self, size: int) -> Bytes:
        """Allocate zeroed pinned memory."""
        address = int(self._call("cuMemHostAlloc", max(size, 1), 0))
        self._host[address] = size
        memory: Bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        memory[:] = 0
        return memory

    def load(self, name: str, code: bytes, launch: Launch) -> Any:
        """Load a module and return the kernel's function in it."""
        error, module = self._driver.cuModuleLoadData(code)
        if error != self._driver.CUresult.CUDA_SUCCESS:
            found, remedy = self._message(error), f"update the driver, or rebuild the engine for {self.arch}"
            raise EngineError(STAGE, f"kernel {name} does not load on {self.name}", found=found, remedy=remedy)
        self._modules.append(module)
        function = self._call("cuModuleGetFunction", module, launch.symbol.encode())
        attribute = self._driver.CUfunction_attribute
        if launch.shared > _UNASKED_SHARED:
            self._call("cuFuncSetAttribute", function, attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, launch.shared)
        if launch.rows == 1 and not launch.tensor_cores:
            # A multiprocessor changes how it divides its memory only while it is idle, which would keep these kernels from
            # overlapping with products.
            self._call("cuFuncSetAttribute", function, attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 0)
        return function

    def launch(self, function: Any, launch: Launch, rows: int, pointers: Sequence[int]) -> None:
        """Enqueue a kernel. One that may overlap starts early if what comes before it on the stream is a kernel.

        Triton's kernels take two more pointers after their arguments, to scratch memory that ours do not use.
        """
        values = (*pointers, 0, 0)
        arguments = (values, (ctypes.c_void_p,) * len(values))
        config = self._driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.blocks(rows)
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.threads, 1, 1
        config.sharedMemBytes, config.hStream = launch.shared, self._stream
        if launch.overlap and self._behind_kernel:
            config.attrs, config.numAttrs = [self._overlapping], 1
        self._call(_START, config, function, arguments, 0)

    def upload(self, address: int, source: Bytes) -> None:
        """Enqueue a copy of pinned memory, or copy any other memory, such as a mapped file, through two pinned buffers, of
        which one is filled while the other is copied."""
        if self._is_pinned(source):
            self._call("cuMemcpyHtoDAsync", address, source.ctypes.data, source.nbytes, self._stream)
            return
        staging = [(self.host_memory(min(_STAGING, source.nbytes)), self._call("cuEventCreate", 0)) for _ in range(2)]
        for number, start in enumerate(range(0, source.nbytes, _STAGING)):
            buffer, copied = staging[number % 2]
            self._call("cuEventSynchronize", copied)
            part = source[start : start + _STAGING]
            buffer[: part.nbytes] = part
            self._call("cuMemcpyHtoDAsync", address + start, buffer.ctypes.data, part.nbytes, self._stream)
            self._call("cuEventRecord", copied, self._stream)
        self.synchronize()
        for buffer, copied in staging:
            self._call("cuEventDestroy", copied)
            del self._host[buffer.ctypes.data]
            self._call("cuMemFreeHost", buffer.ctypes.data)

    def download(self, target: Bytes, address: int) -> None:
        """Enqueue a copy to pinned memory."""
        self._call("cuMemcpyDtoHAsync", target.ctypes.data, address, target.nbytes, self._stream)

    def download_rows(self, target: Bytes, address: int, pitch: int) -> None:
        """Enqueue a copy of [rows, width] to pinned memory, from rows that begin every `pitch` bytes."""
        copy, kind = self._driver.CUDA_MEMCPY2D(), self._driver.CUmemorytype
        copy.srcMemoryType, copy.srcDevice, copy.srcPitch = kind.CU_MEMORYTYPE_DEVICE, address, pitch
        copy.dstMemoryType, copy.dstHost, copy.dstPitch = kind.CU_MEMORYTYPE_HOST, target.ctypes.data, target.strides[0]
        copy.Height, copy.WidthInBytes = target.shape
        self._call("cuMemcpy2DAsync", copy, self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """Enqueue a copy within the device's memory."""
        self._call("cuMemcpyDtoDAsync", target, source, size, self._stream)

    def copy_box(self, target: int, target_pitches: Pitches, source: int, source_pitches: Pitches, box: Box) -> None:
        """Enqueue a copy of planes of rows within the device's memory."""
        copy, kind = self._driver.CUDA_MEMCPY3D(), self._driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.srcMemoryType, copy.srcDevice, copy.srcHeight, copy.srcPitch = kind, source, *source_pitches
        copy.dstMemoryType, copy.dstDevice, copy.dstHeight, copy.dstPitch = kind, target, *target_pitches
        copy.Depth, copy.Height, copy.WidthInBytes = box
        self._call("cuMemcpy3DAsync", copy, self._stream)

    def record(self, run: Callable[[], None]) -> Any:
        """Make a CUDA graph of what `run` enqueues."""
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream, mode)
        try:
            run()
        except BaseException:
            self._driver.cuStreamEndCapture(self._stream)  # not by `_call`, whose error would hide the one that is raised
            raise
        graph = self._call("cuStreamEndCapture", self._stream)
        try:
            executable = self._call("cuGraphInstantiate", graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)
        self._graphs.append(executable)
        return executable

    def forget(self, recorded: Any) -> None:
        """Destroy a CUDA graph."""
        self._graphs.remove(recorded)
        self._call("cuGraphExecDestroy", recorded)

    def replay(self, recorded: Any) -> None:
        """Launch a CUDA graph."""
        self._call("cuGraphLaunch", recorded, self._stream)

    def times(self, run: Callable[[Callable[[], None]], None]) -> list[float]:
        """Call `run(mark)`; returns the seconds between calls of `mark`, by CUDA events."""
        events: list[Any] = []

        def mark() -> None:
            events.append(self._call("cuEventCreate", 0))
            self._call("cuEventRecord", events[-1], self._stream)

        run(mark)
        self.synchronize()
        seconds = [self._call("cuEventElapsedTime", before, after) / 1e3 for before, after in pairwise(events)]
        for event in events:
            self._call("cuEventDestroy", event)
        return seconds

    def join(self, collectives: Collectives) -> None:
        """Connect to the other ranks by NCCL; they find each other by an identifier that rank 0 sends to the others."""
        self._nccl = Nccl()
        message = np.zeros(ID_BYTES // 4, np.int32)
        if collectives.rank == 0:
            message[:] = np.frombuffer(self._nccl.unique_id(), np.int32)
        collectives.broadcast(message, len(message))
        self._nccl.join(message.tobytes(), collectives.ranks, collectives.rank)

    def all_reduce(self, address: int, count: int) -> None:
        """Enqueue the sum over ranks of `count` float32, in place. It can be part of a recorded step."""
        assert self._nccl is not None, "one of several ranks has joined"
        self._nccl.all_reduce(address, count, int(self._stream))
        self._behind_kernel = False

    def copy_bandwidth(self) -> float:
        """Bytes a second, read and written, of the fastest of several copies within the device's memory.

        They are larger than any cache. Several distances between source and target are tried, since they differ in speed.
        """
        memory = int(self._call("cuMemAlloc", 2 * _COPIED + max(_DISTANCES)))

        def run(mark: Callable[[], None]) -> None:
            for distance in _DISTANCES * _COPIES:
                mark()
                self._call("cuMemcpyDtoDAsync", memory + _COPIED + distance, memory, _COPIED, self._stream)
            mark()

        try:
            return 2 * _COPIED / min(self.times(run))
        finally:
            self._call("cuMemFree", memory)

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        """Free what was allocated. The context is destroyed with its last user."""
        if self._nccl:
            self._nccl.close()
        for graph in self._graphs:
            self._driver.cuGraphExecDestroy(graph)
        for module in self._modules:
            self._driver.cuModuleUnload(module)
        for address in self._allocated:
            self._driver.cuMemFree(address)
        for pinned in self._host:
            self._driver.cuMemFreeHost(pinned)
        self._driver.cuStreamDestroy(self._stream)
        self._driver.cuDevicePrimaryCtxRelease(self._device)
        for kept in (self._graphs, self._modules, self._allocated, self._host):
            kept.clear()

    def _is_pinned(self, memory: Bytes) -> bool:
        address = memory.ctypes.data
        return any(start <= address and address + memory.nbytes <= start + size for start, size in self._host.items())

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the driver; raises `EngineError` with the driver's message when it fails."""
        error, *results = getattr(self._driver, name)(*arguments)
        if error != self._driver.CUresult.CUDA_SUCCESS:
            remedy = "see nvidia-smi and the kernel's log for the GPU's state"
            raise EngineError(STAGE, name, found=self._message(error), remedy=remedy)
        self._behind_kernel = name == _START
        return results[0] if len(results) == 1 else results

    def _message(self, error: Any) -> str:
        text = self._driver.cuGetErrorString(error)[1]
        return f"{text.decode() if text else error}"
