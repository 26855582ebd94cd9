"""Builds without kernels, for tests of everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
import pytest

from belle_compile.compiler import driver
from belle_compile.compiler.backends import Lowered
from belle_compile.compiler.backends.tvm.isa import AVX2
from belle_compile.compiler.backends.tvm.kernels.tiling import built_in
from belle_compile.compiler.backends.tvm.lower import lower
from belle_compile.compiler.backends.tvm.tuning.table import Entry, Shape, TilingTable
from belle_compile.compiler.targets import Target
from tests import kernel_cache

kernel_cache.install()

TUNED = TilingTable("avx2", (Entry(Shape(96, 64), built_in(AVX2), {1: (9.0, 10.0)}),), {"processor": "x"}, "2026-01-02")


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes stand in for each kernel library: compiling them takes long and has its own tests. So does measuring:
    a build that is to tune finds `TUNED`."""

    def compile_graphs(
        models: Sequence[ir.Model],
        target: Target,
        *,
        calls_before_fusion: int,
        kv_cache: str,
        tune: Callable[[int, int], None] | None = None,
    ) -> list[Lowered]:
        if tune is not None:
            tune(1, 1)
        tilings, tuned = ("avx2: built-in", None) if tune is None else ("avx2: measured", TUNED)
        toolchain = {"C compiler": "cc 1.0", "kernel tilings": tilings}
        kernels = {f"kernels-{isa}.so": isa.encode() for isa in target.isas}
        ranks = [lower(model, calls_before_fusion, kv_cache) for model in models]
        return [Lowered(program, weights, kernels, toolchain, tuned, buffers) for program, weights, _, buffers in ranks]

    monkeypatch.setattr(driver, "compile_graphs", compile_graphs)
