"""Unquantized engines under ONNX Runtime against Transformers: the tests of test_engines.py for every variant."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.runtime import Engine
from tests.parity.engines import Builder
from tests.parity.test_engines import (  # noqa: F401 (they are the tests of this module, with its `case`)
    test_decode_step_by_step,
    test_greedy_tokens,
    test_prefill,
    test_ragged_batch,
)
from tests.parity.variants import VARIANTS

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest, builder: Builder) -> Iterator[tuple[Path, Engine]]:
    """A variant's checkpoint and its loaded engine."""
    checkpoint = builder.checkpoint(request.param)
    out = builder.root / f"onnxruntime-{request.param}"
    build(BuildRequest(checkpoint, out, quantization="none", backend="onnxruntime", drift=False))
    with Engine.load(out, threads=2, kv_tokens=512) as engine:
        yield checkpoint, engine
