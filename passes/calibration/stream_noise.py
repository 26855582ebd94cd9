"""How much noise INT4 weights add to the residual stream, linear by linear: what layers of 4 bits are ranked by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from belle_compile.compiler.ir.lazy import errors_about
from belle_compile.compiler.ir.ops import operand
from belle_compile.compiler.ir.segments import Segment
from belle_compile.compiler.ir.signature import Role
from belle_compile.compiler.ir.stream import ActivationStream, Tensor, linears, run
from belle_compile.passes.quantization.groups import in_groups
from belle_compile.passes.quantization.scheme import WeightScheme
from belle_compile.passes.quantization.weights import product, quantize_groups


@dataclass(frozen=True)
class UnitNoise:
    """The noise of linears that read the same input, which are fused later: `weights` is the number of their weights.

    `noise` is the squared length of what the rounding of these weights changes in the values that their segment gives to later
    ones, relative to the squared length of these, in the mean over tokens. Where a token's stream is long, as that of a first
    token often is, it weighs no more than others.
    """

    linears: tuple[str, ...]
    weights: int
    noise: float


def stream_noise(
    model: ir.Model,
    sequences: Sequence[Sequence[int]],
    folder: Path,
    scheme: WeightScheme,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[UnitNoise]:
    """Measure the noise of each unit of a float32 graph whose linears get weights of a `scheme` with groups, the greatest noise
    for each weight first. Each segment reads exact values, and is run once more for each of its units. `on_progress` is called
    with the number of segments done and of all segments."""
    stream = ActivationStream(model, sequences, folder)
    taken: list[dict[ir.Value, Tensor]] = [{} for _ in stream.batches]
    found: list[UnitNoise] = []
    for number, segment in enumerate(stream.segments):
        on_progress(number, len(stream.segments))
        weights = stream.load(number)
        exact = _given(stream, segment, weights, taken)
        for unit in _units(segment):
            rounded = {weight: _rounded(weight, weights[weight], scheme) for weight in unit.values()}
            noise = sum(map(_noise, _given(stream, segment, {**weights, **rounded}, taken), exact)) / stream.tokens
            found.append(UnitNoise(tuple(unit), sum(each.numel() for each in rounded.values()), noise))
        taken = exact
    on_progress(len(stream.segments), len(stream.segments))
    return sorted(found, key=lambda unit: (-unit.noise / unit.weights, unit.linears))


def _given(
    stream: ActivationStream, segment: Segment, weights: Mapping[ir.Value, Tensor], taken: Sequence[Mapping[ir.Value, Tensor]]
) -> list[dict[ir.Value, Tensor]]:
    """What a segment gives for each batch of the stream, from what it takes."""
    batches = zip(stream.batches, taken, strict=True)
    return [run(segment, weights, batch.inputs(stream.device), values) for batch, values in batches]


def _units(segment: Segment) -> Iterator[dict[str, ir.Value]]:
    """The linears with INT4 weights that read the same input: their weights by their names."""
    units: dict[ir.Value | None, dict[str, ir.Value]] = {}
    for node in linears(segment):
        weight = operand(node, Role.WEIGHT)
        if in_groups(node) and weight is not None:
            units.setdefault(node.inputs[0], {})[str(node.name)] = weight
    yield from units.values()


def _rounded(value: ir.Value, weight: Tensor, scheme: WeightScheme) -> Tensor:
    """float32: the nearest weight that the scheme has."""
    assert value.const_value is not None and scheme.group is not None
    with errors_about(value.const_value):
        integers, scales = quantize_groups(weight.cpu().numpy(), str(value.name), scheme.group)
    return product(torch.from_numpy(integers), torch.from_numpy(scales), scheme.group).to(weight.device)


def _noise(noisy: Mapping[ir.Value, Tensor], exact: Mapping[ir.Value, Tensor]) -> float:
    """The sum over tokens of the squared length of the differences relative to that of the exact values."""
    total = 0.0
    for value, before in exact.items():
        difference = (noisy[value] - before).square().sum(-1)
        total += float((difference / before.square().sum(-1).clamp(min=1e-30)).sum())
    return total
