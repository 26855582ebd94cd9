"""UseMoreBits: some linears of a model with INT4 weights get 6 or 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from belle_compile.compiler.ir.ops import attributes_of
from belle_compile.compiler.ir.text import to_text
from belle_compile.passes.base import PassResult
from belle_compile.passes.calibration.data import CalibrationData
from belle_compile.passes.pipeline import passes_of, run_pipeline
from belle_compile.passes.presets import PRESETS, Recipe
from belle_compile.passes.quantization.quantize_groups import QuantizeGroups
from belle_compile.passes.quantization.scheme import INT4, INT8, MoreBits
from belle_compile.passes.quantization.use_more_bits import UseMoreBits
from tests.passes.helpers import assert_same_results, check_pass, count, llama, side_by_side

CHOSEN = MoreBits(("layers.0.attn.o", "layers.0.mlp.up"), ("layers.0.mlp.down",))


def linears(model: ir.Model, op: str) -> set[str]:
    return {str(node.name).removesuffix(".accumulate") for node in model.graph if node.op_type == op}


def test_text(golden: Callable[[str, str], None]) -> None:
    model = llama(layers=1)
    before, result = check_pass(UseMoreBits(CHOSEN), model)
    assert result == PassResult(3)
    assert_same_results(before, model)
    golden("use-more-bits", side_by_side(before, UseMoreBits(CHOSEN), model))


def test_names_that_no_such_linear_has() -> None:
    """The head has INT8 weights in any case."""
    model = llama(layers=1)
    before, result = check_pass(UseMoreBits(MoreBits(("lm_head",), ("layers.7.mlp.up",))), model)
    assert result.changes == 0 and to_text(before) == to_text(model)
    assert [reason.partition(": ")[0] for reason in result.refusals] == ["lm_head", "layers.7.mlp.up"]
    assert all("no layer has this name" in reason for reason in result.refusals)


def test_the_passes_after_it_follow() -> None:
    """With all of the layers, a model with INT4 weights becomes that with INT8 weights."""
    mixed, int8, every = llama(), llama(), [str(node.name) for node in llama().graph if node.op_type == "Gemm"]
    run_pipeline(mixed, passes_of(Recipe(INT4), more_bits=CHOSEN))
    assert linears(mixed, "QuantizedLinear") == {"layers.0.mlp.down", "lm_head"}
    bits = {
        str(node.name): attributes_of(node)["integer_bits"] for node in mixed.graph if node.op_type == "GroupQuantizedLinear"
    }
    assert {name for name, own in bits.items() if own == 6} == set(CHOSEN.int6) and {*bits.values()} == {4, 6}
    weight = mixed.graph.initializers["layers.0.mlp.up.weight.int6"].const_value
    assert weight is not None and weight.dtype == ir.DataType.INT8 and 16 < abs(weight.numpy()).max() <= 32
    assert_same_results(llama(), mixed, rtol=0.4)
    whole = llama()
    run_pipeline(whole, passes_of(Recipe(INT4), more_bits=MoreBits((), tuple(name for name in every if name != "lm_head"))))
    run_pipeline(int8, passes_of(Recipe(INT8)))
    assert count(whole, "GroupQuantizedLinear") == 0 and to_text(whole) == to_text(int8)
    assert_same_results(int8, whole)


def test_gptq_rounds_them_to_their_bits(tmp_path: Path) -> None:
    """All kinds are rounded by requests; results of calibration for other choices of bits are not taken."""
    data = CalibrationData(((1, 2, 3, 4, 5, 6, 7), (8, 9, 10, 11)), "requests", "checkpoint", tmp_path)
    recipe = replace(PRESETS["int4"].recipe, methods=("gptq",))
    four, mixed = llama(layers=1), llama(layers=1)
    run_pipeline(four, passes_of(recipe, data))
    run_pipeline(mixed, passes_of(recipe, data, more_bits=CHOSEN))
    by_name = {name: value.const_value for name, value in mixed.graph.initializers.items()}
    for name, most in (("layers.0.mlp.down.weight.rounded.int8", 127), ("layers.0.attn.o.weight.rounded.int6", 32)):
        rounded = by_name[name]
        assert rounded is not None and most / 2 < abs(rounded.numpy()).max() <= most
    assert "layers.0.mlp.down.weight.rounded.int4" in four.graph.initializers and linears(mixed, "GroupQuantizedLinear")


def test_nothing_is_marked_without_names() -> None:
    model = llama(layers=1)
    before, result = check_pass(UseMoreBits(MoreBits()), model)
    assert result == PassResult() and to_text(before) == to_text(model)
    run_pipeline(model, (QuantizeGroups(),))
    assert count(model, "GroupQuantizedLinear") == 7
