"""The norm of BLOOM's embeddings is applied to the table: a token's embedding is always the same, and so is its norm."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler.ir import meanings
from belle_compile.compiler.ir.build import make_initializer, make_node
from belle_compile.compiler.ir.lazy import has_rows, lazy, read_rows
from belle_compile.compiler.ir.ops import attributes_of, is_float_linear, operand
from belle_compile.compiler.ir.signature import Role
from belle_compile.passes.base import Phase, Replacement, RewritePass, is_weight, other_readers
from belle_compile.passes.rotation.weights import own

Floats = npt.NDArray[np.float32]
_ROWS = 4096  # rows normalized at a time


@dataclass(frozen=True)
class FoldEmbeddingNorm(RewritePass[tuple[ir.Node, ir.Node]]):
    """e = Gather(E, ids); n = LayerNormalization(e, g, b)   becomes   n = Gather(LayerNorm(E; g, b), ids)

    This saves a kernel, and the table then starts the residual stream, which the rotations need. A head that is tied to E keeps
    E, so that the engine holds two tables. Refuses a Gather with another reader.
    """

    phase: ClassVar[Phase] = Phase.OUTLIERS

    def pattern(self, node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
        source = node.inputs[0] if node.op_type == "LayerNormalization" else None
        gather = source.producer() if source is not None else None
        if gather is None or gather.op_type != "Gather" or not is_weight(operand(gather, Role.TABLE)):
            return None
        # A norm that feeds linears is that of the first layer and must stay a norm.
        return None if any(is_float_linear(reader) for reader in node.outputs[0].consumers()) else (gather, node)

    def check(self, match: tuple[ir.Node, ir.Node]) -> str:
        gather, norm = match
        others = other_readers(gather.outputs[0], norm)
        return f"the embedding is also read by {', '.join(others)}" if others else ""

    def rewrite(self, match: tuple[ir.Node, ir.Node], graph: ir.Graph) -> Replacement:
        gather, norm = match
        table, ids = gather.inputs
        assert table is not None and table.const_value is not None
        source, name = table.const_value, f"{table.name}.normalized"
        parts = [value.const_value for value in norm.inputs[1:] if value is not None and value.const_value is not None]
        normalize = partial(_normalize, parts, attributes_of(norm)["epsilon"])
        rows = (lambda start, stop: normalize(read_rows(source, start, stop))) if has_rows(source) else None
        shape, sources = source.shape.numpy(), [source, *parts]
        tensor = lazy(name, lambda: normalize(own(source)), shape, ir.DataType.FLOAT, rows, step="normalized", sources=sources)
        folded = make_initializer(tensor)
        graph.register_initializer(folded)
        node = make_node("Gather", [folded, ids], str(norm.name))
        return Replacement(match, [node], {norm.outputs[0]: node.outputs[0]})


def _normalize(parts: list[ir.TensorProtocol], epsilon: float, rows: Floats) -> Floats:
    """Normalize rows in place by a norm's gain and bias, which are `parts`."""
    vectors = [part.numpy() for part in parts]
    for start in range(0, len(rows), _ROWS):
        block = slice(start, start + _ROWS)
        rows[block] = meanings.layer_norm(rows[block], *vectors, epsilon=epsilon)
    return rows
