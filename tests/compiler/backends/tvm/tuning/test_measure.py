"""Measuring runs real kernels; how long they take is nobody's business here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.tiling import LinearTiling, Walk
from belle_compile.compiler.backends.tvm.tuning import measure
from belle_compile.compiler.backends.tvm.tuning.search import kernel_of
from belle_compile.compiler.backends.tvm.tuning.table import Shape
from tests.compiler.backends.tvm.harness import HOST_ISAS


@pytest.mark.parametrize("isa", HOST_ISAS[:1], ids=lambda isa: isa.name)
def test_variants_of_a_kernel_run_in_turns(isa: Isa, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 1e-5)
    monkeypatch.setattr(measure, "_rotated_bytes", lambda: 100_000)
    kernel = kernel_of(Shape(48, 128))
    variants = {f"v{wide}": replace(kernel, tiling=LinearTiling(((None, Walk(wide, 2)),))) for wide in (1, 2)}
    functions = measure.load_variants(variants, isa, 1)
    bench = measure.Bench(kernel, max_rows=5)
    times = bench.compare(list(functions.values()), 5)
    assert len(times) == 2 and all(0 < seconds < 10 for seconds in times)
    results = []
    for function in functions.values():
        bench._arrays["xs"][:], bench._arrays["scale"][:] = 1, 1
        bench._next = 0
        bench._sample(function, 1)
        results.append(bench._arrays["out"].reshape(-1, kernel.out.stride)[:5, :48].copy())
    assert np.abs(results[0]).max() > 0
    np.testing.assert_array_equal(*results)


def test_more_memory_rotates_than_the_caches_hold() -> None:
    assert measure.last_level_cache() >= 1 << 20
    assert measure._rotated_bytes() > 0
