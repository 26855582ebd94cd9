"""From graphs to programs, weights and kernels: TVM for processors, Triton for NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING

from belle_compile.compiler.errors import CompileError

if TYPE_CHECKING:
    import onnx_ir as ir

    from belle_compile.compiler.backends.program.lowering import PackedWeight
    from belle_compile.compiler.backends.program.memory_plan import PlannedBuffer
    from belle_compile.compiler.backends.tvm.tuning.table import TilingTable
    from belle_compile.compiler.targets import Target
    from belle_compile.runtime.program import Program

BEHIND_LOGITS = frozenset({"chunk_maxima", "collect"})  # kinds of calls that a backend adds to those of the graph


@dataclass(frozen=True)
class Lowered:
    """A graph as an engine holds it. `kernels` are libraries by file name, `toolchain` says what made them, `tuned` is what was
    measured for this build. `buffers` is what the program's arena holds, in order of the calls that write it first."""

    program: Program
    weights: Sequence[PackedWeight]
    kernels: Mapping[str, bytes]
    toolchain: Mapping[str, str] = field(default_factory=dict)
    tuned: TilingTable | None = None
    buffers: Sequence[PlannedBuffer] = ()


def count_kernel_calls(model: ir.Model) -> int:
    """Kernel calls of one step of a graph, whether or not it could be lowered as it is."""
    from belle_compile.compiler.backends.program import rules

    return rules.count_kernel_calls(model.graph)


def can_lower(model: ir.Model) -> bool:
    """Whether every op of a graph has a kernel as it is."""
    from belle_compile.compiler.backends.program import rules

    return rules.has_kernels(model.graph)


def require_triton() -> None:
    """Raises CompileError where it is not installed."""
    if find_spec("triton") is None:
        remedy = "pip install 'belle-compile[gpu]' on Linux"
        raise CompileError("triton", "the Python package triton is not installed", remedy=remedy)


def plan_graph(model: ir.Model, gpu: bool, kv_cache: str = "auto") -> Lowered:
    """What `compile_graphs` makes of a rank's graph, but for its kernels, which take long: weights, program and memory plan."""
    if gpu:
        require_triton()
        from belle_compile.compiler.backends.triton.lower import lower
    else:
        from belle_compile.compiler.backends.tvm.lower import lower
    graph = lower(model, 0, kv_cache)
    return Lowered(graph.program, graph.weights, {}, buffers=graph.buffers)


def compile_graphs(
    models: Sequence[ir.Model],
    target: Target,
    *,
    calls_before_fusion: int,
    kv_cache: str = "auto",
    tune: Callable[[int, int], None] | None = None,
) -> list[Lowered]:
    """Lower the verified graph of each rank and compile its kernels for every instruction set of the target; `kv_cache` as in
    `lower_graph`. Ranks with the same kernels share their libraries.

    The kernels' tilings are those of this repository, and nothing is measured, unless `tune` is given: then a processor's are
    searched here, and `tune(done, total)` hears of each shape. On a GPU the host that serves measures when it first loads.
    """
    if not target.is_gpu:
        from belle_compile.compiler.backends.tvm import compile_graphs as for_processors

        return for_processors(models, target.isas, calls_before_fusion=calls_before_fusion, kv_cache=kv_cache, tune=tune)
    if tune is not None:
        remedy = "leave it out: the host that serves chooses among the engine's kernels when it first loads it"
        raise CompileError("target", f"tuning for {target.name}", found="a GPU", expected="a CPU", remedy=remedy)
    require_triton()
    from belle_compile.compiler.backends.triton import compile_graphs as for_gpus

    return for_gpus(models, target.isas, calls_before_fusion=calls_before_fusion, kv_cache=kv_cache)
