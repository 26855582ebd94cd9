"""Linear layers keep the integers that their checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.lazy import Shared, quantized_source
from belle_compile.compiler.ir.ops import is_float_linear, operand
from belle_compile.compiler.ir.quantized import Grid, QuantizedTensor
from belle_compile.compiler.ir.signature import Role
from belle_compile.passes.base import Pass, PassResult, Phase
from belle_compile.passes.quantization.groups import in_groups
from belle_compile.passes.quantization.scheme import INT8, WeightScheme
from belle_compile.passes.quantization.weights import GROUPED, INTEGERS

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class KeepIntegers(Pass):
    """y = Gemm(x, w)   stays   y = Gemm(x, w), and w.int8 or w.int4 will be the integers that the checkpoint holds for w

    The passes that quantize find the integers and their scales in the meta of the weight, as they find those of GptqRounding.
    Refuses weights that the layout of `weights` cannot hold exactly: a scale for fewer inputs than the layout has, inputs in an
    order of their own, integers that are too large once the zero point is subtracted, scales that float16 does not represent.
    Weights without integers in the checkpoint, those that an earlier pass computed, and linears whose names match a glob
    pattern of `keep`, which stay float32, are left alone.
    """

    phase: ClassVar[Phase] = Phase.QUANTIZATION
    keep: tuple[str, ...] = ()
    weights: WeightScheme = INT8
    activation_bits: int = 8

    @property
    def options(self) -> dict[str, Any]:
        return {"keep": list(self.keep), "layout": str(self.weights)}

    def run(self, model: ir.Model) -> PassResult:
        """Note the integers of each linear that can keep them."""
        refusals, kept = [], 0
        for node in model.graph:
            held = integers_of(node)
            if held is None or any(fnmatchcase(str(node.name), glob) for glob in self.keep):
                continue
            if reason := refusal(node, held, self.weights, self.activation_bits):
                refusals.append(f"{node.name}: {reason}")
                continue
            weight, group = operand(node, Role.WEIGHT), _group(node, self.weights)
            assert weight is not None
            what = f"the integers of {weight.name}"
            weight.meta[INTEGERS if group is None else GROUPED] = Shared(partial(_read, held, group, what))
            kept += 1
        return PassResult(kept, tuple(refusals))


def integers_of(node: ir.Node) -> QuantizedTensor | None:
    """The integers that the checkpoint holds for the weight of a linear; None for other nodes, and where a pass has chosen."""
    weight = operand(node, Role.WEIGHT) if is_float_linear(node) else None
    if weight is None or {INTEGERS, GROUPED} & weight.meta.keys():
        return None
    return quantized_source(weight)


def refusal(node: ir.Node, held: QuantizedTensor, weights: WeightScheme, activation_bits: int) -> str:
    """Why a linear cannot keep its integers in a scheme, as a phrase; empty if it can."""
    group, inputs = _group(node, weights), held.shape[1]
    bits = weights.bits if group is not None else INT8.bits
    if held.group is None:
        return "inputs in an order of their own (act-order), which groups of neighbours do not have"
    if held.group != inputs and (group is None or held.group % group):
        return f"a scale for every {held.group} inputs, where int{bits} has one for {_reach(group)}"
    grid = held.grid()
    if grid.offsets is not None:
        return "offsets, which the layout has no place for"
    lowest, highest = _range(held.bits, grid)
    # With activations of 16 bits, kernels without VNNI multiply bytes down to -128 by weights that must not reach it.
    least = -(1 << (bits - 1)) + (group is None and activation_bits > 8)
    if lowest < least or highest >= 1 << (bits - 1):
        zeros = grid.zero_points is not None and grid.zero_points.any()
        about = f"{held.bits} bits with zero points" if zeros else f"{held.bits} bits"
        return f"{about}, that is integers from {lowest} to {highest}, where int{bits} has {least} to {(1 << (bits - 1)) - 1}"
    if group is not None and not np.array_equal(grid.scales, _half(grid.scales)):
        return "scales that float16 does not represent"
    return ""


def _group(node: ir.Node, weights: WeightScheme) -> int | None:
    """The number of inputs that share a scale in the layout of a linear's weight; None for all inputs."""
    return weights.group if in_groups(node) else None


def _reach(group: int | None) -> str:
    return "each output" if group is None else f"{group}"


def _range(bits: int, grid: Grid) -> tuple[int, int]:
    """The range of integers less zero points."""
    low, high = (0, 0) if grid.zero_points is None else (int(grid.zero_points.min()), int(grid.zero_points.max()))
    return -(1 << (bits - 1)) - high, (1 << (bits - 1)) - 1 - low


def _half(scales: Array) -> Array:
    with np.errstate(over="ignore"):
        return scales.astype(np.float16)


def _read(held: QuantizedTensor, group: int | None, what: str) -> tuple[Array, Array]:
    """int8 integers [N, K] and their scales: float32 [N], or float16 [N, G] of groups."""
    rows = held.read()
    if not np.isfinite(rows.scales).all():
        raise CompileError("quantize", what, found="scales with NaN or infinity", expected="finite scales")
    integers, inputs = rows.integers, held.shape[1]
    if rows.zero_points is not None and rows.zero_points.any():
        assert held.group is not None
        integers = integers - np.repeat(rows.zero_points, held.group, axis=1)
    if group is None:
        return integers, rows.scales[:, 0].astype(np.float32)
    first_inputs = np.arange(0, inputs, group)  # of the layout's groups
    return integers, _half(rows.scales)[:, first_inputs // (held.group or inputs)]
