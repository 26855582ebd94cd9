"""SmoothActivations: SmoothQuant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from belle_compile.passes.base import PassResult
from belle_compile.passes.calibration.data import CalibrationData
from belle_compile.passes.calibration.sensitivity import output_errors
from belle_compile.passes.quantization.quantize_linears import QuantizeLinears
from belle_compile.passes.quantization.scheme import INT8_BLOCKS
from belle_compile.passes.quantization.smooth_activations import SmoothActivations
from tests.passes.helpers import VOCABULARY, Tiny, assert_same_results, bloom, check_pass, llama, side_by_side

SEQUENCES = tuple(tuple(np.random.default_rng(n).integers(0, VOCABULARY, 24).tolist()) for n in range(8))


def smooth(folder: Path, alpha: float | None = 0.5) -> SmoothActivations:
    return SmoothActivations(CalibrationData(SEQUENCES, "a set", "a model", folder), alpha)


def outliers(model: ir.Model) -> ir.Model:
    """The same function with a few channels 50 times as large behind each norm, and their weights as much smaller."""
    for node in list(model.graph):
        if node.op_type not in ("RMSNormalization", "LayerNormalization"):
            continue
        readers = [reader for reader in node.outputs[0].consumers() if reader.op_type == "Gemm"]
        for value in node.inputs[1:]:
            assert value is not None and value.const_value is not None
            value.const_value.numpy()[[2, 9]] *= 50
        for reader in readers:
            weight = reader.inputs[1]
            assert weight is not None and weight.const_value is not None
            weight.const_value.numpy()[:, [2, 9]] /= 50
    return model


def test_text(tmp_path: Path, golden: Callable[[str, str], None]) -> None:
    model = llama(layers=1, last_norm=True)
    before, result = check_pass(smooth(tmp_path), model)
    assert result == PassResult(5)  # two norms and the last one, values, up
    golden("smooth-activations", side_by_side(before, smooth(tmp_path), model))


@pytest.mark.parametrize("alpha", [0.5, 0.8, None])
@pytest.mark.parametrize("make", [lambda: llama(last_norm=True), lambda: bloom(last_norm=True)])
def test_the_function_stays(make: Callable[[], ir.Model], alpha: float | None, tmp_path: Path) -> None:
    model = make()
    before, result = check_pass(smooth(tmp_path, alpha), model)
    assert result.changes
    assert_same_results(before, model, rtol=2e-5)


def test_blocks_have_factors_of_their_own(tmp_path: Path) -> None:
    data = CalibrationData(SEQUENCES, "a set", "a model", tmp_path / "blocks")
    step = SmoothActivations(data, weights=INT8_BLOCKS)
    model, other = llama(last_norm=True), llama(last_norm=True)
    before, result = check_pass(step, model)
    assert result.changes and step.options["group"] == 32 and "group" not in smooth(tmp_path).options
    assert_same_results(before, model, rtol=2e-5)
    smooth(tmp_path / "rows", None).run(other)
    rows, blocks = (next(node for node in each.graph if node.name == "layers.0.mlp.down").inputs[1] for each in (other, model))
    assert rows is not None and rows.const_value is not None and blocks is not None and blocks.const_value is not None
    ratio = blocks.const_value.numpy() / rows.const_value.numpy()
    assert np.abs(ratio - 1).max() > 0.01, "its 48 inputs are two blocks"


def test_what_cannot_be_smoothed_in_bloom(tmp_path: Path) -> None:
    _, result = check_pass(smooth(tmp_path), bloom(last_norm=True))
    assert result.changes == 2 * 3  # two norms and the values of each layer
    gelu = [f"h.{layer}.mlp.gelu: nothing can be moved through a GELU" for layer in (0, 1)]
    assert result.refusals == (*gelu, "norm: the weight of lm_head is also read by embed")


def test_a_fused_projection_with_another_reader_is_refused(tmp_path: Path) -> None:
    """The values could be divided, but not what else is read of the projection."""
    b = Tiny()
    fused = b.linear(b.x, "qkv", 96)
    q, k, v = b.split(fused, [32, 32, 32], "split")
    attended = b.linear(b.attention(q, k, v, "attn", 0), "o", 32)
    model = b.head(b.op("Add", attended, b.linear(fused, "extra", 32), name="add"))
    _, result = check_pass(smooth(tmp_path), model)
    assert result == PassResult(0, ("attn: its projection is also read by extra",))


@pytest.mark.parametrize("make", [llama, bloom])
def test_outliers_of_activations_do_less(make: Callable[[], ir.Model], tmp_path: Path) -> None:
    def worst(model: ir.Model, folder: str) -> float:
        norms = ("attn.q", "attn.qkv", "mlp.up")
        layers = output_errors(model, SEQUENCES, tmp_path / folder)
        return max(layer.output_error for layer in layers if layer.name.endswith(norms))

    bad, smoothed = outliers(make()), outliers(make())
    smooth(tmp_path / "work", None).run(smoothed)
    clean = worst(make(), "clean")
    assert worst(bad, "bad") > 10 * clean
    assert worst(smoothed, "smoothed") < 2 * clean


def test_a_quantized_graph_is_left_alone(tmp_path: Path) -> None:
    model = llama()
    QuantizeLinears().run(model)
    _, result = check_pass(smooth(tmp_path), model)
    assert result.changes == 0
