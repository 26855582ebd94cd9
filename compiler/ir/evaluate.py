"""Runs a graph by the NumPy meanings of its ops."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir import meanings
from belle_compile.compiler.ir.cache import PagedCache
from belle_compile.compiler.ir.ops import OpSpec, attributes_of, spec_of
from belle_compile.compiler.ir.signature import TensorSpec, dtype_name

__all__ = ["PagedCache", "evaluate", "evaluate_ranks", "stepwise"]

Array = npt.NDArray[Any]
# Computes an op that is no sum over ranks from its inputs, in order, and its attributes by name, as the op's meaning does.
Apply = Callable[[OpSpec, Sequence["Array | None"], Mapping[str, Any]], Any]


def apply_meaning(spec: OpSpec, arrays: Sequence[Array | None], keywords: Mapping[str, Any]) -> Any:
    """What the meaning of an op gives."""
    return spec.meaning(*arrays, **keywords)


def evaluate(
    model: ir.Model,
    inputs: Mapping[str, Array],
    cache: PagedCache,
    *,
    also: Collection[str] = (),
    adapters: meanings.LowRankChanges | None = None,
) -> dict[str, Array]:
    """Run one step; return its outputs by name, and the values named by `also`. The cache is read and written; `adapters` are
    those of the step's sequences.

    A weight is in memory only while a node that reads it runs. Raises CompileError where an input is missing, or has another
    dtype or shape than the graph says.
    """
    steps = stepwise(model, inputs, cache, also=also, adapters=adapters)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: dict[str, Array] = end.value
            return result


def evaluate_ranks(
    models: Sequence[ir.Model],
    inputs: Mapping[str, Array],
    caches: Sequence[PagedCache],
    *,
    also: Collection[str] = (),
    apply: Apply = apply_meaning,
) -> list[dict[str, Array]]:
    """Run one step of the graphs of all ranks; return the outputs of each rank.

    Each graph runs up to its next AllReduce. Then the ranks' addends are summed, and all graphs go on. `apply`
    computes the other ops. Raises CompileError where the ranks do not reach the same sums in the same order.
    """
    runs = [_run(model, inputs, cache, also, apply) for model, cache in zip(models, caches, strict=True)]
    total: Array | None = None
    while True:
        reached = [_run_to_next_sum(run, total) for run in runs]
        outputs = [outcome for outcome in reached if isinstance(outcome, dict)]
        if len(outputs) == len(runs):
            return outputs
        nodes = {outcome.node.name for outcome in reached if isinstance(outcome, _Addend)}
        if outputs or len(nodes) > 1:
            found = ", ".join(sorted(map(str, nodes))) + (" and the end" if outputs else "")
            raise CompileError("evaluate", "sums over ranks", found=found, expected="the same ones in the same order on each")
        total = meanings.all_reduce([outcome.array for outcome in reached if isinstance(outcome, _Addend)])


def stepwise(
    model: ir.Model,
    inputs: Mapping[str, Array],
    cache: PagedCache,
    *,
    also: Collection[str] = (),
    adapters: meanings.LowRankChanges | None = None,
) -> Generator[ir.Node, None, dict[str, Array]]:
    """Run one step as `evaluate` does, yielding each node after it has run; the generator returns the outputs."""
    run = _run(model, inputs, cache, also, adapters=adapters)
    while True:
        try:
            reached = next(run)
        except StopIteration as end:
            result: dict[str, Array] = end.value
            return result
        if isinstance(reached, _Addend):
            name, remedy = str(reached.node.name), "evaluate the graphs of all ranks together"
            raise CompileError("evaluate", reached.node.op_type, node=name, found="one rank", remedy=remedy)
        yield reached


@dataclass(frozen=True)
class _Addend:
    """What a rank adds to a sum over ranks: the AllReduce `node`, and its input `array` on this rank."""

    node: ir.Node
    array: Array


_Run = Generator["ir.Node | _Addend", "Array | None", dict[str, Array]]


def _run(
    model: ir.Model,
    inputs: Mapping[str, Array],
    cache: PagedCache,
    also: Collection[str],
    apply: Apply = apply_meaning,
    adapters: meanings.LowRankChanges | None = None,
) -> _Run:
    """Run one step, yielding each node after it has run, and the addend of each sum over ranks; the sum is sent back."""
    values = _checked(model, inputs)
    requested = {*also, *(str(output.name) for output in model.graph.outputs)}
    uses = {value: len(value.uses()) for node in model.graph for value in node.outputs}
    result: dict[str, Array] = {str(value.name): array for value, array in values.items() if value.name in requested}
    for node in model.graph:
        spec = spec_of(node)
        arrays = [None if value is None else _read(value, values) for value in node.inputs]
        arrays += [None] * (len(spec.inputs) - len(arrays))
        keywords = {name: value for name, value in attributes_of(node).items() if name in spec.meaningful}
        if spec.stateful:
            keywords["cache"] = cache
        if spec.adapted:
            keywords["adapters"] = adapters
        if spec.collective:
            assert arrays[0] is not None
            produced: Any = yield _Addend(node, arrays[0])
        else:
            produced = apply(spec, arrays, keywords)
        for value, array in zip(node.outputs, produced if isinstance(produced, tuple) else (produced,), strict=True):
            values[value] = array
            if value.name in requested:
                result[value.name] = array
        for value in {value for value in node.inputs if value in uses}:
            uses[value] -= sum(read is value for read in node.inputs)
            if not uses[value]:
                del values[value]
        yield node
    missing = requested - result.keys()
    if missing:
        raise CompileError("evaluate", "values asked for", found=", ".join(sorted(missing)), expected="names of the graph")
    return result


def _run_to_next_sum(run: _Run, total: Array | None) -> _Addend | dict[str, Array]:
    """Resume a run with the last sum (None at the start); return its next addend, or its outputs where it has ended."""
    try:
        reached = run.send(total)
        while not isinstance(reached, _Addend):
            reached = next(run)
        return reached
    except StopIteration as end:
        outputs: dict[str, Array] = end.value
        return outputs


def _read(value: ir.Value, values: Mapping[ir.Value, Array]) -> Array:
    if value in values:
        return values[value]
    assert value.const_value is not None, f"{value.name} has no producer"
    return value.const_value.numpy()


def _checked(model: ir.Model, inputs: Mapping[str, Array]) -> dict[ir.Value, Array]:
    sizes: dict[str, int] = {}
    values: dict[ir.Value, Array] = {}
    for value in model.graph.inputs:
        spec = TensorSpec.of(value)
        name = str(value.name)
        if name not in inputs:
            raise CompileError("evaluate", f"input {name}", found="nothing", expected=str(spec))
        array = np.asarray(inputs[name])
        fits = str(array.dtype) == dtype_name(spec.dtype) and array.ndim == len(spec.dims)
        fits = fits and all(
            size == (sizes.setdefault(dim, size) if isinstance(dim, str) else dim)
            for dim, size in zip(spec.dims, array.shape, strict=True)
        )
        if not fits:
            known = ", ".join(f"{dim} = {size}" for dim, size in sizes.items())
            raise CompileError(
                "evaluate", f"input {name}", found=f"{array.dtype}{list(array.shape)}", expected=f"{spec} with {known}"
            )
        values[value] = array
    return values
