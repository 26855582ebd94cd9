"""Outliers of activations move into the weights that read them (Xiao et al., SmoothQuant, arXiv:2211.10438)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from belle_compile.compiler.ir.basis import Change
from belle_compile.compiler.ir.ops import attributes_of, operand
from belle_compile.compiler.ir.signature import Role
from belle_compile.compiler.ir.stream import ActivationStream, Tensor, linears, quantized, rounded_blocks
from belle_compile.passes.base import Pass, PassResult, Phase, other_readers
from belle_compile.passes.calibration.data import CalibrationData
from belle_compile.passes.calibration.work import walk
from belle_compile.passes.quantization.scheme import BLOCK, INT8, INT8_BLOCKS, WeightScheme
from belle_compile.passes.quantization.smoothing_factors import least_expected_error
from belle_compile.passes.rotation.stream import has_float_weight, projection_of
from belle_compile.passes.rotation.weights import replace_weight

Floats = npt.NDArray[np.float32]
_DONE = "smoothed"  # metadata of a model that is smoothed already
_SAMPLES = 256  # rows of a linear's input by which its alpha is chosen
_ALPHAS = tuple(round(0.3 + 0.05 * i, 2) for i in range(13))  # 0.3 to 0.9
_LEAST = 1e-5  # lower bound of maxima and factors, so that no division overflows


@dataclass(frozen=True)
class _Place:
    """An activation whose channels can be divided by factors.

    `source` computes it; the rows (of a vector: elements) of its weights with one of the `roles` are divided, from row `start`
    on. `readers` are the linears whose columns are multiplied in return. One factor serves `repeat` runs of `width` channels
    each (grouped-query heads).
    """

    value: ir.Value
    source: ir.Node
    roles: tuple[Role, ...]
    start: int
    readers: tuple[ir.Node, ...]
    width: int = 0
    repeat: int = 1


@dataclass(frozen=True)
class SmoothActivations(Pass):
    """n = RMSNorm(x, g); y = Gemm(n, W)   becomes   n' = RMSNorm(x, g / s); y = Gemm(n', W diag(s))

    s = max|n|^alpha / max|W|^(1 - alpha) for each channel, with the maxima over calibration requests, so that a part of n's
    outliers moves into W. Likewise for LayerNorm (before BLOOM's fused projection and before the linear that feeds its GELU),
    between the values and the attention's output projection, and between up and down of a SwiGLU; nothing can be moved through
    a GELU. With alpha None, each place takes the alpha from 0.3 to 0.9 with the least INT8 error of its linears' outputs: with
    scales per token and output channel, or where `weights` are INT8_BLOCKS, with scales for blocks of inputs of both.
    Refuses a place with other readers.
    """

    phase: ClassVar[Phase] = Phase.OUTLIERS
    data: CalibrationData = field(repr=False)
    alpha: float | None = None
    weights: WeightScheme = INT8

    @property
    def options(self) -> dict[str, Any]:
        alpha = {"alpha": "searched" if self.alpha is None else self.alpha}
        return self.data.describe() | alpha | (self.weights.unusual if self.weights == INT8_BLOCKS else {})

    def run(self, model: ir.Model) -> PassResult:
        places, refusals = _places(model.graph)
        if not places or _DONE in model.metadata_props:
            return PassResult(0, refusals)
        work, segments = walk(self.data, model, self.name, self.data.key(model, self.options))
        files = {place.value: work.file(f"{i:05d}") for i, place in enumerate(places)}
        for stream, number in segments():
            for place, factors in self._factors(stream, number, {place.value: place for place in places}):
                save_file({"factors": factors.cpu().contiguous()}, files[place.value])
        for place in places:
            _divide(place, load_file(files[place.value])["factors"], model.graph)
        model.metadata_props[_DONE] = str(self.options["alpha"])
        return PassResult(len(places), refusals)

    def _factors(
        self, stream: ActivationStream, number: int, places: dict[ir.Value, _Place]
    ) -> Iterator[tuple[_Place, Tensor]]:
        """The factors of a segment's places; writes the activations that the next segment reads."""
        weights = stream.load(number)
        first = {node.inputs[0]: node for node in reversed(list(linears(stream.segments[number]))) if node.inputs[0] in places}
        largest: dict[ir.Value, Tensor] = {}
        samples: dict[ir.Value, list[Tensor]] = {}

        def observe(node: ir.Node, x: Tensor) -> Tensor:
            source = node.inputs[0]
            if source is not None and first.get(source) is node:
                absmax = x.abs().amax(dim=0)
                largest[source] = torch.maximum(largest[source], absmax) if source in largest else absmax
                step = max(1, len(x) * len(stream.batches) // _SAMPLES)
                samples.setdefault(source, []).append(x[::step].clone())
            return x

        stream.forward(number, weights, on_linear=observe)
        for value, absmax in largest.items():
            place = places[value]
            read = (operand(reader, Role.WEIGHT) for reader in place.readers)
            matrices = [weights[weight] for weight in read if weight is not None]
            yield place, self._choose(place, absmax, torch.cat(samples[value]), matrices)

    def _choose(self, place: _Place, absmax: Tensor, x: Tensor, matrices: list[Tensor]) -> Tensor:
        columns = torch.stack([matrix.abs().amax(dim=0) for matrix in matrices]).amax(dim=0)
        candidates = {
            alpha: _smoothing(place, absmax, columns, alpha) for alpha in ((self.alpha,) if self.alpha is not None else _ALPHAS)
        }
        if len(candidates) == 1:
            return next(iter(candidates.values()))
        exact = [x @ matrix.T for matrix in matrices]

        def error(factors: Tensor) -> float:
            rounded = self._rounded(x / factors)
            return sum(
                float((rounded @ self._rounded(matrix * factors).T - outputs).square().sum())
                for matrix, outputs in zip(matrices, exact, strict=True)
            )

        best = min(candidates.values(), key=error)
        return min(best, self._refined(place, best, x, matrices), key=error)

    def _refined(self, place: _Place, factors: Tensor, x: Tensor, matrices: list[Tensor]) -> Tensor:
        """Factors near the given ones with the least error that rounding is expected to cause."""
        block = self.weights.group if self.weights == INT8_BLOCKS else None
        start = factors if place.repeat == 1 else factors.view(-1, place.repeat, place.width)[:, 0].reshape(-1)
        expand = (lambda shared: shared) if place.repeat == 1 else partial(_expanded, place)
        return least_expected_error(start, x, torch.cat(matrices), block, expand)

    def _rounded(self, x: Tensor) -> Tensor:
        """x [rows, width] after rounding to INT8: by rows, or by blocks where weights have some."""
        return rounded_blocks(x, BLOCK) if self.weights == INT8_BLOCKS else quantized(x, 8)


def _smoothing(place: _Place, absmax: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """float32 [K]: the factor that each channel is divided by; channels that share one take the largest of their maxima."""
    if place.repeat > 1:
        absmax, columns = (_shared(place, values) for values in (absmax, columns))
    factors = absmax.clamp(min=_LEAST) ** alpha / columns.clamp(min=_LEAST) ** (1 - alpha)
    return torch.where((absmax > 0) & (columns > 0), factors.clamp(_LEAST, 1 / _LEAST), 1.0)


def _shared(place: _Place, values: Tensor) -> Tensor:
    """[K]: for each channel the largest of the values that share its factor; K = groups * repeat * width."""
    grouped = values.view(-1, place.repeat, place.width)
    return grouped.amax(dim=1, keepdim=True).expand_as(grouped).reshape(-1)


def _expanded(place: _Place, shared: Tensor) -> Tensor:
    """[K]: the factor of each channel, where runs of channels share some."""
    return shared.view(-1, 1, place.width).expand(-1, place.repeat, -1).reshape(-1)


def _places(graph: ir.Graph) -> tuple[list[_Place], tuple[str, ...]]:
    """Every activation that only linears read and whose source can absorb factors, and why others cannot be smoothed."""
    places: list[_Place] = []
    refusals: list[str] = []
    for node in graph:
        value = node.outputs[0]
        readers = tuple(value.consumers())
        if not readers or not all(map(has_float_weight, readers)):
            continue
        place, reason = _place(node, value, readers)
        if place is not None:
            places.append(place)
        elif reason:
            refusals.append(f"{node.name}: {reason}")
    return places, tuple(refusals)


def _place(node: ir.Node, value: ir.Value, readers: tuple[ir.Node, ...]) -> tuple[_Place | None, str]:
    for reader in readers:
        weight = operand(reader, Role.WEIGHT)
        assert weight is not None
        if others := other_readers(weight, reader):
            return None, f"the weight of {reader.name} is also read by {', '.join(others)}"
    if node.op_type in ("RMSNormalization", "LayerNormalization"):
        return _Place(value, node, (Role.GAIN, Role.BIAS), 0, readers), ""
    if node.op_type == "SwiGLU":
        return _through_linear(value, node, node.inputs[1], readers)
    if node.op_type == "Attention":
        options = attributes_of(node)
        repeat = options["num_heads"] // options["num_kv_heads"]
        return _through_linear(value, node, operand(node, Role.VALUE), readers, options["head_dim"], repeat)
    return None, "nothing can be moved through a GELU" if node.op_type == "Gelu" else ""


def _through_linear(
    value: ir.Value, node: ir.Node, source: ir.Value | None, readers: tuple[ir.Node, ...], width: int = 0, repeat: int = 1
) -> tuple[_Place | None, str]:
    """A place whose factors divide the rows of the linear that computes `source`, or why there is none."""
    assert source is not None
    if others := other_readers(source, node):
        return None, f"{source.name} is also read by {', '.join(others)}"
    linear, start, reason = projection_of(source)
    if linear is None or reason:
        return None, reason or f"{source.name} does not come from a linear"
    return _Place(value, linear, (Role.WEIGHT, Role.BIAS), start, readers, width, repeat), ""


def _divide(place: _Place, factors: Floats, graph: ir.Graph) -> None:
    """Divide the source of a place by the factors, and multiply the columns of its readers."""
    of_source = factors if place.repeat == 1 else factors.reshape(-1, place.repeat, place.width)[:, 0].reshape(-1)
    rows = slice(place.start, place.start + len(of_source))
    for role in place.roles:
        divided = Change("outputs", "scale", rows.start, rows.stop, {"factors": 1 / of_source})
        replace_weight(place.source, role, partial(_divide_rows, of_source, rows), graph, "smoothed", changes=[divided])
    multiplied = Change("inputs", "scale", arrays={"factors": factors})
    for reader in place.readers:
        replace_weight(reader, Role.WEIGHT, partial(_multiply_columns, factors), graph, "smoothed", changes=[multiplied])


def _divide_rows(factors: Floats, rows: slice, weight: Floats) -> Floats:
    weight[rows] /= factors if weight.ndim == 1 else factors[:, None]
    return weight


def _multiply_columns(factors: Floats, weight: Floats) -> Floats:
    weight *= factors
    return weight
