"""QuantizeGroups: INT4 weights in groups of inputs."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.build import GraphBuilder
from belle_compile.compiler.ir.constants import GROUP
from belle_compile.compiler.ir.ops import attributes_of
from belle_compile.passes.base import PassResult
from belle_compile.passes.quantization import groups
from belle_compile.passes.quantization.quantize_groups import QuantizeGroups
from belle_compile.passes.quantization.quantize_linears import QuantizeLinears
from belle_compile.passes.quantization.scheme import FLOAT32, INT4, INT8, WeightScheme
from belle_compile.passes.quantization.weights import quantize_groups
from tests.passes.helpers import LINEAR, Tiny, assert_same_results, check_pass, count, llama, side_by_side


def two_linears() -> ir.Model:
    b = Tiny()
    return b.head(b.op("Add", b.linear(b.x, "left", 32, bias=True), b.linear(b.x, "right", 32), name="add"), tied=True)


def with_rounded_weights(model: ir.Model, quantized: ir.Model, group: int = GROUP) -> ir.Model:
    """The float model with integers * scales in place of every INT4 weight."""
    for name, value in model.graph.initializers.items():
        if f"{name}.int4" in quantized.graph.initializers and value.const_value is not None:
            wq, ws = (quantized.graph.initializers[f"{name}.{part}"].const_value for part in ("int4", "scales"))
            assert wq is not None and ws is not None
            steps = np.repeat(ws.numpy().astype(np.float32), group, axis=1)[:, : wq.shape.numpy()[1]]
            value.const_value = ir.Tensor(wq.numpy().astype(np.float32) * steps, name=name)
    return model


def test_text(golden: Callable[[str, str], None]) -> None:
    model = two_linears()
    before, result = check_pass(QuantizeGroups(), model)
    assert result == PassResult(2)
    assert count(model, "QuantizeTokens") == 1 and count(model, "Gemm") == 1  # the head
    golden("quantize-groups", side_by_side(before, QuantizeGroups(), model))


def test_groups_of_another_size() -> None:
    """The nodes and the record of the pass say their size."""
    step, model = QuantizeGroups(weights=WeightScheme(4, 16)), llama(layers=1)
    check_pass(step, model)
    assert step.options == {"keep": [], "group": 16}
    nodes = [node for node in model.graph if node.op_type == "GroupQuantizedLinear"]
    assert {attributes_of(node)["group"] for node in nodes} == {16} and len(nodes) == 7
    assert_same_results(with_rounded_weights(llama(layers=1), model, 16), model, rtol=0.04)


@pytest.mark.parametrize("scheme", [INT8, FLOAT32, WeightScheme(4), WeightScheme(3, 128), WeightScheme(4, 128, True)], ids=str)
def test_schemes_that_it_does_not_know(scheme: WeightScheme) -> None:
    with pytest.raises(CompileError, match=rf"option weights of groups: found {scheme}, expected {INT4}"):
        QuantizeGroups(weights=scheme)


def test_exact_where_integers_represent_the_weights_and_inputs() -> None:
    """Three groups with scales of their own, the last of 44 inputs."""
    b = GraphBuilder()
    random = np.random.default_rng(0)
    table = random.integers(-127, 128, (40, 300)).astype(np.float32)
    weight = random.integers(-8, 8, (40, 300)).astype(np.float32)
    table[:, 0], weight[:, ::130] = 127, -8  # scales of exactly 1
    weight *= np.repeat([0.5, -2.0, 0.25], GROUP)[:300].astype(np.float32)
    x = b.op("Gather", b.weight("embed", table), b.inputs.token_ids, name="embedding")
    bias = b.weight("bias", np.arange(40, dtype=np.float32))
    y = b.op("Gemm", x, b.weight("inner", weight), bias, name="inner_linear", **LINEAR)
    model = b.finish(b.op("Gather", y, b.inputs.logit_rows, name="rows"))
    before, result = check_pass(QuantizeGroups(), model)
    assert result == PassResult(1)
    assert_same_results(before, model)
    scales = model.graph.initializers["inner.scales"].const_value
    assert scales is not None and scales.numpy()[0].tolist() == [0.5, -2.0, 0.25]


def test_activations_add_little_error_to_that_of_the_weights() -> None:
    model = llama(layers=1)
    check_pass(QuantizeGroups(), model)
    assert_same_results(with_rounded_weights(llama(layers=1), model), model, rtol=0.04)
    with pytest.raises(AssertionError):
        assert_same_results(llama(layers=1), model, rtol=0.04)


def test_what_it_leaves_becomes_int8() -> None:
    model = llama(layers=1)
    QuantizeGroups(keep=("*.down",)).run(model)
    assert QuantizeLinears().run(model).changes == 2
    assert count(model, "GroupQuantizedLinear") == 6 and not count(model, "Gemm")
    assert {str(node.name) for node in model.graph if node.op_type == "Dequantize"} == {"layers.0.mlp.down", "lm_head"}


def test_refusals() -> None:
    b = Tiny()
    computed = b.op("Gemm", b.x, b.op("Identity", b.random("w", 32, 32), name="copy"), name="computed", **LINEAR)
    kept, wide = b.linear(computed, "kept", 32), b.linear(b.x, "wide", 32)
    b.ops("QuantizeTokens", b.x, name="already", bits=16)
    model = b.head(b.op("Add", kept, wide, name="add"))
    _, result = check_pass(QuantizeGroups(keep=("ke*",)), model)
    assert result == PassResult(
        0,
        (
            "computed: its weight is computed, so its scales are not known when compiling",
            "kept: gets no INT4 weights because of the option keep='ke*'",
            "wide: its input has 16 bits",
        ),
    )


def test_graph_without_linears_but_the_head() -> None:
    b = Tiny()
    assert check_pass(QuantizeGroups(), b.head(b.x))[1] == PassResult()


def test_integers_and_scales() -> None:
    weight = np.random.default_rng(0).standard_normal((1100, 300)).astype(np.float32)  # more than one block of rows
    weight[3] = 0
    weight[4, :GROUP] = 0
    weight[4, :3] = [8, -7, 0.25]
    integers, scales = quantize_groups(weight, "w", GROUP)
    assert integers.dtype == np.int8 and scales.dtype == np.float16 and scales.shape == (1100, 3)
    assert set(np.unique(integers)) == set(range(-8, 8)) and integers.astype(ml_dtypes.int4).astype(np.int8).min() == -8
    assert not integers[3].any() and not scales[3].any()
    assert scales[4, 0] == -1 and integers[4, :4].tolist() == [-8, 7, 0, 0]  # the sign gives the outermost its level
    steps = np.repeat(np.abs(scales.astype(np.float32)), GROUP, axis=1)[:, :300]
    inside = np.abs(weight) < 6.9 * steps
    errors = np.abs(weight - integers * np.repeat(scales.astype(np.float32), GROUP, axis=1)[:, :300])
    assert (errors[inside] <= 0.501 * steps[inside]).all() and inside.mean() > 0.9


def test_scales_make_less_error_than_the_outermost_weights_would() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(256, generator=torch.Generator().manual_seed(1)) ** 4

    def error(scales: torch.Tensor, importance: torch.Tensor) -> float:
        steps = groups.every_input(scales, 256, GROUP)
        return float(((groups.nearest(weight, steps) * steps - weight).square() @ importance).sum())

    equal = torch.ones(256)
    plain = weight.view(64, 2, GROUP).abs().amax(dim=2) / 7
    assert error(groups.group_scales(weight, equal, GROUP), equal) < 0.85 * error(plain, equal)
    assert error(groups.group_scales(weight, importance, GROUP), importance) < error(
        groups.group_scales(weight, equal, GROUP), importance
    )


@pytest.mark.parametrize(("value", "found"), [(np.nan, "nan"), (-np.inf, "inf"), (1e6, "1,000,000")])
def test_weights_that_do_not_fit(value: float, found: str) -> None:
    weight = np.ones((5, 3), np.float32)
    weight[2, 1] = value
    message = rf"quantize: tensor w: found a weight of magnitude {found}, expected finite weights within \+-458,528"
    with pytest.raises(CompileError, match=message):
        quantize_groups(weight, "w", GROUP)
