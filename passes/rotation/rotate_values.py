"""R2: the values of each head are rotated; the projections before and after the attention absorb the rotation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler.ir.basis import Change
from belle_compile.compiler.ir.ops import attributes_of, operand
from belle_compile.compiler.ir.signature import Role
from belle_compile.passes.base import Pass, PassResult, Phase, other_readers
from belle_compile.passes.rotation.hadamard import Rotation
from belle_compile.passes.rotation.stream import has_float_weight, projection_of
from belle_compile.passes.rotation.weights import replace_weight

Floats = npt.NDArray[np.float32]
_DONE = "rotated_values"  # metadata of a model whose values are rotated already


@dataclass(frozen=True)
class RotateValues(Pass):
    """a = Attention(q, k, Gemm(x, V)); y = Gemm(a, O)   becomes   a' = Attention(q, k, Gemm(x, Q.T V)); y = Gemm(a', O Q)

    for each head, with one random Hadamard matrix Q of head_dim rows for all heads: attention averages values, and a rotation
    of the values rotates their averages (R2 of SpinQuant, arXiv:2405.16406). V may be the last rows of a fused projection
    (BLOOM). Refuses an attention whose values or output have another reader.
    """

    phase: ClassVar[Phase] = Phase.OUTLIERS
    seed: int = 0

    def run(self, model: ir.Model) -> PassResult:
        if _DONE in model.metadata_props:
            return PassResult()
        changes, refusals = 0, []
        for node in [node for node in model.graph if node.op_type == "Attention"]:
            reason = self._rotate(node, model.graph)
            changes += not reason
            refusals += [f"{node.name}: {reason}"] if reason else []
        if changes:
            model.metadata_props[_DONE] = str(self.seed)
        return PassResult(changes, tuple(refusals))

    def _rotate(self, attention: ir.Node, graph: ir.Graph) -> str:
        """Rotate the values of one attention; return why they cannot be rotated, an empty text where they were."""
        attributes = attributes_of(attention)
        rotation = Rotation(attributes["head_dim"], self.seed)
        values, after = operand(attention, Role.VALUE), list(attention.outputs[0].consumers())
        assert values is not None
        if others := other_readers(values, attention):
            return f"its values are also read by {', '.join(others)}"
        if len(after) != 1 or not has_float_weight(after[0]):
            return "its output is not read by one linear alone"
        linear, start, reason = projection_of(values)
        if linear is None or reason:
            return reason or "its values do not come from a linear"
        rows = slice(start, start + attributes["num_kv_heads"] * rotation.size)
        of_rows = Change("outputs", "rotate", rows.start, rows.stop, rotation.parts())
        of_columns = Change("inputs", "rotate", arrays=rotation.parts())
        for role in (Role.WEIGHT, Role.BIAS):
            replace_weight(linear, role, partial(_rotate_rows, rotation, rows), graph, changes=[of_rows])
        replace_weight(after[0], Role.WEIGHT, partial(_rotate_columns, rotation), graph, changes=[of_columns])
        return ""


def _rotate_rows(rotation: Rotation, rows: slice, weight: Floats) -> Floats:
    """Q.T times each head's rows of a weight [outputs, inputs], or its part of a bias [outputs]."""
    result: Floats = weight.copy()
    heads = weight[rows].reshape(-1, rotation.size, weight[rows].size // weight[rows].shape[0])
    result[rows] = np.concatenate([rotation.left(head) for head in heads]).reshape(weight[rows].shape)
    return result


def _rotate_columns(rotation: Rotation, weight: Floats) -> Floats:
    """Each head's columns of a weight [outputs, heads * head_dim] times Q."""
    return rotation.right(weight.reshape(-1, rotation.size)).reshape(weight.shape)
