"""FuseProjections: linears of one input as one linear and a split."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import pytest

from belle_compile.passes.base import PassResult
from belle_compile.passes.fusion.fuse_dequantize import FuseDequantize
from belle_compile.passes.fusion.fuse_projections import FuseProjections, joined
from belle_compile.passes.quantization.quantize_groups import QuantizeGroups
from belle_compile.passes.quantization.quantize_linears import QuantizeLinears
from tests.passes.helpers import Tiny, assert_same_results, bloom, check_pass, count, llama, side_by_side


def projections(biases: Sequence[bool], quantize: bool = False) -> ir.Model:
    """Linears 0, 1, ... of the same input, with a bias each or not, added up."""
    b = Tiny()
    parts = [b.linear(b.x, f"h.0.{index}.proj", 32, bias=bias) for index, bias in enumerate(biases)]
    total = parts[0]
    for index, part in enumerate(parts[1:]):
        total = b.op("Add", total, part, name=f"add.{index}")
    model = b.head(total)
    if quantize:
        QuantizeLinears().run(model)
        FuseDequantize().run(model)
    return model


@pytest.mark.parametrize("quantize", [False, True])
def test_text(golden: Callable[[str, str], None], quantize: bool) -> None:
    model = projections([True, False, True], quantize)
    before, result = check_pass(FuseProjections(), model)
    assert result == PassResult(1)
    golden(f"fuse-projections-{'int8' if quantize else 'float'}", side_by_side(before, FuseProjections(), model))


@pytest.mark.parametrize("biases", [[False, False], [True, True, True], [True, False, True]])
def test_same_results(biases: list[bool]) -> None:
    model = projections(biases, quantize=True)
    before, _ = check_pass(FuseProjections(), model)
    assert_same_results(before, model)
    model = projections(biases)
    before, _ = check_pass(FuseProjections(), model)
    assert_same_results(before, model, rtol=1e-6)  # a BLAS may sum a wider matrix in another order


@pytest.mark.parametrize("biases", [[False, False], [True, False, True]])
def test_same_results_with_int4_weights(biases: list[bool]) -> None:
    model = projections(biases)
    assert QuantizeGroups().run(model).changes == len(biases)
    before, result = check_pass(FuseProjections(), model)
    assert result == PassResult(1) and count(model, "GroupQuantizedLinear") == 1
    assert_same_results(before, model)


def grouped(b: Tiny, name: str, group: int, zeros: bool, bias: bool) -> ir.Value:
    """A linear of b.x with random INT4 weights, as a checkpoint that is quantized already brings them."""
    random, groups = np.random.default_rng(len(name)), -(-32 // group)
    weights = {
        "int4": random.integers(-8, 8, (32, 32)).astype(ir.DataType.INT4.numpy()),
        "scales": random.normal(0, 0.05, (32, groups)).astype(np.float16),
        "bias": random.normal(0, 1, 32).astype(np.float32) if bias else None,
        "zeros": random.integers(-8, 9, (32, groups)).astype(np.int8) if zeros else None,
    }
    values = [None if array is None else b.weight(f"{name}.{part}", array) for part, array in weights.items()]
    known = b.x.consumers()
    quantize = known[0].outputs if known else b.ops("QuantizeTokens", b.x, name="quantize")
    return b.op("GroupQuantizedLinear", *quantize, *values, name=name, group=group)


@pytest.mark.parametrize("zeros", [(True, True), (False, True), (True, False)])
def test_zero_points_are_fused_with_the_integers(zeros: tuple[bool, bool]) -> None:
    b = Tiny()
    parts = [grouped(b, name, 20, zero, bias) for name, zero, bias in zip(("one", "other"), zeros, (True, False), strict=True)]
    model = b.head(b.op("Add", *parts, name="add"))
    before, result = check_pass(FuseProjections(), model)
    assert result == PassResult(1) and count(model, "GroupQuantizedLinear") == 1
    assert_same_results(before, model)


def test_groups_of_different_sizes_are_not_fused() -> None:
    b = Tiny()
    parts = [grouped(b, name, group, False, False) for name, group in (("one", 16), ("other", 32))]
    assert check_pass(FuseProjections(), b.head(b.op("Add", *parts, name="add")))[1] == PassResult()


def test_llama_fuses_both_groups_of_each_layer() -> None:
    model = llama(layers=2)
    before, result = check_pass(FuseProjections(), model)
    assert result == PassResult(4) and count(model, "Gemm") == 2 * 4 + 1
    assert_same_results(before, model, rtol=2e-6)


def test_refuses_a_weight_with_another_reader() -> None:
    b = Tiny()
    shared = b.linear(b.x, "first", 32), b.linear(b.x, "second", 32)
    total = b.op("Add", *shared, name="add")
    _, result = check_pass(
        FuseProjections(), b.head(b.op("Gemm", total, b.graph.initializers["second.weight"], name="again", transB=1))
    )
    assert result == PassResult(0, ("first: second.weight is also read by again and would be stored twice",))


def test_refuses_a_computed_bias() -> None:
    b = Tiny()
    bias = b.weight("bias", np.ones(32, np.float32))
    computed = b.op("Identity", bias, name="computed")
    first = b.op("Gemm", b.x, b.random("first.weight", 32, 32), computed, name="first", transB=1)
    _, result = check_pass(FuseProjections(), b.head(b.op("Add", first, b.linear(b.x, "second", 32), name="add")))
    assert result == PassResult(0, ("first: computed of first is computed",))


def test_linears_of_different_inputs() -> None:
    assert check_pass(FuseProjections(), bloom())[1] == PassResult()


def test_reading_int8_weights_computes_each_source_once() -> None:
    b = Tiny()
    reads = []

    def source(name: str) -> ir.LazyTensor:
        def read() -> ir.Tensor[np.ndarray]:
            reads.append(name)
            return ir.Tensor(np.full((32, 32), len(name), np.float32))

        return ir.LazyTensor(read, ir.DataType.FLOAT, ir.Shape([32, 32]), name=name)

    parts = [b.op("Gemm", b.x, b.weight(name, source(name)), name=name[0], transB=1) for name in ("a.weight", "b.weight")]
    model = b.head(b.op("Add", *parts, name="add"))
    for step in (QuantizeLinears(keep=("lm_head",)), FuseDequantize(), FuseProjections()):
        step.run(model)
    assert reads == []
    tensors = {str(value.name): value.const_value for value in model.graph.initializers.values()}
    for name in ("a+b.weight.int8", "a+b.weight.scale"):
        tensor = tensors[name]
        assert tensor is not None and len(tensor.numpy()) == 64
    assert reads == ["a.weight", "b.weight"]


def test_joined_names() -> None:
    assert joined(["h.0.q", "h.0.k", "h.0.v"]) == "h.0.q+k+v"
    assert joined(["h.0.q.weight", "h.0.k.weight"]) == "h.0.q+k.weight"
    assert joined(["a.x", "a.x.y"]) == "a.x+x.y"
