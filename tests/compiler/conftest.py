"""Builds without kernels, for tests of everything else."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import pytest

from belle_compile.compiler import golden
from belle_compile.compiler.backends import CompileOptions, Payload
from belle_compile.compiler.backends.tvm import TvmBackend, tuning_record
from belle_compile.compiler.backends.tvm.isa import AVX2
from belle_compile.compiler.backends.tvm.kernels.tiling import built_in
from belle_compile.compiler.backends.tvm.tuning.table import Entry, Shape, TilingTable
from belle_compile.compiler.devices import Target
from tests import kernel_cache

kernel_cache.install()

TUNED = TilingTable("avx2", (Entry(Shape(96, 64), built_in(AVX2), {1: (9.0, 10.0)}),), {"processor": "x"}, "2026-01-02")


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes stand in for each kernel library: compiling them takes long and has its own tests. So does measuring:
    a build that is to tune finds `TUNED`. Golden answers are computed by the meanings."""

    def stand_in(backend: TvmBackend, graphs: Sequence[ir.Model], target: Target, options: CompileOptions) -> list[Payload]:
        if options.tune is not None:
            options.tune(1, 1)
        tilings, tuned = ("avx2: built-in", None) if options.tune is None else ("avx2: measured", tuning_record(TUNED))
        toolchain = {"C compiler": "cc 1.0", "kernel tilings": tilings}

        def kernels(seal: bytes) -> dict[str, bytes]:
            return {f"kernels-{isa}.so": isa.encode() + seal for isa in target.isas}

        ranks = [backend.lower(graph, options.unfused_calls, options.kv_cache) for graph in graphs]
        return [backend.payload(rank, rank.program, kernels, toolchain, tuned) for rank in ranks]

    monkeypatch.setattr(TvmBackend, "compile", stand_in)
    monkeypatch.setattr(golden, "lowest_isa", lambda manifest: None)
