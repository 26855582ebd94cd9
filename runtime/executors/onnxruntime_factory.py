"""Engines that ONNX Runtime runs: on any kind of processor that it has kernels for, and on NVIDIA GPUs."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from importlib.metadata import PackageNotFoundError, version

from belle_compile.runtime import host
from belle_compile.runtime.artifact import TargetInfo
from belle_compile.runtime.errors import EngineError, install
from belle_compile.runtime.executors.base import Executor
from belle_compile.runtime.executors.factory import ExecutorFactory, LoadRequest, cannot_run, check_machine, check_memory
from belle_compile.runtime.executors.onnxruntime_sizes import CUDA, STAGE

PACKAGES = ("onnxruntime", "onnxruntime-gpu")  # distributions of the module
VNNI = "vnni"  # instruction set of engines for x86-64
_VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni"})
OLDEST = (1, 31)  # of which kernels were tested


class _Host(ABC):
    """A kind of host: an execution provider of ONNX Runtime, and the extra of this package that brings it. The extra has the
    name of ONNX Runtime's own package."""

    extra: str

    @abstractmethod
    def check(self, target: TargetInfo, ranks_here: int, held_bytes: int) -> None:
        """Raise `EngineError` where this host cannot run the engine."""

    @abstractmethod
    def open_device(self, target: TargetInfo) -> None:
        """Open and close the device that would run the engine; raises `EngineError` where there is none."""

    @abstractmethod
    def load(self, request: LoadRequest) -> Executor:
        """Load a rank of an engine, whose host has been checked."""

    @property
    def expected(self) -> str:
        """The package that is needed."""
        return f"{self.extra} {'.'.join(map(str, OLDEST))} or later"

    @property
    def remedy(self) -> str:
        return install(self.extra)

    def check_installed(self) -> None:
        """Raise `EngineError` where ONNX Runtime is not installed or too old."""
        found = next(filter(None, map(_version, dict.fromkeys((self.extra, *PACKAGES)))), None)
        if found is None:
            raise EngineError(STAGE, "ONNX Runtime is not installed", expected=self.expected, remedy=self.remedy)
        numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
        if numbers < OLDEST:
            raise EngineError(STAGE, "ONNX Runtime is too old", found=found, expected=self.expected, remedy=self.remedy)


class _Processor(_Host):
    """The CPU provider."""

    extra = "onnxruntime"

    def check(self, target: TargetInfo, ranks_here: int, held_bytes: int) -> None:
        """On x86-64 without VNNI, ONNX Runtime adds pairs of 8-bit products in 16 bits with saturation, which is not exact."""
        check_machine(target)
        if VNNI in target.requires.isa and not host.cpu_flags() & _VNNI_FLAGS:
            expected = " or ".join(sorted(_VNNI_FLAGS))
            remedy = "run it on a newer CPU or build it for the backend tvm"
            raise cannot_run(target, "a CPU without VNNI, on which ONNX Runtime's 8-bit products saturate", expected, remedy)
        check_memory(target, ranks_here, held_bytes)
        self.check_installed()

    def open_device(self, target: TargetInfo) -> None:
        """Nothing: the checks of the host have seen the processor."""

    def load(self, request: LoadRequest) -> Executor:
        from belle_compile.runtime.executors.onnxruntime import OnnxRuntimeExecutor

        threads = len(host.usable_cores()) if request.threads is None else request.threads
        return OnnxRuntimeExecutor(request.directory, threads, request.kv_memory)


class _Gpu(_Host):
    """The CUDA provider, on the first GPU."""

    extra = "onnxruntime-gpu"

    def check(self, target: TargetInfo, ranks_here: int, held_bytes: int) -> None:
        """Check the machine, and that ONNX Runtime has the provider. The GPU and its memory are checked when it is opened."""
        check_machine(target)
        self.check_installed()
        from belle_compile.runtime.executors.onnxruntime_cuda import GPU, providers

        if GPU.provider not in (found := providers()):
            expected = f"{GPU.provider} of {self.expected}"
            remedy = f"uninstall onnxruntime and {self.remedy}"
            raise cannot_run(target, f"ONNX Runtime with {', '.join(found)}", expected, remedy)

    def open_device(self, target: TargetInfo) -> None:
        from belle_compile.runtime.executors.gpu_host import opened_gpu

        with opened_gpu(target, "use a larger one"):
            pass

    def load(self, request: LoadRequest) -> Executor:
        from belle_compile.runtime.executors.onnxruntime_cuda import OnnxRuntimeCudaExecutor

        return OnnxRuntimeCudaExecutor(request.directory, request.kv_memory)


_PROCESSOR = _Processor()
_HOSTS: dict[str, _Host] = {CUDA: _Gpu()}  # by the instruction set of an engine; all others are those of processors


class OnnxRuntimeFactory(ExecutorFactory):
    """Loads `OnnxRuntimeExecutor`s, and `OnnxRuntimeCudaExecutor`s, which ignore the `threads` of a request."""

    def check_host(self, target: TargetInfo, ranks_here: int = 1, held_bytes: int = 0) -> None:
        """Check the machine, and that there is an ONNX Runtime that is new enough and has the execution provider; for an engine
        for processors, the host's memory as well."""
        _host_of(target).check(target, ranks_here, held_bytes)

    def try_host(self, target: TargetInfo) -> str:
        """Open the device as well: for an engine for GPUs, the first GPU."""
        found = super().try_host(target)
        _host_of(target).open_device(target)
        return found

    def load(self, request: LoadRequest) -> Executor:
        """Load the model, on processors for as many threads as there are usable cores by default. `isa` must be the
        engine's."""
        target = request.manifest.target
        if request.isa is not None and request.isa not in target.isas:
            expected = f"{' or '.join(target.isas)}; ONNX Runtime chooses kernels"
            raise EngineError(STAGE, "instruction set", found=request.isa, expected=expected)
        return _host_of(target).load(request)


def _host_of(target: TargetInfo) -> _Host:
    return next((_HOSTS[isa] for isa in target.isas if isa in _HOSTS), _PROCESSOR)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
