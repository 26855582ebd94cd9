"""FuseDequantize: integer product and its scaling in one node."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from belle_compile.passes.base import PassResult
from belle_compile.passes.fusion.fuse_dequantize import FuseDequantize
from belle_compile.passes.quantization.quantize_linears import QuantizeLinears
from tests.passes.helpers import Tiny, assert_same_results, bloom, check_pass, count, llama, side_by_side


def quantized(bias: bool) -> ir.Model:
    b = Tiny()
    model = b.head(b.linear(b.x, "dense", 32, bias=bias))
    QuantizeLinears(keep=("lm_head",)).run(model)
    return model


def test_text(golden: Callable[[str, str], None]) -> None:
    model = quantized(bias=True)
    before, result = check_pass(FuseDequantize(), model)
    assert result == PassResult(1)
    golden("fuse-dequantize", side_by_side(before, FuseDequantize(), model))


def test_same_results() -> None:
    for make in (lambda: quantized(bias=False), lambda: quantized(bias=True), llama, bloom):
        model = make()
        QuantizeLinears().run(model)
        before, result = check_pass(FuseDequantize(), model)
        assert result.changes and count(model, "IntegerLinear") == 0
        assert_same_results(before, model)


def test_refuses_shared_accumulator() -> None:
    b = Tiny()
    xq, xs = b.ops("QuantizeTokens", b.x, name="quantize")
    wq = b.weight("wq", np.eye(32, dtype=np.int8))
    accumulator = b.op("IntegerLinear", xq, wq, name="multiply")
    scaled = [b.op("Dequantize", accumulator, xs, b.random(f"ws.{index}", 32), name=f"scale.{index}") for index in range(2)]
    _, result = check_pass(FuseDequantize(), b.head(b.op("Add", *scaled, name="add")))
    assert result == PassResult(
        0,
        (
            "scale.0: its accumulator is also read by scale.1",
            "scale.1: its accumulator is also read by scale.0",
        ),
    )


def test_float_graph_is_left_alone() -> None:
    assert check_pass(FuseDequantize(), llama())[1] == PassResult()
