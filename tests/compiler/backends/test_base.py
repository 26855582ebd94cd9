"""The registry of backends, and what backends say of themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from belle_compile.compiler import backends
from belle_compile.compiler.backends.base import KVCache, registered
from belle_compile.compiler.devices import DEVICES
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.kv_types import KV_TYPES
from belle_compile.passes.pipeline import FUSION
from belle_compile.passes.presets import METHODS, Recipe

ROOT = Path(__file__).parents[3]


def test_each_device_has_the_default_that_was_registered_first() -> None:
    assert [backend.name for backend in registered()][:2] == ["tvm", "triton"]
    assert backends.choose(DEVICES["cpu"]).name == "tvm" and backends.choose(DEVICES["h100"]).name == "triton"
    assert backends.choose(DEVICES["t4"]).name == backends.estimator(DEVICES["t4"]).name == "tensorrt", "the first of two"
    older = replace(DEVICES["t4"], isas=("sm_70",), compute_capability="7.0")
    with pytest.raises(CompileError, match=r"^backend: backend for t4: found none, expected another device; see"):
        backends.choose(older)
    assert backends.estimator(older).name == "triton", "its memory and times can be predicted all the same"


def test_a_name_belongs_to_one_backend() -> None:
    class Other(type(backends.get("tvm"))):  # type: ignore[misc]
        """A different class under the same name."""

    with pytest.raises(AssertionError, match="another backend of the name tvm"):
        backends.register(Other())
    backends.register(type(backends.get("tvm"))())  # the same one again does no harm


def test_backends_name_methods_fusions_and_types_that_exist() -> None:
    fusions, types = {step.name for step in FUSION}, KV_TYPES.keys()
    for backend in registered():
        passes = backend.passes(Recipe())
        assert (passes.methods or set()) <= set(METHODS) and (passes.fusions or set()) <= fusions
        assert set(backend.kv_types) <= types
    assert {dtype for backend in registered() for dtype in backend.kv_types} == types


def test_another_backend_takes_over_the_width_of_a_kv_cache() -> None:
    tvm, triton = backends.get("tvm"), backends.get("triton")
    assert [triton.nearest_kv_type(dtype) for dtype in tvm.kv_types] == ["float32", "float16", "float16", "int8"]


def test_blocks_of_the_kv_cache_are_whole() -> None:
    kv = KVCache("float16", 100, 16, 4096)
    assert [kv.bytes(tokens) for tokens in (0, 1, 16, 17)] == [0, 100, 100, 200]
