"""Loads engines for NVIDIA GPUs: each rank of a host runs on the GPU with the rank's number on that host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from belle_compile.runtime import host
from belle_compile.runtime.artifact import STAGE, TargetInfo
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.base import Executor
from belle_compile.runtime.executors.factory import ExecutorFactory, LoadRequest, check_machine
from belle_compile.runtime.program_json import read_program
from belle_compile.runtime.schema import to_plain


class CudaFactory(ExecutorFactory):
    """Loads `CudaExecutor`s, which ignore the `threads` of a request."""

    isas = host.GPU_ARCHS

    def check_host(self, target: TargetInfo, ranks_here: int = 1, held_bytes: int = 0) -> None:
        """Check the machine. The GPU, its architecture and its memory are checked when it is opened."""
        check_machine(target)

    def try_host(self, target: TargetInfo) -> str:
        """Open the first GPU; raises `EngineError` without a driver or a GPU, and for one of another kind or too small."""
        self.check_host(target)
        from belle_compile.runtime.executors.cuda import choose_arch
        from belle_compile.runtime.executors.gpu_host import opened_gpu

        with opened_gpu(target, "build for more ranks") as device:
            return choose_arch(target.isas, device)

    def kernels(self, directory: Path) -> dict[str, Any]:
        """Each kernel's kind and `program.Launch`, which has registers, memory and tensor-core instructions of its code."""
        program = read_program(directory)
        kinds = {name: call.kind for call in program.calls for _, name in call.kernels()}
        for name, by_bound in program.alternatives.items():
            kinds |= {other: kinds[name] for others in by_bound.values() for other in others}
        return {name: {"kind": kinds[name]} | to_plain(launch) for name, launch in program.launches.items()}

    def load(self, request: LoadRequest) -> Executor:
        """Copy the weights to the GPU with the rank's number on its host, and load the kernels."""
        carried = request.manifest.target.isas
        if request.isa is not None and request.isa not in carried:
            expected = f"{', '.join(carried)}, what the engine was built for"
            raise EngineError(STAGE, "instruction set", found=request.isa, expected=expected)
        from belle_compile.runtime.executors.cuda import CudaExecutor

        return CudaExecutor(
            request.directory, carried, kv_memory=request.kv_memory, number=request.local_rank,
            adapter_slots=request.adapter_slots,
        )  # fmt: skip
