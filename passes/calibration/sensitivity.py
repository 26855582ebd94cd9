"""Which linear layers INT8 hurts: by the error of their own outputs, and by what each alone does to the predictions."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import onnx_ir as ir
import torch

from belle_compile.compiler.ir.lazy import errors_about
from belle_compile.compiler.ir.stream import ActivationStream, Tensor, Weights, linears, quantized
from belle_compile.passes.quantization.groups import in_groups
from belle_compile.passes.quantization.weights import GROUPED, INTEGERS, product, quantize_groups, quantize_rows

Progress = Callable[[int, int], None]
Load = Callable[[int], dict[ir.Value, Tensor]]

_KEPT_BYTES = 4 << 30  # float32 weights up to this size are kept from one layer's run to the next's


@dataclass(frozen=True)
class LayerDamage:
    """A linear layer: the relative squared error of its outputs, and, where that was measured, the KL divergence (nats a token)
    of the model's predictions when nothing but this layer is INT8."""

    name: str
    weights: int
    output_error: float
    kl: float | None = None


def output_errors(
    model: ir.Model, sequences: Sequence[Sequence[int]], folder: Path, *, bits: int = 8, weight_bits: int = 8
) -> list[LayerDamage]:
    """Every linear of a float32 graph, its own outputs with INT8 weights (or INT4, but for the head) and activations of `bits`
    against those without, the inputs being exact; worst first."""
    stream = ActivationStream(model, sequences, folder)
    found: list[LayerDamage] = []
    for number, segment in enumerate(stream.segments):
        weights = stream.load(number)
        rounded = {node: _rounded(node, weights, weight_bits) for node in linears(segment)}
        errors = {node: [0.0, 0.0] for node in rounded}

        stream.forward(number, weights, on_linear=_observer(weights, rounded, errors, bits))
        stream.drop(number)
        found += [LayerDamage(str(node.name), rounded[node].numel(), wrong / max(all_, 1e-30))
                  for node, (wrong, all_) in errors.items()]  # fmt: skip
    return sorted(found, key=lambda layer: (-layer.output_error, layer.name))


def _observer(
    weights: Weights, rounded: dict[ir.Node, Tensor], errors: dict[ir.Node, list[float]], bits: int
) -> Callable[[ir.Node, Tensor], Tensor]:
    """Adds to `errors` of a linear the squares of what rounding changes and of what is right."""

    def observe(node: ir.Node, x: Tensor) -> Tensor:
        weight = node.inputs[1]
        assert weight is not None
        exact = x @ weights[weight].T
        errors[node][0] += float((quantized(x, bits) @ rounded[node].T - exact).square().sum())
        errors[node][1] += float(exact.square().sum())
        return x

    return observe


def alone(
    model: ir.Model,
    sequences: Sequence[Sequence[int]],
    folder: Path,
    *,
    bits: int = 8,
    weight_bits: int = 8,
    on_progress: Progress = lambda done, total: None,
) -> list[LayerDamage]:
    """Every linear of a float32 graph with the KL divergence that its own quantization causes; worst first.

    The seams of the exact run are kept, and each layer's run starts at its own segment, so the time is about half a run for
    every layer.
    """
    own = output_errors(model, sequences, folder / "errors", bits=bits, weight_bits=weight_bits)
    errors = {layer.name: layer for layer in own}
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
    found = []
    for done, (number, node) in enumerate(todo):
        on_progress(done, len(todo))
        with _branch(stream, folder) as branch:
            kl = _divergence(branch, load, number, node, (bits, weight_bits), exact)
        layer = errors[str(node.name)]
        found.append(LayerDamage(layer.name, layer.weights, layer.output_error, kl / stream.tokens))
    on_progress(len(todo), len(todo))
    return sorted(found, key=lambda layer: (-(layer.kl or 0.0), layer.name))


def _rounded(node: ir.Node, weights: dict[ir.Value, Tensor], weight_bits: int) -> Tensor:
    """A linear's weight as its integers say it."""
    value = node.inputs[1]
    assert value is not None and value.const_value is not None
    if {INTEGERS, GROUPED} & value.meta.keys():
        return weights[value]
    quantize = quantize_groups if weight_bits == 4 and in_groups(node) else quantize_rows
    with errors_about(value.const_value):
        integers, scales = quantize(weights[value].cpu().numpy(), str(value.name))
    return product(torch.from_numpy(integers), torch.from_numpy(scales)).to(weights[value].device)


def _divergence(
    stream: ActivationStream, load: Load, start: int, node: ir.Node, bits: tuple[int, int], exact: dict[int, Tensor]
) -> float:
    total = 0.0

    def compare(number: int, logits: Tensor) -> None:
        nonlocal total
        p, q = exact[number], torch.log_softmax(logits, -1)
        total += float((p.exp() * (p - q)).sum())

    for number in range(start, len(stream.segments)):
        weights = load(number)
        if number == start:
            assert node.inputs[1] is not None
            weights = {**weights, node.inputs[1]: _rounded(node, weights, bits[1])}
        stream.forward(number, weights, on_linear=lambda one, x: quantized(x, bits[0]) if one is node else x, on_logits=compare)
    return total


@contextmanager
def _branch(stream: ActivationStream, folder: Path) -> Iterator[ActivationStream]:
    """The same stream, which reads seams that are there and writes those after them elsewhere."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        yield stream.branch(Path(name))
