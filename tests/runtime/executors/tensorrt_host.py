"""Stand-ins for a GPU and for a loaded plan: memory of the host, and ONNX Runtime, which runs the model of the plan."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest

from belle_compile.compiler.backends.onnx.graph import OnnxModel
from belle_compile.compiler.backends.tensorrt import build as plans
from belle_compile.runtime.executors import tensorrt
from belle_compile.runtime.executors.tensorrt_plan import PROFILES, Profile
from benchmarks.cuda_stand_in.device import HostDevice

__all__ = ["HostDevice", "OnnxPlan", "build_models", "run_models"]

Array = npt.NDArray[Any]
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int32)": np.int32, "tensor(int64)": np.int64}
PLAN = b"in place of a plan"


class OnnxPlan:
    """The profiles of a model in `folder`, over memory of the host. Shapes are those of a plan, and no others."""

    def __init__(self, folder: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self._session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        self._addresses: list[dict[str, int]] = [{} for _ in PROFILES]
        self.runs: list[int] = []

    def bind(self, profile: int, name: str, address: int) -> None:
        self._addresses[profile][name] = address

    def run(self, profile: int) -> None:
        inputs = {tensor.name: self._array(profile, tensor).copy() for tensor in self._session.get_inputs()}
        results = self._session.run(None, inputs)
        for tensor, result in zip(self._session.get_outputs(), results, strict=True):
            self._array(profile, tensor)[:] = result
        self.runs.append(profile)

    def close(self) -> None:
        del self._session

    def _array(self, number: int, tensor: Any) -> Array:
        """The memory that an input or output is bound to."""
        profile: Profile = PROFILES[number]
        sizes = {"B": profile.sequences, "S": profile.tokens, "R": profile.rows}
        shape = [sizes.get(dim, dim) for dim in tensor.shape]
        dtype = np.dtype(_DTYPES[tensor.type])
        size = int(np.prod(shape)) * dtype.itemsize
        buffer = (ctypes.c_uint8 * size).from_address(self._addresses[number][tensor.name])
        return np.frombuffer(buffer, dtype).reshape(shape)


def build_models(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let builds write the ONNX model to a folder in place of building a plan of it."""

    def build_plan(model: OnnxModel, arch: str, profiles: Any, builder: Any) -> plans.BuiltPlan:
        folder.mkdir(exist_ok=True)
        plans.write_model(model, folder)
        return plans.BuiltPlan(memoryview(PLAN), "")

    monkeypatch.setattr(plans, "build_plan", build_plan)


def run_models(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Callable[[], OnnxPlan]:
    """Let engines be run on a `HostDevice`, by an `OnnxPlan` of the model in a folder; returns a function for the last one."""
    loaded: list[OnnxPlan] = []

    def load(path: Path, stream: int, package: Any, version_compatible: bool) -> OnnxPlan:
        assert path.read_bytes() == PLAN
        loaded.append(OnnxPlan(folder))
        return loaded[-1]

    monkeypatch.setattr(tensorrt, "open_device", HostDevice)
    monkeypatch.setattr(tensorrt, "TensorRtPlan", load)
    return lambda: loaded[-1]
