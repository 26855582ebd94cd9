"""Stand-ins for a GPU under ONNX Runtime: memory of the host, and the CPU provider, which runs the same model."""

from __future__ import annotations

import pytest

from belle_compile.runtime.executors import onnxruntime_cuda
from belle_compile.runtime.executors.onnxruntime_cuda import Placement
from tests.runtime.executors.tensorrt_host import HostDevice


def run_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let engines for GPUs be run by the CPU provider."""
    monkeypatch.setattr(onnxruntime_cuda, "open_device", HostDevice)
    monkeypatch.setattr(onnxruntime_cuda, "GPU", Placement("CPUExecutionProvider", "cpu"))
