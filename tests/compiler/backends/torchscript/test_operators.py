"""Kernels as operators of libtorch: arguments, loops on its threads, and failures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from belle_compile.compiler.backends.torchscript.operators import Operator, namespace_of, source_of
from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import AVX2
from belle_compile.compiler.backends.tvm.library import compile_functions
from belle_compile.runtime.executors.native import KernelLibrary
from tests.compiler.backends.torchscript.harness import needs_avx2

pytestmark = needs_avx2

SIZE = 1000
OPERATORS = [
    Operator("count", ("arena", "n", "step", "out"), "atto"),
    Operator("incomplete", ("n",), "t"),  # of a kernel that takes another argument
]


def count(name: str) -> Any:
    """out[i] += step[i] for i < n, in parallel; a loop in a task runs in that task."""

    def body(n: Any, step: Any, out: Any) -> None:
        def task(i: Any) -> None:
            tir.parallel(tir.i64(1), lambda j: tir.store(out, i + j, out[i + j] + step[i], 1))

        tir.parallel(tir.rows_of(n), task)

    return tir.prim_func(name, [("n", "int32"), ("step", "int32"), ("out", "int32")], body)


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path, namespace = tmp_path_factory.mktemp("operators") / "kernels.so", namespace_of(OPERATORS)
    functions = {operator.kernel: count(operator.kernel) for operator in OPERATORS}
    path.write_bytes(compile_functions(functions, AVX2, source_of(OPERATORS, namespace)))
    KernelLibrary(path)
    return getattr(torch.ops, namespace)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("n", [0, 1, 17, SIZE])
def test_every_iteration_runs_once(operators: Any, n: int, threads: int) -> None:
    before, offset = torch.get_num_threads(), 64
    number, step, arena = torch.tensor([n], dtype=torch.int32), torch.arange(SIZE, dtype=torch.int32), torch.zeros(2 * SIZE)
    try:
        torch.set_num_threads(threads)
        for _ in range(20):
            operators.count(arena, number, step, 4 * offset)
    finally:
        torch.set_num_threads(before)
    found = arena.view(torch.int32)
    assert torch.equal(found[offset : offset + n], 20 * step[:n])
    assert not found[:offset].any() and not found[offset + n :].any()


def test_an_operator_whose_kernel_fails(operators: Any) -> None:
    with pytest.raises(RuntimeError, match=r"arguments when calling:\n.*incomplete"):
        operators.incomplete(torch.zeros(1, dtype=torch.int32))


def test_schemas_and_namespaces() -> None:
    """A schema says what is written to; what is another library has another namespace."""
    assert OPERATORS[0].schema == "count(Tensor(a!) arena, Tensor n, Tensor step, int out) -> ()"
    names = {
        namespace_of(OPERATORS),
        namespace_of(OPERATORS[:1]),
        namespace_of(OPERATORS, "avx2"),
        namespace_of(OPERATORS, "amx"),
    }
    assert len(names) == 4


def test_a_library_can_be_loaded_by_another_path(operators: Any, tmp_path: Path) -> None:
    """Its operators are registered once."""
    namespace = namespace_of(OPERATORS, "again")
    for name in ("one.so", "two.so"):
        functions = {operator.kernel: count(operator.kernel) for operator in OPERATORS}
        (tmp_path / name).write_bytes(compile_functions(functions, AVX2, source_of(OPERATORS, namespace)))
        KernelLibrary(tmp_path / name)
    assert getattr(torch.ops, namespace).count
