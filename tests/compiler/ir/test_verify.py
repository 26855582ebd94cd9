"""Graphs that must not pass, and what is said about them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.build import GraphBuilder, make_node
from belle_compile.compiler.ir.lazy import lazy
from belle_compile.compiler.ir.ops import REGISTRY, SPECS
from belle_compile.compiler.ir.signature import TensorSpec
from belle_compile.compiler.ir.verify import verify


def small() -> ir.Model:
    """Embedding, one attention, one head."""
    b = GraphBuilder()
    table = b.weight("table", np.ones((10, 8), np.float32))
    x = b.op("Gather", table, b.inputs.token_ids, name="embed")
    step = b.inputs
    x = b.op(
        "Attention", x, x, x, step.positions, step.sequences, step.block_table,
        name="attn", layer=0, num_heads=2, num_kv_heads=2, head_dim=4, scale=0.5,
    )  # fmt: skip
    rows = b.op("Gather", x, step.logit_rows, name="rows")
    return b.finish(b.op("Gemm", rows, table, name="head", transB=1), {"num_layers": "1", "num_kv_heads": "2", "head_dim": "4"})


def set_shape(value: ir.Value, *dims: int | str) -> None:
    value.shape = ir.Shape(dims)


def drop_input(model: ir.Model) -> None:
    model.graph.inputs.pop()


def rename_output(model: ir.Model) -> None:
    model.graph.outputs[0].name = "scores"


def other_opset(model: ir.Model) -> None:
    model.graph.opset_imports["belle"] = 2


def use_before_definition(model: ir.Model) -> None:
    head = model.graph.node("head")
    model.graph.remove(head)
    model.graph.insert_before(model.graph[0], head)


def two_values_of_one_name(model: ir.Model) -> None:
    model.graph.node("rows").outputs[0].name = "embed"


def two_nodes_of_one_name(model: ir.Model) -> None:
    model.graph.node("rows").name = "embed"


def unknown_op(model: ir.Model) -> None:
    model.graph.node("rows").op_type = "Take"


def wrong_domain(model: ir.Model) -> None:
    model.graph.node("attn").domain = "com.microsoft"


def unknown_attribute(model: ir.Model) -> None:
    model.graph.node("attn").attributes["sinks"] = ir.AttrInt64("sinks", 4)


def missing_attribute(model: ir.Model) -> None:
    del model.graph.node("attn").attributes["scale"]


def wrong_attribute_type(model: ir.Model) -> None:
    model.graph.node("attn").attributes["scale"] = ir.AttrInt64("scale", 1)


def attribute_not_allowed(model: ir.Model) -> None:
    del model.graph.node("head").attributes["transB"]


def missing_input(model: ir.Model) -> None:
    model.graph.node("attn").replace_input_with(1, None)


def too_many_inputs(model: ir.Model) -> None:
    head = model.graph.node("head")
    head.resize_inputs(4)


def wrong_input_shape(model: ir.Model) -> None:
    set_shape(model.graph.node("attn").inputs[0], "T", 12)  # type: ignore[arg-type]


def wrong_input_dtype(model: ir.Model) -> None:
    model.graph.node("attn").replace_input_with(2, model.graph.inputs[3])


def wrong_output_shape(model: ir.Model) -> None:
    set_shape(model.graph.node("rows").outputs[0], "T", 8)


def weight_of_another_shape(model: ir.Model) -> None:
    model.graph.initializers["table"].const_value = ir.Tensor(np.ones((10, 9), np.float32))


def layer_outside_the_cache(model: ir.Model) -> None:
    model.graph.node("attn").attributes["layer"] = ir.AttrInt64("layer", 1)


def another_cache_geometry(model: ir.Model) -> None:
    model.metadata_props["head_dim"] = "8"


CASES: list[tuple[Callable[[ir.Model], None], str]] = [
    (drop_input, r"graph inputs: found token_ids .*block_table int32\[B, MB\], expected .*logit_rows int32\[R\]"),
    (rename_output, r"graph outputs: found scores float32\[R, 10\], expected logits float32\[R, vocabulary size\]"),
    (other_opset, r"opset imports: found .*'belle': 2.*, expected \"\" 23 and \"belle\" 1"),
    (use_before_definition, r"input rows \(node head\): found none, expected a definition before its use"),
    (two_values_of_one_name, r"value 'embed' \(node rows\): found a second definition"),
    (two_nodes_of_one_name, r"Gather node \(node embed\): found a second node"),
    (unknown_op, r"op ai.onnx::Take \(node rows\): expected an op of compiler/ir/ops.py"),
    (wrong_domain, r"op com.microsoft::Attention \(node attn\)"),
    (unknown_attribute, r"attributes of Attention \(node attn\): found sinks, expected layer, num_heads"),
    (missing_attribute, r"attribute scale of Attention \(node attn\): found None, expected a value of type float"),
    (wrong_attribute_type, r"attribute scale of Attention \(node attn\): found 1, expected a value of type float"),
    (attribute_not_allowed, r"attribute transB of Gemm \(node head\): found 0, expected 1"),
    (missing_input, r"Attention: input k \(node attn\): found nothing, expected float32\[T, num_kv_heads\*head_dim\]"),
    (too_many_inputs, r"inputs of Gemm \(node head\): found 4, expected 3"),
    (wrong_input_shape, r"output embed \(node embed\): found float32\[T, 12\], expected float32\[T, 8\]"),
    (
        wrong_input_dtype,
        r"input v \(node attn\): found int32\[B, MB\], expected float32\[T, .*\] where T = T, num_kv_heads = 2",
    ),
    (wrong_output_shape, r"output rows \(node rows\): found float32\[T, 8\], expected float32\[R, 8\]"),
    (weight_of_another_shape, r"initializer table: found float32\[10, 9\], expected float32\[10, 8\]"),
    (layer_outside_the_cache, r"cache of Attention \(node attn\): found layer 1, expected one layer of the cache each"),
    (another_cache_geometry, r"head_dim of Attention \(node attn\): found 4, expected 8"),
]


@pytest.mark.parametrize(("break_it", "message"), CASES, ids=[case[0].__name__ for case in CASES])
def test_refuses(break_it: Callable[[ir.Model], None], message: str) -> None:
    model = small()
    verify(model)
    break_it(model)
    with pytest.raises(CompileError, match=f"^verify: .*{message}"):
        verify(model)


def test_two_attentions_of_one_layer() -> None:
    b = GraphBuilder()
    x = b.op("Gather", b.weight("table", np.ones((10, 8), np.float32)), b.inputs.token_ids, name="embed")
    attributes = {"layer": 0, "num_heads": 2, "num_kv_heads": 2, "head_dim": 4, "scale": 0.5}
    step = (b.inputs.positions, b.inputs.sequences, b.inputs.block_table)
    for name in ("first", "second"):
        x = b.op("Attention", x, x, x, *step, name=name, **attributes)
    rows = b.op("Gather", x, b.inputs.logit_rows, name="rows")
    with pytest.raises(CompileError, match=r"cache of Attention \(node second\): found layer 0, also of node first"):
        b.finish(rows)


def test_heads_that_kv_heads_do_not_divide() -> None:
    b = GraphBuilder()
    table = b.weight("table", np.ones((10, 12), np.float32))
    q = b.op("Gather", table, b.inputs.token_ids, name="embed")
    k, _ = b.split(q, [8, 4], "split")
    step = (b.inputs.positions, b.inputs.sequences, b.inputs.block_table)
    x = b.op("Attention", q, k, k, *step, name="attn", layer=0, num_heads=3, num_kv_heads=2, head_dim=4, scale=1.0)
    with pytest.raises(
        CompileError, match=r"num_heads of Attention \(node attn\): found 3, expected a multiple of num_kv_heads = 2"
    ):
        b.finish(b.op("Gather", x, b.inputs.logit_rows, name="rows"))


def test_no_values_are_read() -> None:
    def never() -> np.ndarray:
        raise AssertionError("a weight was read")

    b = GraphBuilder()
    x = b.op("Gather", b.weight("table", lazy("table", never, (10, 8), np.float32)), b.inputs.token_ids, name="embed")
    verify(b.finish(b.op("Gather", x, b.inputs.logit_rows, name="rows")))


def test_rms_has_no_bias() -> None:
    b = GraphBuilder()
    x = b.op("Gather", b.weight("table", np.ones((10, 8), np.float32)), b.inputs.token_ids, name="embed")
    w = b.weight("w", np.ones(8, np.float32))
    with pytest.raises(
        CompileError, match=r"NormQuantize: input bias \(node n\): found float32\[8\], expected none with kind='rms'"
    ):
        make_node("NormQuantize", [x, w, w], "n", attributes={"kind": "rms", "epsilon": 1e-5})


@pytest.mark.parametrize("block", [0, -16, 8, 24, 64])
def test_blocks_of_a_hadamard_transform(block: int) -> None:
    b = GraphBuilder()
    x = b.op("Gather", b.weight("table", np.ones((10, 96), np.float32)), b.inputs.token_ids, name="embed")
    message = (
        rf"block of the Hadamard transform \(node n\): found {block}, expected a power of two from 16 on that divides .* 96"
    )
    with pytest.raises(CompileError, match=message):
        make_node("BlockHadamard", [x], "n", attributes={"block": block})
    if block:
        with pytest.raises(CompileError, match=f"GeluQuantize: {message}"):
            make_node("GeluQuantize", [x], "n", attributes={"hadamard": block})
    assert make_node("BlockHadamard", [x], "n", attributes={"block": 32}).outputs[0].shape == ir.Shape(["T", 96])


def test_bits_of_activations() -> None:
    """Integers of 8 and 16 bits and their sums go together, through all ops."""
    b = GraphBuilder()
    x = b.op("Gather", b.weight("table", np.ones((10, 8), np.float32)), b.inputs.token_ids, name="embed")
    wq, ws = b.weight("wq", np.ones((3, 8), np.int8)), b.weight("ws", np.ones(3, np.float32))
    for bits, stored, summed in ((8, "int8", "int32"), (16, "int16", "int64")):
        xq, xs = b.ops("QuantizeTokens", x, name=f"quantize.{bits}", bits=bits)
        acc = b.op("IntegerLinear", xq, wq, name=f"multiply.{bits}")
        assert (str(TensorSpec.of(xq)), str(TensorSpec.of(acc))) == (f"{stored}[T, 8]", f"{summed}[T, 3]")
        b.op("Dequantize", acc, xs, ws, name=f"y.{bits}")
        y = b.op("QuantizedLinear", xq, xs, wq, ws, name=f"z.{bits}")
    with pytest.raises(CompileError, match=r"input wq \(node m\): found float32\[T, 8\], expected int8\[N, K\]"):
        make_node("IntegerLinear", [xq, x], "m")
    with pytest.raises(CompileError, match=r"input xq \(node m\): found float32\[T, 8\], expected int8 or int16\[T, K\]"):
        make_node("IntegerLinear", [x, wq], "m")
    model = b.finish(b.op("Gather", y, b.inputs.logit_rows, name="rows"))
    model.graph.node("quantize.16").attributes["bits"] = ir.AttrInt64("bits", 8)
    with pytest.raises(CompileError, match=r"output quantize.16.xq .*: found int16\[T, 8\], expected int8\[T, 8\]"):
        verify(model)


def test_scales_of_groups() -> None:
    """One for every 128 inputs, the last of which may be fewer."""
    b = GraphBuilder()
    x = b.op("Gather", b.weight("table", np.ones((10, 300), np.float32)), b.inputs.token_ids, name="embed")
    xq, xs = b.ops("QuantizeTokens", x, name="quantize")
    wq = b.weight("wq", np.ones((3, 300), ir.DataType.INT4.numpy()))
    ws, two = (b.weight(f"ws.{groups}", np.ones((3, groups), np.float16)) for groups in (3, 2))
    bias = b.weight("bias", np.ones(3, np.float32))
    for name, biases in (("y", ()), ("z", (bias,))):
        assert str(TensorSpec.of(b.op("GroupQuantizedLinear", xq, xs, wq, ws, *biases, name=name))) == "float32[T, 3]"
    message = r"input ws \(node m\): found float16\[3, 2\], expected float16\[N, 3\]: a scale for every 128 of 300 inputs"
    with pytest.raises(CompileError, match=message):
        make_node("GroupQuantizedLinear", [xq, xs, wq, two], "m")
    with pytest.raises(CompileError, match=r"input wq \(node m\): found int8\[3, 300\], expected int4, as attribute"):
        make_node("GroupQuantizedLinear", [xq, xs, b.weight("w8", np.ones((3, 300), np.int8)), ws], "m")


def test_split_sizes() -> None:
    b = GraphBuilder()
    x = b.op("Gather", b.weight("table", np.ones((10, 8), np.float32)), b.inputs.token_ids, name="embed")
    with pytest.raises(
        CompileError, match=r"input sizes \(node split\): found \[4, 5\], expected int64 parts that add up to 8"
    ):
        b.split(x, [4, 5], "split")
    assert not [use for use in x.uses()], "a refused node must not stay a user of its inputs"


def test_every_spec_parses() -> None:
    assert len(REGISTRY) == len(SPECS)
    for spec in SPECS:
        assert spec.inputs and (spec.outputs or spec.variadic) and spec.meaning.__doc__
