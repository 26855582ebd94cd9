"""What ops say of their operands."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir import meanings
from belle_compile.compiler.ir.build import GraphBuilder, make_node
from belle_compile.compiler.ir.ops import SPECS, OpSpec, operand, spec_of
from belle_compile.compiler.ir.signature import Role, parse

SEVERAL = {Role.ACTIVATION, Role.INDEX}


def test_roles_of_a_signature() -> None:
    operands = parse("x:float32[T,K] w@weight:int8[N,K] bias?:float32[N]")
    assert [(one.name, one.role, one.optional) for one in operands] == [
        ("x", Role.ACTIVATION, False),
        ("w", Role.WEIGHT, False),
        ("bias", Role.BIAS, True),
    ]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_no_op_has_two_inputs_of_a_role(spec: OpSpec) -> None:
    roles = Counter(one.role for one in spec.inputs)
    assert {role for role, times in roles.items() if times > 1} <= SEVERAL


def test_which_ops_are_linear() -> None:
    assert {spec.name for spec in SPECS if spec.is_linear} == {
        "Gemm",
        "IntegerLinear",
        "QuantizedLinear",
        "GroupQuantizedLinear",
    }
    assert {spec.name for spec in SPECS if spec.is_float_linear} == {"Gemm"}
    assert {spec.name for spec in SPECS if spec.accumulates} == {"IntegerLinear"}
    assert {spec.name for spec in SPECS if spec.scales_sums} == {"Dequantize"}


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.is_linear], ids=lambda spec: spec.name)
def test_constants_of_linears_have_outputs_first(spec: OpSpec) -> None:
    """The weight and its bias, scales and zero points: rows are outputs, columns inputs or groups of them."""
    constants = {one.role: one.dims for one in spec.inputs if one.role not in (Role.ACTIVATION, Role.TOKEN_SCALE)}
    assert constants[Role.WEIGHT] == ("N", "K")
    assert {dims[0] for dims in constants.values()} == {"N"}
    assert {role for role, dims in constants.items() if len(dims) == 2} <= {Role.WEIGHT, Role.GROUP_SCALE, Role.ZERO_POINT}


def test_operand_of_a_node() -> None:
    b = GraphBuilder()
    x = b.op("Gather", b.weight("table", np.ones((10, 8), np.float32)), b.inputs.token_ids, name="embed")
    weight, bias = b.weight("w", np.ones((3, 8), np.float32)), b.weight("b", np.ones(3, np.float32))
    plain, biased = (make_node("Gemm", [x, weight, *more], "y", attributes={"transB": 1}) for more in ([], [bias]))
    assert operand(plain, Role.WEIGHT) is weight and operand(plain, Role.BIAS) is None
    assert operand(biased, Role.BIAS) is bias and operand(biased, Role.STEP) is None
    assert spec_of(plain).index(Role.WEIGHT) == 1 and spec_of(plain).index(Role.STEP) is None


def test_groups_of_any_size_with_zero_points() -> None:
    """The product is that with the weight (wq - zero_point) * ws, which has a scale and a zero point for 20 inputs."""
    rng = np.random.default_rng(5)
    xq, xs = rng.integers(-127, 128, (4, 50)).astype(np.int8), rng.uniform(0.1, 1, 4).astype(np.float32)
    wq, zeros = rng.integers(-8, 8, (6, 50)), rng.integers(-8, 9, (6, 3)).astype(np.int8)
    ws = rng.normal(0, 0.1, (6, 3)).astype(np.float16)
    int4 = wq.astype(ir.DataType.INT4.numpy())
    weight = (wq - np.repeat(zeros, 20, axis=1)[:, :50]) * np.repeat(ws.astype(np.float64), 20, axis=1)[:, :50]
    found = meanings.group_linear(xq, xs, int4, ws, None, zeros, group=20)
    np.testing.assert_allclose(found, (xq @ weight.T) * xs[:, None], rtol=1e-5)


def test_groups_that_do_not_fit() -> None:
    b = GraphBuilder()
    x = b.op("Gather", b.weight("table", np.ones((10, 300), np.float32)), b.inputs.token_ids, name="embed")
    xq, xs = b.ops("QuantizeTokens", x, name="quantize")
    wq, ws = b.weight("wq", np.ones((3, 300), ir.DataType.INT4.numpy())), b.weight("ws", np.ones((3, 5), np.float16))
    zeros = [b.weight(f"zeros.{groups}", np.ones((3, groups), np.int8)) for groups in (5, 4)]
    for more in ([], [None, zeros[0]]):
        make_node("GroupQuantizedLinear", [xq, xs, wq, ws, *more], "y", attributes={"group": 64})
    with pytest.raises(CompileError, match=r"input ws \(node y\).* a scale for every 32 of 300 inputs"):
        make_node("GroupQuantizedLinear", [xq, xs, wq, ws], "y", attributes={"group": 32})
    with pytest.raises(
        CompileError, match=r"input zero_point \(node y\): found int8\[3, 4\], expected int8\[N, G\] where N = 3, G = 5"
    ):
        make_node("GroupQuantizedLinear", [xq, xs, wq, ws, None, zeros[1]], "y", attributes={"group": 64})
    with pytest.raises(CompileError, match=r"attribute group \(node y\): found 0, expected 1 input or more"):
        make_node("GroupQuantizedLinear", [xq, xs, wq, ws], "y", attributes={"group": 0})
