"""The CPU backend: TIR kernels for several instruction sets in one engine, and a Program that calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from compiler.backends.tvm.lower import PackedWeight
    from runtime.program import Program

CALLS_OF_OP = {"Split": 0, "Identity": 0, "Attention": 2}  # a view; nothing; append to the cache, attend. Others: one


@dataclass(frozen=True)
class Lowered:
    """A graph as an engine holds it. `kernels` are the shared libraries by file name."""

    program: Program
    weights: Sequence[PackedWeight]
    kernels: Mapping[str, bytes]


def count_kernel_calls(model: ir.Model) -> int:
    """Kernel calls of one step of a graph, whether or not it could be lowered as it is."""
    return sum(CALLS_OF_OP.get(node.op_type, 1) for node in model.graph)


def compile_graph(
    model: ir.Model,
    isas: Sequence[str] = ("avx2", "avx512vnni", "amx"),
    *,
    calls_before_fusion: int,
    kv_cache: str = "auto",
) -> Lowered:
    """Lower a verified graph and compile its kernels for every instruction set named; `kv_cache` as in `lower`."""
    import tvm

    from compiler.backends.tvm.isa import ISAS
    from compiler.backends.tvm.library import compile_library
    from compiler.backends.tvm.lower import lower

    program, weights, kernels = lower(model, calls_before_fusion, kv_cache)
    libraries = {f"kernels-{isa}.so": compile_library(kernels, ISAS[isa]) for isa in isas}
    runtime = Path(tvm.__file__).parent / "lib" / "libtvm_runtime.so"
    return Lowered(program, weights, libraries | {runtime.name: runtime.read_bytes()})
