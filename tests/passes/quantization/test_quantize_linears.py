"""QuantizeLinears: W8A8 linears."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from compiler.errors import CompileError
from compiler.ir.build import GraphBuilder
from compiler.ir.lazy import lazy
from passes.base import PassResult
from passes.quantization.quantize_linears import QuantizeLinears
from passes.quantization.weights import quantize_rows
from tests.passes.helpers import LINEAR, Tiny, assert_same_results, check_pass, count, llama, run_steps, side_by_side


def two_linears() -> ir.Model:
    b = Tiny()
    return b.head(b.op("Add", b.linear(b.x, "left", 32, bias=True), b.linear(b.x, "right", 32), name="add"), tied=True)


def test_text(golden: Callable[[str, str], None]) -> None:
    model = two_linears()
    before, result = check_pass(QuantizeLinears(), model)
    assert result == PassResult(3)
    assert count(model, "QuantizeTokens") == 2  # one for both linears of embed, one for the head
    golden("quantize-linears", side_by_side(before, QuantizeLinears(), model))


def test_exact_where_integers_represent_the_weights_and_inputs() -> None:
    b = GraphBuilder()
    random = np.random.default_rng(0)

    def integers(rows: int, columns: int) -> np.ndarray:
        array = random.integers(-127, 128, (rows, columns)).astype(np.float32)
        array[:, 0] = 127  # scales of exactly 1
        return array

    x = b.op("Gather", b.weight("embed", integers(40, 8)), b.inputs.token_ids, name="embedding")
    rows = b.op("Gather", x, b.inputs.logit_rows, name="rows")
    bias = b.weight("bias", np.arange(40, dtype=np.float32))
    model = b.finish(b.op("Gemm", rows, b.weight("head", integers(40, 8)), bias, name="head_linear", **LINEAR))
    before, result = check_pass(QuantizeLinears(), model)
    assert result == PassResult(1)
    assert_same_results(before, model)


def test_error_is_that_of_rounding() -> None:
    """Against the float graph: half a step of weights and activations each gives about 1% of the largest logit."""
    model = two_linears()
    before, _ = check_pass(QuantizeLinears(), model)
    assert_same_results(before, model, rtol=0.02)
    with pytest.raises(AssertionError):
        assert_same_results(before, model, rtol=1e-4)


def test_same_results_as_rounding_by_hand() -> None:
    """The whole of a LLaMA layer's weights replaced by wq * ws in float: only activations are rounded besides."""
    quantized, by_hand = llama(layers=1), llama(layers=1)
    check_pass(QuantizeLinears(), quantized)
    for name, value in by_hand.graph.initializers.items():
        if f"{name}.int8" in quantized.graph.initializers and value.const_value is not None:
            wq, ws = (quantized.graph.initializers[f"{name}.{part}"].const_value for part in ("int8", "scale"))
            assert wq is not None and ws is not None
            value.const_value = ir.Tensor(wq.numpy().astype(np.float32) * ws.numpy()[:, None], name=name)
    for expected, found in zip(run_steps(by_hand), run_steps(quantized), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.03 * np.abs(expected).max())


def test_refuses_computed_weights_and_kept_linears() -> None:
    b = Tiny()
    weight = b.op("Identity", b.random("w", 32, 32), name="computed")
    model = b.head(b.op("Gemm", b.x, weight, name="dense", **LINEAR))
    _, result = check_pass(QuantizeLinears(keep=("lm_*",)), model)
    assert result == PassResult(
        0,
        (
            "dense: its weight is computed, so its scales are not known when compiling",
            "lm_head: stays float32 because of the option keep='lm_*'",
        ),
    )


def test_refuses_what_overflows_an_accumulator() -> None:
    b = GraphBuilder()
    wide = 133_145
    table = lazy("embed", lambda: np.zeros((4, wide), np.float32), (4, wide), np.float32)
    x = b.op("Gather", b.weight("embed", table), b.inputs.token_ids, name="embedding")
    rows = b.op("Gather", x, b.inputs.logit_rows, name="rows")
    _, result = check_pass(QuantizeLinears(), b.finish(b.op("Gemm", rows, b.weight("embed", table), name="head", **LINEAR)))
    assert result == PassResult(0, ("head: 133145 inputs overflow an int32 accumulator, at most 133144 fit",))


def test_graph_without_linears() -> None:
    b = Tiny()
    model = b.finish(b.op("Gather", b.x, b.inputs.logit_rows, name="rows"))
    assert check_pass(QuantizeLinears(), model)[1] == PassResult()


def test_quantize_rows() -> None:
    weight = np.random.default_rng(0).standard_normal((2500, 6)).astype(np.float32)  # more than one block of rows
    weight[3] = 0
    weight[4] = [127, -127, 0.5, 1.5, 2.5, -0.5]
    integers, scales = quantize_rows(weight, "w")
    assert scales[3] == 0 and not integers[3].any()
    assert scales[4] == 1 and integers[4].tolist() == [127, -127, 0, 2, 2, 0]
    np.testing.assert_array_equal(scales, np.abs(weight).max(axis=1) / np.float32(127))
    assert np.abs(integers * scales[:, None] - weight).max() <= 0.5001 * scales.max()
    assert set(np.abs(integers).max(axis=1)) == {0, 127}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(value: float) -> None:
    weight = np.ones((5, 3), np.float32)
    weight[2, 1] = value
    with pytest.raises(CompileError, match=r"quantize: tensor w: found NaN or infinity in row 2, expected finite weights"):
        quantize_rows(weight, "w")
