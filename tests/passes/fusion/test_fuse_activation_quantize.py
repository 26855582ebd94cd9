"""FuseActivationQuantize: Gelu and SwiGLU that end in INT8."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import pytest

from belle_compile.passes.base import PassResult
from belle_compile.passes.fusion.fuse_activation_quantize import FuseActivationQuantize
from belle_compile.passes.quantization.quantize_linears import QuantizeLinears
from belle_compile.passes.rotation.rotate_activations import RotateActivations
from tests.passes.helpers import Tiny, assert_same_results, bloom, check_pass, count, llama, side_by_side


def feed_forward(op: str, reused: bool = False, rotated: bool = False) -> ir.Model:
    b = Tiny()
    inner = [b.linear(b.x, name, 32) for name in (("up",) if op == "Gelu" else ("gate", "up"))]
    attributes = {"approximate": "tanh"} if op == "Gelu" else {}
    y = b.op(op, *inner, name="act", **attributes)
    down = b.linear(y, "down", 32)
    model = b.head(b.op("Add", down, y, name="add") if reused else down)
    if rotated:
        RotateActivations().run(model)
    QuantizeLinears().run(model)
    return model


@pytest.mark.parametrize("op", ["Gelu", "SwiGLU"])
def test_text(golden: Callable[[str, str], None], op: str) -> None:
    model = feed_forward(op)
    before, result = check_pass(FuseActivationQuantize(), model)
    assert result == PassResult(1)
    golden(f"fuse-activation-quantize-{op.lower()}", side_by_side(before, FuseActivationQuantize(), model))


def test_rotated_text(golden: Callable[[str, str], None]) -> None:
    model = feed_forward("SwiGLU", rotated=True)
    before, result = check_pass(FuseActivationQuantize(), model)
    assert result == PassResult(1)
    golden("fuse-activation-quantize-rotated", side_by_side(before, FuseActivationQuantize(), model))


@pytest.mark.parametrize("op", ["Gelu", "SwiGLU"])
@pytest.mark.parametrize("bits", [8, 16])
def test_same_results_when_rotated(op: str, bits: int) -> None:
    model = llama() if op == "SwiGLU" else bloom()
    RotateActivations().run(model)
    QuantizeLinears(activation_bits=bits).run(model)
    before, result = check_pass(FuseActivationQuantize(), model)
    assert result == PassResult(2)
    assert not count(model, "BlockHadamard")
    assert_same_results(before, model)


@pytest.mark.parametrize("make", [lambda: feed_forward("Gelu"), lambda: feed_forward("SwiGLU"), bloom, llama])
def test_same_results(make: Callable[[], ir.Model]) -> None:
    model = make()
    QuantizeLinears().run(model)
    before, result = check_pass(FuseActivationQuantize(), model)
    assert result.changes
    assert_same_results(before, model)


def test_refuses_a_result_with_another_reader() -> None:
    _, result = check_pass(FuseActivationQuantize(), feed_forward("Gelu", reused=True))
    assert result == PassResult(0, ("act.quantize: the float32 result of act is also read by add",))


@pytest.mark.parametrize("name", ["act", "act.hadamard"])
def test_refuses_a_rotation_with_another_reader(name: str) -> None:
    model = feed_forward("Gelu", rotated=True)
    rows = model.graph.node("rows")
    rows.replace_input_with(0, model.graph.node(name).outputs[0])
    _, result = check_pass(FuseActivationQuantize(), model)
    assert result == PassResult(0, (f"act.hadamard.quantize: the float32 result of {name} is also read by rows",))


def test_float_graph_is_left_alone() -> None:
    assert check_pass(FuseActivationQuantize(), bloom())[1] == PassResult()
