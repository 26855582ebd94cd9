"""Backends: they compile the graphs of all ranks to the content of the engine's directories.

TVM compiles programs for CPUs, Triton for NVIDIA GPUs; ONNX Runtime and PyTorch run whole graphs. The order of registration
decides which is the default, see `base.register`.
"""

from __future__ import annotations

from belle_compile.compiler.backends.base import (
    Backend,
    CompileOptions,
    Footprint,
    MemoryNeed,
    Passes,
    Payload,
    Repartitionable,
    check,
    check_kv_cache,
    choose,
    estimator,
    get,
    register,
    serving,
)
from belle_compile.compiler.backends.onnxruntime import OnnxRuntimeBackend
from belle_compile.compiler.backends.tensorrt import TensorRtBackend
from belle_compile.compiler.backends.torchscript import TorchScriptBackend
from belle_compile.compiler.backends.triton import TritonBackend
from belle_compile.compiler.backends.tvm import TvmBackend

__all__ = [
    "Backend",
    "CompileOptions",
    "Footprint",
    "MemoryNeed",
    "Passes",
    "Payload",
    "Repartitionable",
    "check",
    "check_kv_cache",
    "choose",
    "estimator",
    "get",
    "register",
    "serving",
]

register(TvmBackend())
register(TritonBackend())
register(TensorRtBackend())
register(OnnxRuntimeBackend())
register(TorchScriptBackend())
