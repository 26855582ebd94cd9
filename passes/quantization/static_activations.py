"""Activations get one scale for all tokens by calibration, for executors that cannot compute a scale per token."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir
import torch
from safetensors.torch import load_file, save_file

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.meanings import LIMITS
from belle_compile.compiler.ir.ops import is_float_linear, operand
from belle_compile.compiler.ir.signature import Role
from belle_compile.compiler.ir.stream import ActivationStream, Tensor, linears
from belle_compile.passes.base import Pass, PassResult, Phase
from belle_compile.passes.calibration.data import CalibrationData
from belle_compile.passes.calibration.work import walk
from belle_compile.passes.quantization.activations import CLIP

_PER_OCTAVE, _OCTAVES = 32, 64  # bins of a histogram of magnitudes from 2^-64 to 2^64, each 2% wide
_BINS = 2 * _OCTAVES * _PER_OCTAVE
_TRIED = 12 * _PER_OCTAVE  # bins whose upper edges are tried as clips, down to 1/4096 of the largest magnitude
_PERCENTILE = re.compile(r"p(?P<percent>\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class StaticActivations(Pass):
    """xq, xs = QuantizeTokens(x)   will be   xq, xs = QuantizeTokens(x, step) with one step for all tokens

    The calibration sequences run through the graph segment by segment. `clip` chooses the magnitude of a linear's input that
    becomes the largest integer: "max" the largest one, "p99.99" the one that 99.99% of all values stay below, "mse" the one
    with the least squared error of rounding and clipping together at `activation_bits`. This is less accurate than a scale per
    token, because one token with outliers sets the scale of all others. Results of finished segments are stored in the data's
    folder, so that the next run continues where a killed one stopped. Needs a graph of float32 ops; run it last before these
    become integers.
    """

    phase: ClassVar[Phase] = Phase.QUANTIZATION
    data: CalibrationData = field(repr=False)
    clip: str = "mse"
    activation_bits: int = 8

    def __post_init__(self) -> None:
        match = _PERCENTILE.fullmatch(self.clip)
        if self.clip not in ("max", "mse") and not (match and 0 < float(match["percent"]) <= 100):
            raise CompileError(
                "quantize", "option clip", found=repr(self.clip), expected='"max", "mse" or a percentile: "p99.99"'
            )

    @property
    def options(self) -> dict[str, Any]:
        return self.data.describe() | {"clip": self.clip, "activation_bits": self.activation_bits}

    def run(self, model: ir.Model) -> PassResult:
        """Choose the clip of each linear's input that has none yet."""
        inputs = (operand(node, Role.ACTIVATION) for node in model.graph if is_float_linear(node))
        read = dict.fromkeys(x for x in inputs if x is not None and CLIP not in x.meta)
        if not read:
            return PassResult()
        work, segments = walk(self.data, model, self.name, self.data.key(model, self.data.describe()))
        files = {x: work.file(f"{i:05d}") for i, x in enumerate(read)}
        for stream, number in segments():
            _segment(stream, number, files)
        measured = [x for x, file in files.items() if file.is_file()]
        for x in measured:
            x.meta[CLIP] = choose_clip(load_file(files[x])["counts"], self.clip, self.activation_bits)
        return PassResult(len(measured))


def _segment(stream: ActivationStream, number: int, files: dict[ir.Value, Path]) -> None:
    """Count the magnitudes that a segment's linears read, and write the activations that the next segment reads."""
    counts: dict[ir.Value, Tensor] = {}
    first = {node.inputs[0]: node for node in reversed(list(linears(stream.segments[number])))}

    def observe(node: ir.Node, x: Tensor) -> Tensor:
        source = node.inputs[0]
        if source is not None and first.get(source) is node:
            batch_counts = histogram(x, str(node.name))
            counts[source] = counts[source] + batch_counts if source in counts else batch_counts
        return x

    stream.forward(number, stream.load(number), on_linear=observe)
    for source, count in counts.items():
        save_file({"counts": count.cpu()}, files[source])


def histogram(x: Tensor, name: str) -> Tensor:
    """int64 [bins]: the number of values of x with a magnitude in each bin; zeros are in the first.

    Raises CompileError where x, the input of the linear `name`, holds NaN or infinity.
    """
    if not torch.isfinite(x).all():
        raise CompileError("calibrate", f"what {name} reads", found="NaN or infinity", expected="finite activations")
    bins = (torch.log2(x.abs().flatten()) + _OCTAVES).mul_(_PER_OCTAVE).clamp_(0, _BINS - 1)
    return torch.bincount(bins.long(), minlength=_BINS)


def choose_clip(counts: Tensor, clip: str, bits: int) -> float:
    """The magnitude that becomes the largest integer, for the histogram `counts`; it is the upper edge of a bin."""
    edges = torch.exp2(torch.arange(1, _BINS + 1, dtype=torch.float64) / _PER_OCTAVE - _OCTAVES)
    weights = counts.double()
    if clip == "mse":
        last = int(counts.nonzero().max())
        tried = edges[max(0, last - _TRIED) : last + 1]
        return float(tried[squared_errors(weights, edges, tried, LIMITS[bits]).argmin()])
    share = 1.0 if clip == "max" else float(clip[1:]) / 100
    reached = weights.cumsum(0) >= share * weights.sum()
    return float(edges[int(reached.nonzero().min())])


def squared_errors(weights: Tensor, edges: Tensor, clips: Tensor, limit: int) -> Tensor:
    """float64 [clips]: the squared error of rounding all values below a clip and of clipping those above it.

    `weights` [bins] are the numbers of values, `edges` [bins] the upper edges of the bins, `limit` the largest integer.
    """
    middles = edges * 2 ** (-0.5 / _PER_OCTAVE)
    step = (clips / limit)[:, None]
    rounding = torch.where(middles < step / 2, middles.square(), step.square() / 12)
    error = torch.where(middles > clips[:, None], (middles - clips[:, None]).square(), rounding)
    return error @ weights
