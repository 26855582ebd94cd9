"""Layers ranked by what INT8 does to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from belle_compile.passes.calibration.sensitivity import alone, output_errors
from belle_compile.passes.quantization.scheme import INT4
from tests.passes.helpers import VOCABULARY, llama

SEQUENCES = [np.random.default_rng(n).integers(0, VOCABULARY, 20).tolist() for n in range(4)]


def with_outliers(name: str) -> ir.Model:
    """A model where one linear has a column a hundred times as large as the others, so that its rows round badly."""
    model = llama(last_norm=True)
    weight = next(node for node in model.graph if node.name == name).inputs[1]
    assert weight is not None and weight.const_value is not None
    weight.const_value.numpy()[:, 3] *= 100
    return model


def test_the_layer_with_outliers_is_first(tmp_path: Path) -> None:
    layers = output_errors(with_outliers("layers.1.mlp.up"), SEQUENCES, tmp_path)
    assert layers[0].name == "layers.1.mlp.up" and len(layers) == 15 and layers[0].kl is None
    assert layers[0].output_error > 0 and layers[0].weights == 48 * 32
    assert [layer.output_error for layer in layers] == sorted((layer.output_error for layer in layers), reverse=True)


def test_wider_activations_do_less(tmp_path: Path) -> None:
    narrow = {layer.name: layer.output_error for layer in output_errors(llama(), SEQUENCES, tmp_path, bits=8)}
    wide = {layer.name: layer.output_error for layer in output_errors(llama(), SEQUENCES, tmp_path, bits=16)}
    assert all(wide[name] < narrow[name] for name in narrow)


def test_int4_weights_do_more_in_every_layer_but_the_head(tmp_path: Path) -> None:
    int8 = {layer.name: layer.output_error for layer in output_errors(llama(), SEQUENCES, tmp_path)}
    int4 = {layer.name: layer.output_error for layer in output_errors(llama(), SEQUENCES, tmp_path, scheme=INT4)}
    assert int4.pop("lm_head") == int8.pop("lm_head")
    assert all(int4[name] > 10 * int8[name] for name in int8)


def test_damage_alone(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    layers = alone(llama(last_norm=True), SEQUENCES, tmp_path, on_progress=lambda done, total: heard.append((done, total)))
    assert len(layers) == 15 and heard[0] == (0, 15) and heard[-1] == (15, 15)
    damages = [layer.kl for layer in layers]
    assert all(kl is not None and 0 < kl < 0.1 for kl in damages)
    assert damages == sorted(damages, reverse=True)  # type: ignore[type-var]


def test_the_head_alone_is_what_quantizing_only_the_head_does(tmp_path: Path) -> None:
    """Against the whole graph run with that one layer changed by hand."""
    import torch

    from belle_compile.compiler.ir.stream import ActivationStream, quantized
    from belle_compile.passes.quantization.weights import quantize_rows

    model = llama(last_norm=True)
    found = {layer.name: layer.kl for layer in alone(model, SEQUENCES, tmp_path / "a")}
    stream = ActivationStream(model, SEQUENCES, tmp_path / "b")
    kl = 0.0
    for number in range(len(stream.segments)):
        weights = stream.load(number)
        if number + 1 < len(stream.segments):
            stream.forward(number, weights)
            continue
        exact: dict[int, torch.Tensor] = {}
        rounded: dict[int, torch.Tensor] = {}
        stream.forward(number, weights, on_logits=exact.__setitem__)
        (head,) = (node for node in stream.segments[number].nodes if node.op_type == "Gemm")
        integers, scales = quantize_rows(weights[head.inputs[1]].numpy(), "head")  # type: ignore[index]
        changed = {**weights, head.inputs[1]: torch.from_numpy(integers * scales[:, None])}
        stream.forward(number, changed, on_linear=lambda node, x: quantized(x, 8), on_logits=rounded.__setitem__)  # type: ignore[arg-type]
        for i in exact:
            p, q = (torch.log_softmax(logits[i], -1) for logits in (exact, rounded))
            kl += float((p.exp() * (p - q)).sum()) / stream.tokens
    assert found["lm_head"] == pytest.approx(kl, rel=1e-4)
