"""Weights are rounded to INT8 or INT4 such that outputs on calibration requests change least."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy.typing as npt
import onnx_ir as ir
import torch
from safetensors.torch import load_file, save_file

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.build import make_initializer
from belle_compile.compiler.ir.lazy import Shared, errors_about, lazy
from belle_compile.compiler.ir.ops import is_float_linear, operand, spec_of
from belle_compile.compiler.ir.segments import cut_by_inputs
from belle_compile.compiler.ir.signature import Role
from belle_compile.compiler.ir.stream import ActivationStream, Tensor, Weights, linears
from belle_compile.compiler.ir.workers import torch_threads
from belle_compile.passes.base import Pass, PassResult, Phase, is_weight, other_readers
from belle_compile.passes.calibration.data import CalibrationData
from belle_compile.passes.calibration.work import walk
from belle_compile.passes.quantization.gptq import round_weight
from belle_compile.passes.quantization.groups import group_bits, in_groups
from belle_compile.passes.quantization.scheme import INT4, INT8, INT8_BLOCKS, WeightScheme
from belle_compile.passes.quantization.second_moments import SecondMoments, products
from belle_compile.passes.quantization.weights import BEFORE, GROUPED, INTEGERS, check_groups, product

_SUFFIX = "rounded"


@dataclass(frozen=True)
class GptqRounding(Pass):
    """y = Gemm(x, w)   becomes   y = Gemm(x, w.rounded), w.rounded = integers * scales

    The calibration sequences run through the model segment by segment, with the weights of earlier segments rounded; linears of
    one segment read the same input. Its second moments say which errors matter, and later weights of a row compensate for
    earlier ones (GPTQ). Products are of bfloat16 where the processor multiplies that faster, sums and moments are float32.
    QuantizeLinears keeps these integers; where `weights` are INT4 in groups, QuantizeGroups keeps those of all linears but the
    head. INT8 in groups is for exports, which find the integers in the meta of the weights. Linears whose names match a glob
    pattern of `keep` keep their float32 weights; the others are rounded as if these were rounded too. Results of finished
    segments are stored in the data's folder, so that the next run, with another `keep` too, continues where a killed one
    stopped. Refuses a weight with another reader (a tied head), which QuantizeLinears rounds to nearest. Needs a graph of
    float32 ops.
    """

    phase: ClassVar[Phase] = Phase.QUANTIZATION
    data: CalibrationData = field(repr=False)
    damping: float = 0.01
    keep: tuple[str, ...] = ()
    weights: WeightScheme = INT8

    def __post_init__(self) -> None:
        if self.weights not in (INT8, INT8_BLOCKS) and not self.weights.is_grouped_int4:
            expected = f"{INT8} or {INT4}"
            raise CompileError("quantize", "option weights of GPTQ", found=str(self.weights), expected=expected)

    @property
    def options(self) -> dict[str, Any]:
        settings = {"damping": self.damping, "keep": list(self.keep), "weight_bits": self.weights.bits}
        return self.data.describe() | settings | self.weights.unusual

    def run(self, model: ir.Model) -> PassResult:
        """Round the weights that have not been rounded yet; writes integers and the activations between segments to disk."""
        todo = [node for node in model.graph if is_float_linear(node) and _rounds(node)]
        reasons = {node: reason for node in todo if (reason := _refusal(node))}
        refusals = tuple(f"{node.name}: {reason}" for node, reason in reasons.items() if not self._kept(node))
        replaced = [node for node in todo if node not in reasons and not self._kept(node)]
        if not replaced:
            return PassResult(0, refusals)
        # What is kept changes no result, so that a build with another size budget continues from the results of this one.
        key = self.data.key(model, {name: value for name, value in self.options.items() if name != "keep"})
        work, segments = walk(self.data, model, self.name, key, cut_by_inputs)
        files = {node: work.file(f"{i:05d}") for i, node in enumerate(todo) if node not in reasons}
        for stream, number in segments():
            with torch_threads(1):  # what takes long is divided among the cores by workers
                self._segment(stream, number, files)
        for node in replaced:
            _replace(node, files[node], model.graph, self._group(node))
        return PassResult(len(replaced), refusals)

    def _kept(self, node: ir.Node) -> bool:
        return any(fnmatchcase(str(node.name), glob) for glob in self.keep)

    def _group(self, node: ir.Node) -> int | None:
        """The number of inputs that share a scale in the weight of a linear; None where its outputs have one scale each."""
        return self.weights.group if in_groups(node) else None

    def _segment(self, stream: ActivationStream, number: int, files: dict[ir.Node, Path]) -> None:
        """Round a segment's linears, and write the activations that the next segment reads."""
        weights = stream.load(number)
        stream.load_ahead(number + 1)
        rounded = [node for node in linears(stream.segments[number]) if node in files]
        if rounded:
            moments = _moments(stream, number, weights, rounded[0])
            self._round(rounded, moments, weights, files, stream.cores)
        if number + 1 < len(stream.segments):
            stream.forward(number, stream.coarse(number, weights))

    def _round(
        self, nodes: list[ir.Node], moments: Tensor, weights: dict[ir.Value, Tensor], files: dict[ir.Node, Path], cores: int
    ) -> None:
        """Round the weights of linears that read the same input, as one matrix, whose rows do not depend on each other."""
        read, group = [_weight(node) for node in nodes], self._group(nodes[0])
        for node, weight in zip(nodes, read, strict=True):
            assert weight.const_value is not None
            with errors_about(weight.const_value):
                _check(weights[weight], node)
                if group:
                    check_groups(weights[weight], f"the weight of {node.name}")
        rows = [len(weights[weight]) for weight in read]
        stacked = torch.cat([weights[weight] for weight in read])
        bits = group_bits(nodes[0], self.weights)
        both = round_weight(stacked, moments, self.damping, group=group, bits=bits, cores=cores)
        parts = zip(*(torch.split(each, rows) for each in both), strict=True)
        for node, weight, (integers, scales) in zip(nodes, read, parts, strict=True):
            save_file({"integers": integers.cpu().contiguous(), "scales": scales.cpu().contiguous()}, files[node])
            weights[weight] = product(integers, scales, group)


