"""The linears of a quantized or float32 graph that adapters can change, each with the changes of basis that passes made."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.basis import AdaptedLinear, Change, Changes, changes_of
from belle_compile.compiler.ir.ops import operand, spec_of
from belle_compile.compiler.ir.signature import Role


def adapted_linears(graph: ir.Graph, targets: Collection[str] = ()) -> tuple[list[AdaptedLinear], tuple[str, ...]]:
    """The linears of a graph that is not fused yet whose names are or end with one of `targets` (empty: all of them), and why
    others take no adapter. The head never takes one: it computes rows of logits, not tokens.

    Raises CompileError for a target that no linear has."""
    found, refusals, named, kinds = [], [], set(), set()
    for node in graph:
        if not (spec := spec_of(node)).scales_sums and (not spec.is_linear or spec.accumulates):
            continue
        name, result = str(node.name), node.outputs[0]
        kinds.add(name.rpartition(".")[2])
        ends = {target for target in targets if name == target or name.endswith(f".{target}")}
        if (targets and not ends) or result.shape is None or result.shape[0] != "T":
            continue
        named |= ends
        accumulator = operand(node, Role.ACCUMULATOR)
        multiply = node if accumulator is None else accumulator.producer()
        assert multiply is not None, "sums have a linear that computes them"
        weight, x, scale = operand(multiply, Role.WEIGHT), operand(multiply, Role.ACTIVATION), operand(node, Role.TOKEN_SCALE)
        assert weight is not None and x is not None
        changes = _changes(weight, operand(node, Role.BIAS))
        if changes is None or weight.shape is None:
            refusals.append(f"{name}: takes no adapter, since what was done to its weight is not known")
            continue
        outputs, inputs = weight.shape.numpy()
        found.append(AdaptedLinear(name, result, (x,) if scale is None else (x, scale), (outputs, inputs), changes))
    if missing := sorted({*targets} - named):
        expected = f"linear layers such as {', '.join(sorted(kinds))}"
        raise CompileError("adapters", "lora-targets", found=missing[0], expected=expected)
    return found, tuple(refusals)


def _changes(weight: ir.Value, bias: ir.Value | None) -> Changes | None:
    """The changes of a linear's weight. What its inputs lack since a norm's bias was moved into the linear's own is recorded on
    that, with the changes of the weight before."""
    of_weight = () if weight.const_value is None else changes_of(weight.const_value)
    of_bias = () if bias is None or bias.const_value is None else changes_of(bias.const_value)
    if of_weight is None or of_bias is None:
        return None
    shifts: list[tuple[int, Change]] = [(at, change) for at, change in enumerate(of_bias) if change.kind == "shift"]
    changes = list(of_weight)
    for at, shift in reversed(shifts):
        changes.insert(at, shift)
    return tuple(changes)
