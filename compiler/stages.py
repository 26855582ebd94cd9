"""Views of a build's graphs: copies after chosen passes, the shares of ranks, kernel calls before fusion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from belle_compile.compiler.backends import Backend
from belle_compile.passes.base import Phase
from belle_compile.passes.partition.partition_tensors import PartitionTensors
from belle_compile.passes.pipeline import at_fusion, run_for, run_pipeline

if TYPE_CHECKING:
    import onnx_ir as ir

    from belle_compile.passes.base import Pass, PassResult
    from belle_compile.passes.pipeline import OnPass
    from belle_compile.passes.presets import Recipe


def carried(
    passes: Sequence[Pass], backend: Backend, recipe: Recipe, *, fuse: bool = True
) -> tuple[tuple[Pass, ...], tuple[Pass, ...]]:
    """Split `passes` into those on the whole model and those after them on each rank's graph: of those that fuse, only the ones
    that the backend carries, or without `fuse` only those that it needs."""
    before, after = at_fusion(passes)
    passes_of_backend = backend.passes(recipe)
    carried_steps = [step for step in after if passes_of_backend.carries_fusion(step.name)]
    needed = passes_of_backend.needed
    return before, tuple(step for step in carried_steps if fuse or step.phase is not Phase.FUSION or step.name in needed)


def divided(whole: ir.Model, fusions: Sequence[Pass], ranks: int) -> list[ir.Model]:
    """The fused graph of each rank; `whole` is not changed. Raises CompileError if it cannot be divided among `ranks` ranks."""
    return run_for(whole.clone(), fusions, ranks)[0]


def unfused_calls(backend: Backend, whole: ir.Model, ranks: int) -> int:
    """The number of kernel calls in a step of one rank, without fusion."""
    part = whole.clone()
    if ranks > 1:
        run_pipeline(part, (PartitionTensors(0, ranks),))
    return backend.kernel_calls(part)


class Snapshots:
    """Observer of a pipeline that keeps a copy of the graph after each of the given passes; the copies hold no values of
    weights. It calls `on_pass` after every pass."""

    def __init__(self, *passes: Pass, on_pass: OnPass | None = None) -> None:
        self._passes, self._on_pass = passes, on_pass
        self._graphs: dict[int, ir.Model] = {}

    def __call__(self, step: Pass | None, model: ir.Model, result: PassResult | None) -> None:
        if self._on_pass is not None:
            self._on_pass(step, model, result)
        if any(step is kept for kept in self._passes):
            self._graphs[id(step)] = model.clone()

    def after(self, step: Pass) -> ir.Model:
        """A new copy of the graph after `step`, one of the passes given."""
        return self._graphs[id(step)].clone()