def _moments(stream: ActivationStream, number: int, weights: Weights, linear: ir.Node) -> Tensor:
    """The second moments [K, K] of the input of a linear, which all linears of the segment read."""
    moments = SecondMoments()
    for blocks in stream.observe(number, weights, linear, products):
        moments.add(blocks)
    return moments.matrix()


def _weight(node: ir.Node) -> ir.Value:
    """The weight of a linear that is rounded."""
    weight = operand(node, Role.WEIGHT)
    assert weight is not None
    return weight


def _rounds(node: ir.Node) -> bool:
    """Whether a linear's weight is an initializer that no pass has rounded yet."""
    weight = operand(node, Role.WEIGHT)
    return weight is not None and is_weight(weight) and not {INTEGERS, GROUPED} & weight.meta.keys()


def _refusal(node: ir.Node) -> str:
    weight = operand(node, Role.WEIGHT)
    assert weight is not None
    others = other_readers(weight, node)
    return f"its weight is also read by {', '.join(others)}" if others else ""


def _check(weight: Tensor, node: ir.Node) -> None:
    if not torch.isfinite(weight).all():
        raise CompileError("calibrate", f"the weight of {node.name}", found="NaN or infinity", expected="finite weights")


def _replace(node: ir.Node, file: Path, graph: ir.Graph, group: int | None) -> None:
    """Let the node read the product of a file's integers and scales; its meta holds both for the passes that quantize."""
    old, index = operand(node, Role.WEIGHT), spec_of(node).index(Role.WEIGHT)
    assert old is not None and old.shape is not None and old.const_value is not None and index is not None
    integers_and_scales = Shared(partial(_read, file))
    name, shape, sources = f"{old.name}.{_SUFFIX}", old.shape.numpy(), [old.const_value]
    tensor = lazy(
        name,
        partial(_product, file, group),
        shape,
        ir.DataType.FLOAT,
        step=_SUFFIX,
        sources=sources,
        basis_of=old.const_value,
    )
    value = make_initializer(tensor)
    value.meta[INTEGERS if group is None else GROUPED] = integers_and_scales
    value.meta[BEFORE] = old.const_value
    graph.register_initializer(value)
    node.replace_input_with(index, value)
    if not old.uses():
        del graph.initializers[str(old.name)]


def _read(file: Path) -> tuple[npt.NDArray[Any], ...]:
    tensors = load_file(file)
    return tensors["integers"].numpy(), tensors["scales"].numpy()


def _product(file: Path, group: int | None) -> npt.NDArray[Any]:
    tensors = load_file(file)
    weight: npt.NDArray[Any] = product(tensors["integers"], tensors["scales"], group).numpy()
    return weight
