"""How much quantization harms each linear layer: the error of its outputs, and the change of the predictions by it alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import fsum, prod
from pathlib import Path

import onnx_ir as ir
import torch

from belle_compile.compiler.ir.lazy import errors_about
from belle_compile.compiler.ir.ops import operand
from belle_compile.compiler.ir.signature import Role
from belle_compile.compiler.ir.stream import ActivationStream, OnOutput, Tensor, Weights, linears, quantized
from belle_compile.compiler.ir.torch_meanings import linear
from belle_compile.passes.quantization.groups import group_bits, in_groups
from belle_compile.passes.quantization.scheme import INT8, WeightScheme
from belle_compile.passes.quantization.weights import GROUPED, INTEGERS, product, quantize_groups, quantize_rows

Progress = Callable[[int, int], None]
Errors = dict[ir.Node, list[tuple[float, float]]]
Load = Callable[[int], dict[ir.Value, Tensor]]

_OUTPUTS = 4096  # outputs of a linear whose errors are computed at once, since a head has many
_KEPT_BYTES = 4 << 30  # float32 weights up to this size are kept from one layer's run to the next's


@dataclass(frozen=True)
class LayerDamage:
    """The harm that quantization does to a linear layer; `weights` is the number of its weights.

    `output_error` is the squared error of its outputs relative to their squares. `kl` is the KL divergence (nats per token) of
    the model's predictions when no other layer is quantized; None where that was not measured.
    """

    name: str
    weights: int
    output_error: float
    kl: float | None = None


def output_errors(
    model: ir.Model,
    sequences: Sequence[Sequence[int]],
    folder: Path,
    *,
    bits: int = 8,
    scheme: WeightScheme = INT8,
    on_progress: Progress = lambda done, total: None,
) -> list[LayerDamage]:
    """Measure the error of the outputs of every linear of a float32 graph, worst first.

    Each linear's outputs with weights of the `scheme` and activations of `bits` are compared with its float32 outputs. Every
    linear reads exact inputs. `on_progress` is called with the number of segments done and of all segments.
    """
    stream = ActivationStream(model, sequences, folder)
    layers: list[LayerDamage] = []
    for number, segment in enumerate(stream.segments):
        on_progress(number, len(stream.segments))
        weights = stream.load(number)
        rounded = {node: _rounded(node, weights, scheme) for node in linears(segment)}
        errors: Errors = {node: [] for node in rounded}
        stream.forward(number, weights, on_output=_observer(weights, rounded, errors, bits))
        stream.drop(number)
        for node, squares in errors.items():
            error, total = (fsum(each) for each in zip(*squares, strict=True))  # the same in any order
            layers.append(LayerDamage(str(node.name), rounded[node].numel(), error / max(total, 1e-30)))
    return sorted(layers, key=lambda layer: (-layer.output_error, layer.name))


def _observer(weights: Weights, rounded: dict[ir.Node, Tensor], errors: Errors, bits: int) -> OnOutput:
    """A callback that adds to a linear's `errors` the squares of what rounding changes in its outputs, and of the outputs."""
    biases = {node: None if (bias := operand(node, Role.BIAS)) is None else weights[bias] for node in rounded}

    def observe(node: ir.Node, x: Tensor, y: Tensor) -> None:
        read, bias = quantized(x, bits), biases[node]
        for outputs in (slice(start, start + _OUTPUTS) for start in range(0, y.shape[1], _OUTPUTS)):
            exact = y[:, outputs] if bias is None else y[:, outputs] - bias[outputs]
            changed = linear(read, rounded[node][outputs]).sub_(exact)
            errors[node].append((float(changed.square_().sum()), float(exact.square().sum())))

    return observe


def alone(
    model: ir.Model,
    sequences: Sequence[Sequence[int]],
    folder: Path,
    *,
    bits: int = 8,
    scheme: WeightScheme = INT8,
    on_progress: Progress = lambda done, total: None,
) -> list[LayerDamage]:
    """Measure the KL divergence that quantizing one linear of a float32 graph causes, for each linear, worst first.

    The activations between the segments of the exact run are kept, and the run of each layer starts at its own segment, so that
    it takes half the time of a whole run on average.
    """
    measured = output_errors(model, sequences, folder / "errors", bits=bits, scheme=scheme)
    errors = {layer.name: layer for layer in measured}
    stream = ActivationStream(model, sequences, folder / "exact")
    last = len(stream.segments) - 1
    exact: dict[int, Tensor] = {}
    for number in range(last + 1):
        stream.forward(
            number, stream.load(number), on_logits=lambda i, logits: exact.__setitem__(i, torch.log_softmax(logits, -1))
        )
    todo = [(number, node) for number in range(last + 1) for node in linears(stream.segments[number])]
    size = sum(prod(value.shape.numpy()) for segment in stream.segments for value in segment.weights if value.shape) * 4
    load = cache(stream.load) if size <= _KEPT_BYTES else stream.load
    layers = []
    for done, (number, node) in enumerate(todo):
        on_progress(done, len(todo))
        with _branch(stream, folder) as branch:
            kl = _divergence(branch, load, number, node, exact, bits, scheme)
        layer = errors[str(node.name)]
        layers.append(LayerDamage(layer.name, layer.weights, layer.output_error, kl / stream.tokens))
    on_progress(len(todo), len(todo))
    return sorted(layers, key=lambda layer: (-(layer.kl or 0.0), layer.name))


def _rounded(node: ir.Node, weights: dict[ir.Value, Tensor], scheme: WeightScheme) -> Tensor:
    """The float32 weight that the integers and scales of a linear stand for."""
    value = operand(node, Role.WEIGHT)
    assert value is not None and value.const_value is not None
    if {INTEGERS, GROUPED} & value.meta.keys():
        return weights[value]
    group, array, name = scheme.group if in_groups(node) else None, weights[value].cpu().numpy(), str(value.name)
    with errors_about(value.const_value):
        integers, scales = (
            quantize_rows(array, name) if group is None else quantize_groups(array, name, group, bits=group_bits(node, scheme))
        )
    return product(torch.from_numpy(integers), torch.from_numpy(scales), group).to(weights[value].device)


def _divergence(
    stream: ActivationStream,
    load: Load,
    start: int,
    node: ir.Node,
    exact: dict[int, Tensor],
    bits: int,
    scheme: WeightScheme,
) -> float:
    """The KL divergence, over all tokens, from the `exact` log-probabilities where only the linear `node` is quantized."""
    total, weight = 0.0, operand(node, Role.WEIGHT)
    assert weight is not None

    def compare(number: int, logits: Tensor) -> None:
        nonlocal total
        p, q = exact[number], torch.log_softmax(logits, -1)
        total += float((p.exp() * (p - q)).sum())

    for number in range(start, len(stream.segments)):
        weights = load(number)
        if number == start:
            weights = {**weights, weight: _rounded(node, weights, scheme)}
        stream.forward(number, weights, on_linear=lambda read, x: quantized(x, bits) if read is node else x, on_logits=compare)
    return total


@contextmanager
def _branch(stream: ActivationStream, folder: Path) -> Iterator[ActivationStream]:
    """A branch of the stream that writes its seams to a temporary folder."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        yield stream.branch(Path(name))
