"""QuantizeLinears: W8A8 linears."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.build import GraphBuilder
from belle_compile.compiler.ir.lazy import lazy
from belle_compile.passes.base import PassResult
from belle_compile.passes.quantization.quantize_embedding import QuantizeEmbedding
from belle_compile.passes.quantization.quantize_linears import QuantizeLinears
from belle_compile.passes.quantization.weights import quantize_rows
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
    quantized = llama(layers=1)
    check_pass(QuantizeLinears(), quantized)
    by_hand = with_rounded_weights(llama(layers=1), quantized)
    for expected, found in zip(run_steps(by_hand), run_steps(quantized), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.03 * np.abs(expected).max())


def with_rounded_weights(model: ir.Model, quantized: ir.Model) -> ir.Model:
    """The float model with wq * ws in place of every weight that was quantized."""
    for name, value in model.graph.initializers.items():
        if f"{name}.int8" in quantized.graph.initializers and value.const_value is not None:
            wq, ws = (quantized.graph.initializers[f"{name}.{part}"].const_value for part in ("int8", "scale"))
            assert wq is not None and ws is not None
            value.const_value = ir.Tensor(wq.numpy().astype(np.float32) * ws.numpy()[:, None], name=name)
    return model


def widths(model: ir.Model) -> dict[str, str]:
    """Element type of what each integer product multiplies."""
    return {
        str(node.name).removesuffix(".accumulate"): str(node.inputs[0].dtype)  # type: ignore[union-attr]
        for node in model.graph
        if node.op_type == "IntegerLinear"
    }


def test_text_of_16_bits(golden: Callable[[str, str], None]) -> None:
    model = two_linears()
    step = QuantizeLinears(activation_bits=16)
    before, result = check_pass(step, model)
    assert result == PassResult(3)
    golden("quantize-linears-a16", side_by_side(before, step, model))


@pytest.mark.parametrize("make", [two_linears, lambda: llama(layers=1)])
def test_activations_of_16_bits_add_no_error_to_that_of_the_weights(make: Callable[[], ir.Model]) -> None:
    model = make()
    check_pass(QuantizeLinears(activation_bits=16), model)
    QuantizeEmbedding().run(model)  # or a tied table would be rounded for the head only
    rounded = with_rounded_weights(make(), model)
    assert_same_results(rounded, model, rtol=2e-4)
    with pytest.raises(AssertionError):
        assert_same_results(make(), model, rtol=2e-3)


def test_wide_inputs() -> None:
    """One wide linear widens its input for all that read it, and no other."""
    model = llama(layers=2)
    step = QuantizeLinears(wide=("*.down", "layers.1.attn.k"))
    _, result = check_pass(step, model)
    assert result == PassResult(15)
    wide = {name for name, dtype in widths(model).items() if dtype == "INT16"}
    assert wide == {"layers.0.mlp.down", "layers.1.mlp.down", *(f"layers.1.attn.{part}" for part in "qkv")}
    assert count(model, "QuantizeTokens") == 9
    assert_same_results(with_rounded_weights(llama(layers=2), model), model, rtol=0.06)


def test_wide_linears_that_stay_float_widen_nothing() -> None:
    model = two_linears()
    _, result = check_pass(QuantizeLinears(keep=("right",), wide=("right",)), model)
    assert result == PassResult(2, ("right: stays float32 because of the option keep='right'",))
    assert set(widths(model).values()) == {"INT8"}


def test_tells_of_a_wide_pattern_that_names_nothing() -> None:
    model = two_linears()
    _, result = check_pass(QuantizeLinears(wide=("left", "*.down")), model)
    assert result == PassResult(3, ("wide='*.down': no linear has such a name",))


def test_other_widths() -> None:
    with pytest.raises(CompileError, match=r"quantize: option activation_bits: found 12, expected 8 or 16"):
        QuantizeLinears(activation_bits=12)


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


@pytest.mark.parametrize(("bits", "most"), [(8, 132_104), (16, 132_104)])
def test_refuses_what_overflows_an_accumulator(bits: int, most: int) -> None:
    b = GraphBuilder()
    wide = most + 1
    table = lazy("embed", lambda: np.zeros((4, wide), np.float32), (4, wide), np.float32)
    x = b.op("Gather", b.weight("embed", table), b.inputs.token_ids, name="embedding")
    rows = b.op("Gather", x, b.inputs.logit_rows, name="rows")
    model = b.finish(b.op("Gemm", rows, b.weight("embed", table), name="head", **LINEAR))
    _, result = check_pass(QuantizeLinears(activation_bits=bits), model)
    assert result == PassResult(0, (f"head: {wide} inputs overflow an int32 accumulator, at most {most} fit",))


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
