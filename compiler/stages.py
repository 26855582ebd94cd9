"""How a build looks at its graphs: stages of the pipeline that are kept, shares of ranks, kernel calls before fusion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from belle_compile.compiler.backends import Backend
from belle_compile.passes.partition.partition_tensors import PartitionTensors
from belle_compile.passes.pipeline import at_fusion, run_for, run_pipeline

if TYPE_CHECKING:
    import onnx_ir as ir

    from belle_compile.passes.base import Pass, PassResult
    from belle_compile.passes.pipeline import OnPass
    from belle_compile.passes.presets import Recipe


def carried(passes: Sequence[Pass], backend: Backend, recipe: Recipe) -> tuple[tuple[Pass, ...], tuple[Pass, ...]]:
    """The passes that see the whole model, and those of the fusions behind them that a backend carries."""
    before, fusions = at_fusion(passes)
    passes_of_backend = backend.passes(recipe)
    return before, tuple(step for step in fusions if passes_of_backend.carries_fusion(step.name))


def divided(whole: ir.Model, fusions: Sequence[Pass], ranks: int) -> list[ir.Model]:
    """The fused graph of each rank; the whole one stays as it is. Raises CompileError where it cannot be divided so."""
    return run_for(whole.clone(), fusions, ranks)[0]


def unfused_calls(backend: Backend, whole: ir.Model, ranks: int) -> int:
    """Kernel calls of a step of one rank, without fusion."""
    part = whole.clone()
    if ranks > 1:
        run_pipeline(part, (PartitionTensors(0, ranks),))
    return backend.kernel_calls(part)


class Snapshots:
    """An observer of a pipeline beside another one: it keeps copies of the graph as some passes leave it. Copies hold no values
    of weights."""

    def __init__(self, *wanted: Pass, on_pass: OnPass | None = None) -> None:
        self._wanted, self._on_pass = wanted, on_pass
        self._graphs: dict[int, ir.Model] = {}

    def __call__(self, step: Pass | None, model: ir.Model, result: PassResult | None) -> None:
        if self._on_pass is not None:
            self._on_pass(step, model, result)
        if any(step is wanted for wanted in self._wanted):
            self._graphs[id(step)] = model.clone()

    def after(self, step: Pass) -> ir.Model:
        """A graph of one's own, as a pass left it."""
        return self._graphs[id(step)].clone()
