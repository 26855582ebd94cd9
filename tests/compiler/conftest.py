"""Builds without kernels, for tests of everything else."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import pytest

from compiler import driver
from compiler.backends.tvm import Lowered
from compiler.backends.tvm.isa import AVX2
from compiler.backends.tvm.kernels.tiling import built_in
from compiler.backends.tvm.lower import lower
from compiler.backends.tvm.tuning.table import Entry, Shape, TilingTable

TUNED = TilingTable("avx2", (Entry(Shape(96, 64), built_in(AVX2), {1: (9.0, 10.0)}),), {"processor": "x"}, "2026-01-02")


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes stand in for each kernel library: compiling them takes long and has its own tests. So does measuring:
    a build that is to tune finds `TUNED`."""

    def compile_graph(
        model: ir.Model,
        isas: tuple[str, ...],
        *,
        calls_before_fusion: int,
        kv_cache: str,
        tune: Callable[[int, int], None] | None = None,
    ) -> Lowered:
        program, weights, _, buffers = lower(model, calls_before_fusion, kv_cache)
        kernels = {f"kernels-{isa}.so": isa.encode() for isa in isas}
        if tune is None:
            return Lowered(program, weights, kernels, ["avx2: built-in"], "cc 1.0", buffers=buffers)
        tune(1, 1)
        return Lowered(program, weights, kernels, ["avx2: measured"], "cc 1.0", TUNED, buffers)

    monkeypatch.setattr(driver, "compile_graph", compile_graph)
