"""Backends: from the graphs of all ranks to what the engine's directories hold.

TVM makes programs for processors, Triton makes them for NVIDIA GPUs. The order is that of the defaults, see `base.register`.
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
