"""Engines of traced modules, which PyTorch runs."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from belle_compile.runtime import host
from belle_compile.runtime.artifact import TargetInfo
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.base import Executor
from belle_compile.runtime.executors.factory import ExecutorFactory, LoadRequest, cannot_run, check_machine, check_memory
from belle_compile.runtime.executors.torchscript_model import MODEL_NAME, STAGE, ModelFacts, read_facts


class TorchScriptFactory(ExecutorFactory):
    """Loads `TorchScriptExecutor`s. PyTorch chooses kernels itself; an engine names the instruction set that they must have."""

    isas = tuple(host.ISA_FLAGS)

    def check_host(self, target: TargetInfo, ranks_here: int = 1) -> None:
        """Check the machine, its instruction sets and memory, and that PyTorch is installed."""
        check_machine(target)
        if not set(self.usable_isas(target)) & set(target.requires.isa):
            missing = "; ".join(f"{isa} lacks {', '.join(host.missing_flags(isa))}" for isa in target.requires.isa)
            remedy = "run it on a newer CPU, or rebuild it with --backend tvm"
            raise cannot_run(target, missing, f"one of {', '.join(target.requires.isa)}", remedy)
        check_memory(target, ranks_here)
        if installed() is None:
            raise cannot_run(target, "no PyTorch", "the package torch", "pip install 'belle-compile[torchscript]'")

    def usable_isas(self, target: TargetInfo) -> list[str]:
        """The instruction sets that processor and engine have in common."""
        return [isa for isa in host.host_isas() if isa in target.isas]

    def load(self, request: LoadRequest) -> Executor:
        """Load the module, for as many threads as there are usable cores by default."""
        facts, isas = read_facts(request.directory / MODEL_NAME), request.manifest.target.isas
        check_version(facts)
        if request.isa is not None and request.isa not in isas:
            remedy = "PyTorch chooses kernels itself: leave the option out"
            raise EngineError(STAGE, "instruction set", found=request.isa, expected=" or ".join(isas), remedy=remedy)
        from belle_compile.runtime.executors.torchscript import TorchScriptExecutor

        threads = len(host.usable_cores()) if request.threads is None else request.threads
        return TorchScriptExecutor(request.directory, facts, threads=threads, kv_memory=request.kv_memory)


def installed() -> str | None:
    """The version of PyTorch on this host; None if there is none."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def check_version(facts: ModelFacts) -> None:
    """Raise `EngineError` where PyTorch is older than the one that traced the module, whose operators it may lack."""
    found = installed() or "none"
    if _release(found) < _release(facts.torch):
        major, minor = _release(facts.torch)
        expected, remedy = f"{major}.{minor} or later", f"install torch {facts.torch}, which traced it, or rebuild the engine"
        raise EngineError(STAGE, "PyTorch is too old for this module", found=found, expected=expected, remedy=remedy)


def _release(text: str) -> tuple[int, int]:
    """Major and minor number of a version; zeros for a text that is none."""
    numbers = re.match(r"(\d+)\.(\d+)", text)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
