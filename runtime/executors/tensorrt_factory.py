"""Engines for NVIDIA GPUs that TensorRT for RTX or TensorRT runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from belle_compile.runtime.artifact import TargetInfo
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.base import Executor
from belle_compile.runtime.executors.factory import ExecutorFactory, LoadRequest, cannot_run, check_machine
from belle_compile.runtime.executors.tensorrt_library import ARCHS, STAGE, check_any_installed
from belle_compile.runtime.executors.tensorrt_plan import read_facts


class TensorRtFactory(ExecutorFactory):
    """Loads `TensorRtExecutor`s, which ignore the `threads` of a request."""

    isas = ARCHS

    def check_host(self, target: TargetInfo, ranks_here: int = 1, held_bytes: int = 0) -> None:
        """Check the machine, and that a library of plans is installed. Which one, its version and the GPU are checked when the
        engine is loaded."""
        check_machine(target)
        check_any_installed()

    def try_host(self, target: TargetInfo) -> str:
        """Open the first GPU; raises `EngineError` without a driver or a GPU, and for one of another compute capability."""
        self.check_host(target)
        from belle_compile.runtime.executors.cuda_device import open_device

        device = open_device()
        try:
            if device.arch not in target.isas:
                remedy = f"rebuild the engine for a GPU with {device.arch}"
                raise cannot_run(target, f"{device.name} ({device.arch})", ", ".join(target.isas), remedy)
            return device.arch
        finally:
            device.close()

    def layers(self, directory: Path) -> dict[str, dict[str, int]]:
        """The numbers of kernels of each kind, for a step of answers and for a chunk of a prompt; of a plan that TensorRT
        built, those of both."""
        return read_facts(directory).layers

    def load(self, request: LoadRequest) -> Executor:
        """Load the plan on the first GPU. `isa` must be the engine's."""
        carried: Any = request.manifest.target.isas
        if request.isa is not None and request.isa not in carried:
            raise EngineError(STAGE, "instruction set", found=request.isa, expected=" or ".join(carried))
        from belle_compile.runtime.executors.tensorrt import TensorRtExecutor

        return TensorRtExecutor(request.directory, request.kv_memory)
