"""The registry of executors: which one runs the engines of which backend.

A further backend calls `register_executor` with a factory of its own; no other file of the runtime names it.
"""

from __future__ import annotations

from belle_compile.runtime.artifact import STAGE, Manifest
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.base import AdaptableExecutor, Executor, ProfilableExecutor, RankExecutor
from belle_compile.runtime.executors.batch import StepBatch
from belle_compile.runtime.executors.cpu_factory import CpuFactory
from belle_compile.runtime.executors.cuda_factory import CudaFactory
from belle_compile.runtime.executors.factory import ExecutorFactory, LoadRequest
from belle_compile.runtime.executors.onnxruntime_factory import OnnxRuntimeFactory
from belle_compile.runtime.executors.tensorrt_factory import TensorRtFactory
from belle_compile.runtime.executors.torchscript_factory import TorchScriptFactory
from belle_compile.runtime.schema import refuse_from

__all__ = [
    "EXECUTORS",
    "AdaptableExecutor",
    "Executor",
    "ExecutorFactory",
    "LoadRequest",
    "ProfilableExecutor",
    "RankExecutor",
    "StepBatch",
    "executor_of",
    "register_executor",
]

# The factories, by `target.backend` of the manifest.
EXECUTORS: dict[str, ExecutorFactory] = {
    "tvm": CpuFactory(),
    "triton": CudaFactory(),
    "onnxruntime": OnnxRuntimeFactory(),
    "torchscript": TorchScriptFactory(),
    "tensorrt": TensorRtFactory(),
}


def register_executor(backend: str, factory: ExecutorFactory) -> None:
    """Let `factory` run the engines whose manifest names `backend`; raises ValueError where another factory does."""
    if EXECUTORS.setdefault(backend, factory) is not factory:
        raise ValueError(f"backend {backend} has an executor already")


def executor_of(manifest: Manifest) -> ExecutorFactory:
    """The factory that runs an engine; raises `EngineError` where its backend or an instruction set of it is unknown."""
    target = manifest.target
    factory = EXECUTORS.get(target.backend)
    if factory is None:
        remedy = "install the runtime that belongs to the engine, or rebuild it for one of these"
        expected = f"one of {', '.join(EXECUTORS)}"
        raise EngineError(STAGE, "this runtime does not know the engine's backend", found=target.backend, expected=expected,
                          remedy=remedy)  # fmt: skip
    refuse = refuse_from(STAGE, "rebuild the engine with belle-compile build")
    for field, isas in (("target.isas", target.isas), ("target.requires.isa", target.requires.isa)):
        for isa in isas:
            if factory.isas is not None and isa not in factory.isas:
                raise refuse(field, isa, f"among {', '.join(factory.isas)}")
    return factory
