"""Fixtures of the kernel tests."""

from __future__ import annotations

import pytest

from belle_compile.compiler.backends.tvm.isa import AVX2, AVX512VNNI, Isa
from belle_compile.runtime.host import host_isas


@pytest.fixture(scope="module", params=[AVX2, AVX512VNNI], ids=lambda isa: isa.name)
def isa(request: pytest.FixtureRequest) -> Isa:
    """Each instruction set that this host can run."""
    isa: Isa = request.param
    if isa.name not in host_isas():
        pytest.skip(f"this CPU has no {isa.name}")
    return isa
