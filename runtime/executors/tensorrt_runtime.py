"""TensorRT's runtime: a plan that is loaded on the current GPU, and runs of its profiles."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.tensorrt_library import STAGE, Package
from belle_compile.runtime.executors.tensorrt_plan import PROFILES, REBUILD


class Plan(Protocol):
    """A loaded plan. Profiles are numbered as in `tensorrt_plan.PROFILES`."""

    def bind(self, profile: int, name: str, address: int) -> None:
        """Let an input or output of a profile be at an address of the GPU's memory."""
        ...

    def run(self, profile: int) -> None:
        """Enqueue a run of a profile; raises `EngineError` where TensorRT refuses it."""
        ...

    def close(self) -> None:
        """Free the plan's memory."""
        ...


class TensorRtPlan:
    """A plan on the GPU whose context is current, run on one stream of it."""

    def __init__(self, path: Path, stream: int, package: Package, version_compatible: bool = False) -> None:
        """Load the plan with a package of TensorRT; raises `EngineError` with TensorRT's first message where it refuses it. The
        copy of the lean runtime in a plan that is `version_compatible` is code, which runs like the kernels of any engine."""
        try:
            trt = importlib.import_module(package.module)
        except ImportError as error:
            what, remedy = f"the Python package {package.name} does not load", "install it again"
            raise EngineError(STAGE, what, found=str(error), remedy=remedy) from None
        self._stream, self._logger = stream, _logger(trt)
        self._runtime = trt.Runtime(self._logger)
        if self._logger.messages:  # without a driver, TensorRT's runtime is a null pointer, whose use ends the process
            raise self._refused(f"plan {path} does not load on this host")
        if version_compatible:
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(np.memmap(path, np.uint8, "r"))
        if self._engine is None:
            raise self._refused(f"plan {path} does not load on this host")
        self._contexts = [self._context(number) for number in range(len(PROFILES))]

    def bind(self, profile: int, name: str, address: int) -> None:
        if not self._contexts[profile].set_tensor_address(name, address):
            raise self._refused(f"tensor {name}")

    def run(self, profile: int) -> None:
        if not self._contexts[profile].execute_async_v3(self._stream):
            raise self._refused("a step failed")

    def close(self) -> None:
        self._contexts.clear()
        self._engine = self._runtime = None

    def _context(self, number: int) -> Any:
        """The context of a profile, with the shapes of its inputs."""
        context = self._engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(number, self._stream):
            raise self._refused("memory for a run")
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            if -1 in tuple(self._engine.get_tensor_shape(name)) and name in self._inputs():
                _, _, largest = self._engine.get_tensor_profile_shape(name, number)
                context.set_input_shape(name, tuple(largest))
        return context

    def _inputs(self) -> set[str]:
        names = (self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors))
        return {name for name in names if self._engine.get_tensor_mode(name).name == "INPUT"}

    def _refused(self, what: str) -> EngineError:
        found = self._logger.messages[0].rstrip(".") if self._logger.messages else "no reason given"
        remedy = f"see that the GPU and its driver are those the engine needs, or {REBUILD}"
        return EngineError(STAGE, what, found=found, remedy=remedy)


def _logger(trt: Any) -> Any:
    """A logger that keeps the errors in `messages`, the first one first."""

    class CollectingLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.messages.append(" ".join(message.split()))

    return CollectingLogger()
