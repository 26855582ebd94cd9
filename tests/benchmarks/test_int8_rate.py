"""The loops behind the prefill limit, for the instruction sets of this host; AMX is compiled at least."""

from __future__ import annotations

import pytest

pytest.importorskip("tvm")

from belle_compile.compiler.backends.tvm.isa import ISAS
from belle_compile.compiler.backends.tvm.library import compile_library
from belle_compile.runtime.host import host_isas
from benchmarks import int8_rate


@pytest.mark.parametrize("isa", ["avx2", "avx512vnni"])
def test_rate(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if isa not in host_isas():
        pytest.skip(f"needs {isa}")
    monkeypatch.setattr(int8_rate, "STEPS", 64)
    rate = int8_rate.Int8Rate(isa, threads=2)
    assert rate.measure(1) > 0
    if isa == "avx512vnni":  # ones times ones: a lane of each of the 24 sums gains 1 a round
        start = -rate._sums.ctypes.data % 64 // 4
        assert (rate._sums[start : start + 32] == 24 * 64).all() and not rate._sums[start + 32 :].any()


def test_amx_compiles() -> None:
    assert compile_library([int8_rate.Int8Products(2)], ISAS["amx"]).startswith(b"\x7fELF")


def test_operations() -> None:
    assert int8_rate.operations(ISAS["avx512vnni"], 2) == 2 * int8_rate.STEPS * 24 * 128
    assert int8_rate.operations(ISAS["avx2"], 1) == int8_rate.STEPS * 12 * 64
    assert int8_rate.operations(ISAS["amx"], 1) == int8_rate.STEPS * 4 * 2 * 16 * 16 * 64
