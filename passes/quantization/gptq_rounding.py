"""Weights are rounded to INT8 or INT4 so that the outputs on calibration requests change least."""

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
from belle_compile.compiler.ir.stream import ActivationStream, Tensor, linears
from belle_compile.passes.base import Pass, PassResult, Phase, other_readers
from belle_compile.passes.calibration.data import CalibrationData
from belle_compile.passes.calibration.work import walk
from belle_compile.passes.quantization.gptq import round_weight
from belle_compile.passes.quantization.groups import in_groups
from belle_compile.passes.quantization.weights import GROUPED, INTEGERS, check_groups, product

_SUFFIX = "rounded"


@dataclass(frozen=True)
class GptqRounding(Pass):
    """y = Gemm(x, w)   becomes   y = Gemm(x, w.rounded), w.rounded = integers * scales

    Segment by segment, the calibration sequences run through the rounded weights before; the second moments of what a linear
    reads say which errors matter, and later weights of a row make up for earlier ones (GPTQ). QuantizeLinears keeps these
    integers. With `weight_bits` 4 those of all linears but the head are INT4 in groups of inputs, which QuantizeGroups keeps.
    `keep` are glob patterns of names of linears that stay as they are. Results of finished segments are kept in the data's
    folder: a second run goes on where a killed one stopped. Refuses a weight with another reader (a tied head), which rounds to
    nearest then. Needs a graph of float32 ops.
    """

    phase: ClassVar[Phase] = Phase.QUANTIZATION
    data: CalibrationData = field(repr=False)
    damping: float = 0.01
    keep: tuple[str, ...] = ()
    weight_bits: int = 8

    @property
    def options(self) -> dict[str, Any]:
        return self.data.describe() | {"damping": self.damping, "keep": list(self.keep), "weight_bits": self.weight_bits}

    def run(self, model: ir.Model) -> PassResult:
        """Rounds what has not been rounded; needs as much disk as the integers take and some of the activations."""
        todo = [node for node in model.graph if node.op_type == "Gemm" and _rounds(node) and not self._kept(node)]
        refusals = {node: reason for node in todo if (reason := _refusal(node))}
        told = tuple(f"{node.name}: {why}" for node, why in refusals.items())
        if len(todo) == len(refusals):
            return PassResult(0, told)
        work, segments = walk(self.data, model, self.name, self.data.key(model, self.options))
        files = {node: work.file(f"{i:05d}") for i, node in enumerate(todo) if node not in refusals}
        for stream, number in segments():
            self._segment(stream, number, files)
        for node, file in files.items():
            _replace(node, file, model.graph, GROUPED if self._grouped(node) else INTEGERS)
        return PassResult(len(files), told)

    def _kept(self, node: ir.Node) -> bool:
        return any(fnmatchcase(str(node.name), glob) for glob in self.keep)

    def _grouped(self, node: ir.Node) -> bool:
        return self.weight_bits == 4 and in_groups(node)

    def _segment(self, stream: ActivationStream, number: int, files: dict[ir.Node, Path]) -> None:
        """Round a segment's linears and write the next seam."""
        wanted = [node for node in linears(stream.segments[number]) if node in files]
        weights = stream.load(number)
        first = {node.inputs[0]: node for node in reversed(wanted)}  # linears that read the same share its moments
        moments: dict[ir.Value | None, Tensor] = {}

        def observe(node: ir.Node, x: Tensor) -> Tensor:
            source = node.inputs[0]
            if first.get(source) is node:
                known = moments.get(source)
                moments[source] = x.T @ x if known is None else known.addmm_(x.T, x)
            return x

        if wanted:
            stream.forward(number, weights, on_linear=observe, keep=False)
        for node in wanted:
            weight = node.inputs[1]
            assert weight is not None and weight.const_value is not None
            grouped = self._grouped(node)
            with errors_about(weight.const_value):
                _check(weights[weight], node)
                if grouped:
                    check_groups(weights[weight], f"the weight of {node.name}")
            integers, scales = round_weight(weights[weight], moments[node.inputs[0]], self.damping, grouped=grouped)
            save_file({"integers": integers.cpu(), "scales": scales.cpu()}, files[node])
            weights[weight] = product(integers, scales)
        if number + 1 < len(stream.segments):
            stream.forward(number, weights)


def _rounds(node: ir.Node) -> bool:
    weight = node.inputs[1]
    return weight is not None and weight.is_initializer() and not {INTEGERS, GROUPED} & weight.meta.keys()


def _refusal(node: ir.Node) -> str:
    weight = node.inputs[1]
    assert weight is not None
    others = other_readers(weight, node)
    return f"its weight is also read by {', '.join(others)}" if others else ""


def _check(weight: Tensor, node: ir.Node) -> None:
    if not torch.isfinite(weight).all():
        raise CompileError("calibrate", f"the weight of {node.name}", found="NaN or infinity", expected="finite weights")


def _replace(node: ir.Node, file: Path, graph: ir.Graph, key: str) -> None:
    """Let the node read the product of what a file holds, and keep the parts at hand for the passes that quantize."""
    old = node.inputs[1]
    assert old is not None and old.shape is not None and old.const_value is not None
    both = Shared(partial(_read, file))
    name, shape, sources = f"{old.name}.{_SUFFIX}", old.shape.numpy(), [old.const_value]
    tensor = lazy(name, partial(_product, file), shape, ir.DataType.FLOAT, step=_SUFFIX, sources=sources)
    value = make_initializer(tensor)
    value.meta[key] = both
    graph.register_initializer(value)
    node.replace_input_with(1, value)
    if not old.uses():
        del graph.initializers[str(old.name)]


def _read(file: Path) -> tuple[npt.NDArray[Any], ...]:
    tensors = load_file(file)
    return tensors["integers"].numpy(), tensors["scales"].numpy()


def _product(file: Path) -> npt.NDArray[Any]:
    tensors = load_file(file)
    weight: npt.NDArray[Any] = product(tensors["integers"], tensors["scales"]).numpy()
    return weight
