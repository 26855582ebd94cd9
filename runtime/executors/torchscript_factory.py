"""Engines of traced modules, which PyTorch runs."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from belle_compile.runtime import host
from belle_compile.runtime.artifact import TargetInfo
from belle_compile.runtime.errors import EngineError, install
from belle_compile.runtime.executors.base import Executor
from belle_compile.runtime.executors.cpu_factory import CpuFactory
from belle_compile.runtime.executors.factory import LoadRequest, cannot_run
from belle_compile.runtime.executors.torchscript_model import STAGE


class TorchScriptFactory(CpuFactory):
    """Loads `TorchScriptExecutor`s."""

    def check_host(self, target: TargetInfo, ranks_here: int = 1, held_bytes: int = 0) -> None:
        """Check the machine, its instruction sets and memory, and that PyTorch is installed."""
        super().check_host(target, ranks_here, held_bytes)
        if installed() is None:
            raise cannot_run(target, "no PyTorch", "the package torch", install("torchscript"))

    def load(self, request: LoadRequest) -> Executor:
        """Load kernels and module, for as many threads as there are usable cores by default."""
        check_version(request.manifest.toolchain.get("torch", ""))
        from belle_compile.runtime.executors.torchscript import TorchScriptExecutor

        threads = len(host.usable_cores()) if request.threads is None else request.threads
        isas = request.manifest.target.isas
        return TorchScriptExecutor(request.directory, isas, threads=threads, isa=request.isa, kv_memory=request.kv_memory)


def installed() -> str | None:
    """The version of PyTorch on this host; None if there is none."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def check_version(traced: str) -> None:
    """Raise `EngineError` where PyTorch is older than the version `traced` that made the module, whose format and extensions it
    may not know."""
    found = installed() or "none"
    if _release(found) < _release(traced):
        major, minor = _release(traced)
        expected, remedy = f"{major}.{minor} or later", f"install torch {traced}, which traced it, or rebuild the engine"
        raise EngineError(STAGE, "PyTorch is too old for this module", found=found, expected=expected, remedy=remedy)


def _release(text: str) -> tuple[int, int]:
    """Major and minor number of a version; zeros for a text that is none."""
    numbers = re.match(r"(\d+)\.(\d+)", text)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
