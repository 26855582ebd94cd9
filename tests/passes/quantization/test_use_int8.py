"""UseInt8: some linears of a model with INT4 weights get INT8 ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from belle_compile.compiler.ir.text import to_text
from belle_compile.passes.base import PassResult
from belle_compile.passes.calibration.data import CalibrationData
from belle_compile.passes.pipeline import passes_of, run_pipeline
from belle_compile.passes.presets import PRESETS, Recipe
from belle_compile.passes.quantization.quantize_groups import QuantizeGroups
from belle_compile.passes.quantization.scheme import INT4, INT8
from belle_compile.passes.quantization.use_int8 import UseInt8
from tests.passes.helpers import assert_same_results, check_pass, count, llama, side_by_side

CHOSEN = ("layers.0.attn.o", "layers.0.mlp.down")


def linears(model: ir.Model, op: str) -> set[str]:
    return {str(node.name).removesuffix(".accumulate") for node in model.graph if node.op_type == op}


def test_text(golden: Callable[[str, str], None]) -> None:
    model = llama(layers=1)
    before, result = check_pass(UseInt8(CHOSEN), model)
    assert result == PassResult(2)
    assert_same_results(before, model)
    golden("use-int8", side_by_side(before, UseInt8(CHOSEN), model))


def test_names_that_no_such_linear_has() -> None:
    """The head has INT8 weights in any case."""
    model = llama(layers=1)
    before, result = check_pass(UseInt8(("lm_head", "layers.7.mlp.up")), model)
    assert result.changes == 0 and to_text(before) == to_text(model)
    assert [reason.partition(": ")[0] for reason in result.refusals] == ["lm_head", "layers.7.mlp.up"]
    assert all("no layer has this name" in reason for reason in result.refusals)


def test_the_passes_after_it_follow() -> None:
    """With all of the layers, a model with INT4 weights becomes that with INT8 weights."""
    mixed, int8, every = llama(), llama(), [str(node.name) for node in llama().graph if node.op_type == "Gemm"]
    run_pipeline(mixed, passes_of(Recipe(INT4), int8=CHOSEN))
    assert not set(CHOSEN) & linears(mixed, "GroupQuantizedLinear") and set(CHOSEN) <= linears(mixed, "QuantizedLinear")
    whole = llama()
    run_pipeline(whole, passes_of(Recipe(INT4), int8=tuple(name for name in every if name != "lm_head")))
    run_pipeline(int8, passes_of(Recipe(INT8)))
    assert count(whole, "GroupQuantizedLinear") == 0 and to_text(whole) == to_text(int8)
    assert_same_results(int8, whole)


def test_gptq_rounds_them_to_int8(tmp_path: Path) -> None:
    """Both kinds are rounded by requests; results of calibration for other choices of bits are not taken."""
    data = CalibrationData(((1, 2, 3, 4, 5, 6, 7), (8, 9, 10, 11)), "requests", "checkpoint", tmp_path)
    recipe = replace(PRESETS["int4"].recipe, methods=("gptq",))
    four, mixed = llama(layers=1), llama(layers=1)
    run_pipeline(four, passes_of(recipe, data))
    run_pipeline(mixed, passes_of(recipe, data, int8=CHOSEN))
    by_name = {name: value.const_value for name, value in mixed.graph.initializers.items()}
    rounded = by_name["layers.0.mlp.down.weight.rounded.int8"]
    assert rounded is not None and abs(rounded.numpy()).max() > 64
    assert "layers.0.mlp.down.weight.rounded.int4" in four.graph.initializers and linears(mixed, "GroupQuantizedLinear")


def test_nothing_is_marked_without_names() -> None:
    model = llama(layers=1)
    before, result = check_pass(UseInt8(()), model)
    assert result == PassResult() and to_text(before) == to_text(model)
    run_pipeline(model, (QuantizeGroups(),))
    assert count(model, "GroupQuantizedLinear") == 7
