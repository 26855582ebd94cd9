"""Changes of low rank beside linears that were fused: one op for all that read the same input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import onnx_ir as ir

from belle_compile.compiler.ir.build import make_node
from belle_compile.compiler.ir.ops import attributes_of, operand, spec_of
from belle_compile.compiler.ir.signature import Role
from belle_compile.passes.adapters.add_low_rank import SUFFIX
from belle_compile.passes.base import Phase, Replacement, RewritePass, other_readers


class Match(NamedTuple):
    """A Split and the op that changes each of its parts; None for a part that no adapter changes."""

    split: ir.Node
    changes: tuple[ir.Node | None, ...]


@dataclass(frozen=True)
class FuseLowRank(RewritePass[Match]):
    """a, b = Split(y); c = LowRank(a, x, s); d = LowRank(b, x, s)   becomes   c, d = Split(LowRank(y, x, s, sizes))

    LowRank is also QuantizedLowRank. The sizes are those of the Split; a part without LowRank has an empty name among the
    targets. Needs FuseProjections first. Refuses where the ops differ in more than the linear, or where y or a part has another
    reader, since y is changed in place.
    """

    phase: ClassVar[Phase] = Phase.FUSION

    def pattern(self, node: ir.Node) -> Match | None:
        if node.op_type != "Split":
            return None
        changes = tuple(_change_of(part) for part in node.outputs)
        return Match(node, changes) if any(changes) else None

    def check(self, match: Match) -> str:
        changes = [change for change in match.changes if change is not None]
        shared = [(change.op_type, change.inputs[1:], attributes_of(change)["rank"]) for change in changes]
        if any(each != shared[0] for each in shared) or any(operand(change, Role.SIZES) for change in changes):
            return "changes of low rank of other inputs, ranks or several linears each"
        y = match.split.inputs[0]
        parts = [(part, change) for part, change in zip(match.split.outputs, match.changes, strict=True) if change]
        assert y is not None
        readers = [*other_readers(y, match.split), *(name for part, change in parts for name in other_readers(part, change))]
        return f"what they change is also read by {', '.join(readers)}" if readers else ""

    def rewrite(self, match: Match, graph: ir.Graph) -> Replacement:
        split, changes = match.split, [change for change in match.changes if change is not None]
        y, sizes = split.inputs
        targets = ",".join(attributes_of(change)["targets"] if change else "" for change in match.changes)
        attributes = attributes_of(changes[0]) | {"targets": targets}
        linear = y.producer() if y is not None else None
        assert linear is not None, "a linear computes what is split"
        name = f"{linear.name}{SUFFIX}"
        fused = make_node(changes[0].op_type, [y, *changes[0].inputs[1:], sizes], name, attributes=attributes)
        parts = make_node("Split", [fused.outputs[0], sizes], f"{name}.split", attributes={"axis": -1})
        old = [change.outputs[0] if change else part for part, change in zip(split.outputs, match.changes, strict=True)]
        return Replacement([split, *changes], [fused, parts], dict(zip(old, parts.outputs, strict=True)))


def _change_of(part: ir.Value) -> ir.Node | None:
    """The op that changes a part of a result by adapters."""
    return next((node for node in part.consumers() if spec_of(node).adapted and node.inputs[0] is part), None)
