"""R4: the result of the feed-forward activation is rotated in each step; the linear after it absorbs the rotation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import inf, lcm
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.basis import Change
from belle_compile.compiler.ir.build import make_node
from belle_compile.compiler.ir.meanings import block_hadamard, golay_signs
from belle_compile.compiler.ir.ops import attributes_of, is_float_linear, operand
from belle_compile.compiler.ir.signature import Role
from belle_compile.passes.base import Phase, Replacement, RewritePass, is_weight, other_readers
from belle_compile.passes.rotation.weights import replace_weight

Floats = npt.NDArray[np.float32]
SMALLEST = 16  # channels of the smallest block: a register of the kernels
_UNEVEN = 1.03  # the largest share of a rank, as a multiple of an even one, for which blocks stay large
_ROWS = 64  # rows of a weight rotated at a time, so that temporaries stay in the cache


@dataclass(frozen=True)
class RotateActivations(RewritePass[tuple[ir.Node, ir.Node]]):
    """a = SwiGLU(gate, up); y = Gemm(a, W, c)   becomes   a = SwiGLU(gate, up); y = Gemm(BlockHadamard(a), W Q, c)

    and Gelu likewise. Q is the orthogonal matrix of BlockHadamard. The results of this activation have the largest outliers,
    and as it is not linear, no weight before it can rotate them away (QuaRot's online transform before down_proj,
    arXiv:2404.00456). The block is the largest power of two that divides the width, up to `block`: the larger it is, the
    further it spreads an outlier, and the more the kernel has to add. Each of the `ranks` gets whole blocks, so a smaller block
    is taken where a rank's share would be more than 3% above an even one and a smaller block improves that. `group` channels
    are never divided. Refuses an activation with another reader, a computed weight, and a width that 16 does not divide.
    """

    phase: ClassVar[Phase] = Phase.OUTLIERS
    block: int = 512
    ranks: int = 1
    group: int = 1

    def __post_init__(self) -> None:
        if self.block < SMALLEST or self.block & (self.block - 1):
            expected = f"a power of two from {SMALLEST} on"
            raise CompileError("rotate", "option block", found=str(self.block), expected=expected)

    def pattern(self, node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
        x = operand(node, Role.ACTIVATION) if is_float_linear(node) else None
        activation = None if x is None else x.producer()
        return (activation, node) if activation is not None and activation.op_type in ("SwiGLU", "Gelu") else None

    def check(self, match: tuple[ir.Node, ir.Node]) -> str:
        activation, linear = match
        if others := other_readers(activation.outputs[0], linear):
            return f"the result of {activation.name} is also read by {', '.join(others)}"
        if not is_weight(operand(linear, Role.WEIGHT)):
            return "its weight is computed, so it cannot absorb a rotation"
        width = _width(activation)
        return f"no power of two from {SMALLEST} on divides its {width} inputs" if width % SMALLEST else ""

    def rewrite(self, match: tuple[ir.Node, ir.Node], graph: ir.Graph) -> Replacement:
        activation, linear = match
        width = _width(activation)
        block = self.block_of(width)
        rotate = make_node("BlockHadamard", activation.outputs, f"{activation.name}.hadamard", attributes={"block": block})
        parts = {"signs": golay_signs(block), "mixer": np.ones((1, 1), np.float32)}
        changes = [Change("inputs", "rotate", arrays=parts)]
        replace_weight(linear, Role.WEIGHT, partial(_rotate_rows, block), graph, changes=changes)
        inputs = [rotate.outputs[0], *linear.inputs[1:]]
        node = make_node(linear.op_type, inputs, str(linear.name), attributes=attributes_of(linear))
        return Replacement([linear], [rotate, node], {linear.outputs[0]: node.outputs[0]})

    def block_of(self, width: int) -> int:
        """The size of blocks for a width that 16 divides."""
        block = min(width & -width, self.block)
        blocks = [block >> shift for shift in range((block // SMALLEST).bit_length())]
        good = (block for block in blocks if self._unevenness(width, block) <= _UNEVEN)
        return next(good, min(blocks, key=lambda block: self._unevenness(width, block)))

    def _unevenness(self, width: int, block: int) -> float:
        """The largest share of a rank as a multiple of an even one; infinite where a rank would have none."""
        units = -(-width // lcm(block, self.group))
        return -(-units // self.ranks) * self.ranks / units if units >= self.ranks else inf


def _width(activation: ir.Node) -> int:
    shape = activation.outputs[0].shape
    assert shape is not None
    width = shape[1]
    assert isinstance(width, int), "only rows are symbolic"
    return width


def _rotate_rows(block: int, weight: Floats) -> Floats:
    """weight @ Q in place: rows are transformed as activations are."""
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        weight[rows] = block_hadamard(weight[rows], block=block)
    return weight
