"""Engines that ONNX Runtime runs, on any kind of processor that it has kernels for."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from belle_compile.runtime import host
from belle_compile.runtime.artifact import TargetInfo
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.base import Executor
from belle_compile.runtime.executors.factory import ExecutorFactory, LoadRequest, cannot_run, check_machine, check_memory
from belle_compile.runtime.executors.onnxruntime_sizes import STAGE

PACKAGES = ("onnxruntime", "onnxruntime-gpu")  # distributions of the module
VNNI = "vnni"  # instruction set of engines for x86-64
_VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni"})
OLDEST = (1, 31)  # of which kernels were tested
_REMEDY = "pip install 'belle-compile[onnxruntime]'"


class OnnxRuntimeFactory(ExecutorFactory):
    """Loads `OnnxRuntimeExecutor`s."""

    def check_host(self, target: TargetInfo, ranks_here: int = 1) -> None:
        """Check the machine, its memory, and that there is an ONNX Runtime that is new enough.

        On x86-64 without VNNI, ONNX Runtime adds pairs of 8-bit products in 16 bits with saturation, which is not exact.
        """
        check_machine(target)
        if VNNI in target.requires.isa and not host.cpu_flags() & _VNNI_FLAGS:
            expected = " or ".join(sorted(_VNNI_FLAGS))
            remedy = "run it on a newer CPU or build it for the backend tvm"
            raise cannot_run(target, "a CPU without VNNI, on which ONNX Runtime's 8-bit products saturate", expected, remedy)
        check_memory(target, ranks_here)
        check_installed()

    def load(self, request: LoadRequest) -> Executor:
        """Load the model, for as many threads as there are usable cores by default. `isa` must be the engine's."""
        if request.isa is not None and request.isa not in request.manifest.target.isas:
            expected = " or ".join(request.manifest.target.isas)
            raise EngineError(STAGE, "instruction set", found=request.isa, expected=f"{expected}; ONNX Runtime chooses kernels")
        from belle_compile.runtime.executors.onnxruntime import OnnxRuntimeExecutor

        threads = len(host.usable_cores()) if request.threads is None else request.threads
        return OnnxRuntimeExecutor(request.directory, threads, request.kv_memory)


def check_installed() -> None:
    """Raise `EngineError` where ONNX Runtime is not installed or too old."""
    expected = f"onnxruntime {'.'.join(map(str, OLDEST))} or later"
    found = next(filter(None, map(_version, PACKAGES)), None)
    if found is None:
        raise EngineError(STAGE, "ONNX Runtime is not installed", expected=expected, remedy=_REMEDY)
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    if numbers < OLDEST:
        raise EngineError(STAGE, "ONNX Runtime is too old", found=found, expected=expected, remedy=_REMEDY)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
