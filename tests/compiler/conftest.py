"""Builds without kernels, for tests of everything else."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from compiler import driver
from compiler.backends.tvm import Lowered
from compiler.backends.tvm.lower import lower


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes stand in for each kernel library: compiling them takes long and has its own tests."""

    def compile_graph(model: ir.Model, isas: tuple[str, ...], *, calls_before_fusion: int, kv_cache: str) -> Lowered:
        program, weights, _ = lower(model, calls_before_fusion, kv_cache)
        return Lowered(program, weights, {f"kernels-{isa}.so": isa.encode() for isa in isas} | {"libtvm_runtime.so": b"tvm"})

    monkeypatch.setattr(driver, "compile_graph", compile_graph)
