"""The embedding table is stored as INT8; one that is tied to the LM head is stored once for both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from belle_compile.compiler.ir.build import make_node
from belle_compile.compiler.ir.ops import operand
from belle_compile.compiler.ir.signature import Role
from belle_compile.passes.base import Phase, Replacement, RewritePass, is_weight, other_readers
from belle_compile.passes.quantization.weights import quantized_weight


@dataclass(frozen=True)
class QuantizeEmbedding(RewritePass[ir.Node]):
    """x = Gather(table, token_ids)   becomes   x = QuantizedEmbedding(token_ids, table.int8, table.scale)

    Refuses where something else reads the float32 table, which would then be stored in both forms. Run it after
    QuantizeLinears, which lets a tied LM head read the INT8 table.
    """

    phase: ClassVar[Phase] = Phase.QUANTIZATION

    def pattern(self, node: ir.Node) -> ir.Node | None:
        return node if node.op_type == "Gather" and is_weight(operand(node, Role.TABLE)) else None

    def check(self, match: ir.Node) -> str:
        table = operand(match, Role.TABLE)
        assert table is not None
        readers = other_readers(table, match)
        return f"its table {table.name} is also read as float32 by {', '.join(readers)}" if readers else ""

    def rewrite(self, match: ir.Node, graph: ir.Graph) -> Replacement:
        table, token_ids = (operand(match, role) for role in (Role.TABLE, Role.INDEX))
        assert table is not None
        node = make_node("QuantizedEmbedding", [token_ids, *quantized_weight(table, graph)], str(match.name))
        return Replacement([match], [node], {match.outputs[0]: node.outputs[0]})
