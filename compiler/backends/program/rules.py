"""The lowering rules, one per op: each chooses the kernel for a node and its operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from belle_compile.compiler.backends.program.kernels import Columns
from belle_compile.compiler.backends.program.lowering import Lowering, Operand, Place, cache_parts
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.constants import GROUP
from belle_compile.compiler.ir.ops import columns_of_targets, operand
from belle_compile.compiler.ir.signature import Role
from belle_compile.runtime.program import Adapter, Input

Attributes = dict[str, Any]
Rule = Callable[[Lowering, ir.Node, Attributes], None]


def _graph_input(value: ir.Value | None) -> Input:
    """The argument for a value that is an input of the graph."""
    assert value is not None and value.name is not None and value.is_graph_input()
    return Input(value.name)


def split(low: Lowering, node: ir.Node, attributes: Attributes) -> None:
    """Place the parts as columns in the buffer of the value that is split; no kernel is called."""
    source = low.place(node.inputs[0])
    offset = source.offset
    for output in node.outputs:
        assert output.shape is not None
        width = output.shape[1]
        assert isinstance(width, int), "only rows are symbolic"
        low.places[output] = Place(source.buffer, offset, width)
        offset += width


def gather(low: Lowering, node: ir.Node, attributes: Attributes) -> None:
    """Call an embedding if the table is a weight, else copy the rows whose logits are needed."""
    table, indices = node.inputs
    assert table is not None and indices is not None
    out = low.allocate(node.outputs[0])
    if table.is_initializer():
        assert table.shape is not None
        embedding = low.kernels.FloatEmbedding(table.shape.numpy()[0], out.width, out.view)
        low.call(embedding, node, out.buffer.rows, _graph_input(indices), low.float_matrix(table), out)
    else:
        x = low.place(table)
        low.call(low.kernels.GatherRows(x.width, x.view, out.view), node, out.buffer.rows, _graph_input(indices), x, out)


def partial_embedding(low: Lowering, node: ir.Node, attributes: Attributes) -> None:
    ids, table, first = node.inputs
    assert table is not None and table.shape is not None
    out = low.allocate(node.outputs[0])
    kernel = low.kernels.FloatEmbedding(table.shape.numpy()[0], out.width, out.view, partial=True)
    low.call(kernel, node, out.buffer.rows, _graph_input(ids), low.float_matrix(table), low.number(first), out)


def quantized_embedding(low: Lowering, node: ir.Node, attributes: Attributes) -> None:
    ids, table, scales = node.inputs[:3]
    first = operand(node, Role.FIRST)
    assert table is not None and table.shape is not None
    out = low.allocate(node.outputs[0])
    kernel = low.kernels.QuantizedEmbedding(table.shape.numpy()[0], out.width, out.view, partial=first is not None)
    operands: list[Operand] = [low.int8_matrix(table), low.vector(scales)]
    operands += [low.number(first)] if first is not None else []
    low.call(kernel, node, out.buffer.rows, _graph_input(ids), *operands, out)


def all_reduce(low: Lowering, node: ir.Node, attributes: Attributes) -> None:
    """Sum over ranks in place: in a verified graph no other node reads the addend."""
    place = low.place(node.inputs[0])
    low.places[node.outputs[0]] = place
    low.all_reduce(node, place)


def add(low: Lowering, node: ir.Node, attributes: Attributes) -> None:
    x, r = low.place(node.inputs[0]), low.place(node.inputs[1])
    out = low.allocate(node.outputs[0])
    low.call(low.kernels.Add(x.width, x.view, r.view, out.view), node, out.buffer.rows, x, r, out)


def linear(low: Lowering, node: ir.Node, attributes: Attributes) -> None:
    x, bias, out = low.place(node.inputs[0]), operand(node, Role.BIAS), low.allocate(node.outputs[0])
    kernel = low.kernels.FloatLinear(out.width, x.width, bias is not None, x.view, out.view)
    weight = low.float_matrix(operand(node, Role.WEIGHT))
    low.call(kernel, node, out.buffer.rows, x, weight, *_optional_vector(low, bias), out)


def quantized_linear(low: Lowering, node: ir.Node, attributes: Attributes) -> None:
    xq, xs, bias = low.place(node.inputs[0]), low.place(operand(node, Role.TOKEN_SCALE)), operand(node, Role.BIAS)
    out = low.allocate(node.outputs[0])
    kernel = low.kernels.QuantizedLinear(out.width, xq.width, bias is not None, xq.view, out.view, xq.planes)
    weight = low.int8_linear(operand(node, Role.WEIGHT), operand(node, Role.SCALE))
    low.call(kernel, node, out.buffer.rows, xq, xs, *weight, *_optional_vector(low, bias), out)


def group_linear(low: Lowering, node: ir.Node, attributes: Attributes) -> None:
    xq, xs, bias = low.place(node.inputs[0]), low.place(operand(node, Role.TOKEN_SCALE)), operand(node, Role.BIAS)
    out = low.allocate(node.outputs[0])
    if low.kernels.GroupLinear is None:
        remedy = "build with --quant int8, or for a CPU"
        raise CompileError(low.backend, f"op {node.op_type}", node=str(node.name), found="no kernel for int4", remedy=remedy)
    if attributes["group"] != GROUP or operand(node, Role.ZERO_POINT) is not None:
        zeros = "no zero points" if operand(node, Role.ZERO_POINT) is None else "zero points"
        found, expected = f"groups of {attributes['group']} inputs and {zeros}", f"groups of {GROUP} inputs and no zero points"
        raise CompileError(low.backend, f"op {node.op_type}", node=str(node.name), found=found, expected=expected)
    bits = attributes["integer_bits"]
    kernel = low.kernels.GroupLinear(out.width, xq.width, bias is not None, xq.view, out.view, bits)
    weight = low.group_linear(operand(node, Role.WEIGHT), operand(node, Role.GROUP_SCALE), bits)
    low.call(kernel, node, out.buffer.rows, xq, xs, *weight, *_optional_vector(low, bias), out)


def _optional_vector(low: Lowering, value: ir.Value | None) -> list[Operand]:
    """The operands for an optional vector of a node: one, or none if the node does not have it."""
    return [] if value is None else [low.vector(value)]


def quantize_tokens(low: Lowering, node: ir.Node, attributes: Attributes) -> None:
    x, step = low.place(node.inputs[0]), _optional_vector(low, operand(node, Role.STEP))
    xq, xs = low.allocate(node.outputs[0]), low.allocate(node.outputs[1])
    low.call(
        low.kernels.QuantizeTokens(x.width, x.view, xq.view, xq.planes, bool(step)), node, xq.buffer.rows, x, *step, xq, xs
    )


def _norm_rule(kind: str | None, adds: bool, quantizes: bool) -> Rule:
    """The rule for a norm with or without a residual sum before it and a quantization after it; all call the kernel `Norm`."""

    def rule(low: Lowering, node: ir.Node, attributes: Attributes) -> None:
        x = low.place(node.inputs[0])
        r = low.place(node.inputs[1]) if adds else None
        bias = operand(node, Role.BIAS)
        outputs = [low.allocate(output) for output in node.outputs]
        total = outputs.pop(0) if adds else None
        step = _optional_vector(low, operand(node, Role.STEP))
        kernel = low.kernels.Norm(
            norm=kind or attributes["kind"], width=x.width, epsilon=attributes["epsilon"], bias=bias is not None,
            quantize=quantizes, x=x.view, r=r.view if r else None, total=total.view if total else None, out=outputs[0].view,
            planes=outputs[0].planes, step=bool(step),
        )  # fmt: skip
        operands: list[Operand] = [x, *([r] if r else []), low.vector(operand(node, Role.GAIN)), *_optional_vector(low, bias)]
        operands += [*([total] if total else []), *step]
        low.call(kernel, node, outputs[0].buffer.rows, *operands, *outputs)

    return rule


def head_norm(low: Lowering, node: ir.Node, attributes: Attributes) -> None:
    x, gain, out = low.place(node.inputs[0]), operand(node, Role.GAIN), low.allocate(node.outputs[0])
    assert gain is not None and gain.shape is not None
    kernel = low.kernels.HeadNorm(x.width, gain.shape.numpy()[0], attributes["epsilon"], x.view, out.view)
    low.call(kernel, node, out.buffer.rows, x, low.vector(gain), out)


def _activation_rule(kind: str, quantizes: bool) -> Rule:
    """The rule for a feed-forward activation with or without a quantization after it."""

    def rule(low: Lowering, node: ir.Node, attributes: Attributes) -> None:
        x = low.place(node.inputs[0])
        up = low.place(node.inputs[1]) if kind == "swiglu" else None
        step = _optional_vector(low, operand(node, Role.STEP))
        outputs = [low.allocate(output) for output in node.outputs]
        kernel = low.kernels.Activation(
            kind, x.width, quantizes, x.view, up.view if up else None, outputs[0].view, outputs[0].planes,
            attributes.get("hadamard") or None, bool(step),
        )  # fmt: skip
        low.call(kernel, node, outputs[0].buffer.rows, x, *([up] if up else []), *step, *outputs)

    return rule


def block_hadamard(low: Lowering, node: ir.Node, attributes: Attributes) -> None:
    x, out = low.place(node.inputs[0]), low.allocate(node.outputs[0])
    low.call(low.kernels.BlockHadamard(x.width, attributes["block"], x.view, out.view), node, out.buffer.rows, x, out)


def rotary_table(low: Lowering, node: ir.Node, attributes: Attributes) -> None:
    positions, sequences, inv_freq = node.inputs
    out = low.allocate(node.outputs[0])
    kernel = low.kernels.RotaryTable(head_dim=out.width, **attributes)
    low.call(kernel, node, out.buffer.rows, _graph_input(positions), _graph_input(sequences), low.vector(inv_freq), out)


def attention(low: Lowering, node: ir.Node, attributes: Attributes) -> None:
    """Append keys and values to the cache, then attend to it.

    A backend has one attention kernel for all tokens, or several, each for the tokens that its `when` selects. The kernel for
    tokens that are alone in their sequence ("alone") also appends their keys and values.
    """
    q, k, v = (low.place(value) for value in node.inputs[:3])
    where = [_graph_input(value) for value in node.inputs[3:6]]
    cos_sin, slopes = operand(node, Role.ROTARY), operand(node, Role.SLOPE)
    table: list[Operand] = [low.place(cos_sin)] if cos_sin is not None else []
    out = low.allocate(node.outputs[0])
    layer, kv_heads, head_dim = attributes["layer"], attributes["num_kv_heads"], attributes["head_dim"]
    append = low.kernels.AppendKV(
        low.num_layers, kv_heads, head_dim, k.view, v.view, low.max_blocks, low.kv_dtype, cos_sin is not None
    )
    kinds = low.kernels.Attention
    low.call(append, node, "T", k, v, *where, *table, *cache_parts(layer), when="runs" if len(kinds) > 1 else "always")
    for when, kind in kinds:
        appended = (k, v) if when == "alone" else ()
        attend = kind(
            low.num_layers, attributes["num_heads"], kv_heads, head_dim, attributes["scale"], q.view, out.view, low.max_blocks,
            low.kv_dtype, cos_sin is not None, slopes is not None, *(place.view for place in appended),
            window=attributes["window"] or None,
        )  # fmt: skip
        vectors = _optional_vector(low, slopes)
        low.call(attend, node, "T", q, *appended, *where, *table, *vectors, *cache_parts(layer), out, when=when)


def low_rank(low: Lowering, node: ir.Node, attributes: Attributes) -> None:
    """Add the changes of adapters in place: in a verified graph no other node reads the results of the linears."""
    out, x = low.place(node.inputs[0]), low.place(node.inputs[1])
    scale, sequences = operand(node, Role.TOKEN_SCALE), operand(node, Role.INDEX)
    low.places[node.outputs[0]] = out
    if low.kernels.LowRank is None or low.adapters is None:
        remedy = "build without --lora-rank, or for a CPU"
        raise CompileError(low.backend, f"op {node.op_type}", node=str(node.name), found="no kernel", remedy=remedy)
    parts = columns_of_targets(node)
    columns = Columns(tuple((part.start, part.stop - part.start) for part in parts.values()))
    planes = x.planes if scale is not None else 0
    slot, factors = low.adapters.slot_bytes, factors_dtype(node)
    kernel = low.kernels.LowRank(columns, x.width, low.adapters.rank, slot, factors, x.view, out.view, planes)
    inputs: list[Operand] = [x] if scale is None else [x, low.place(scale)]
    where: list[Operand] = [Input("adapted"), _graph_input(sequences), Input("adapters"), *map(Adapter, parts)]
    low.call(kernel, node, out.buffer.rows, *inputs, *where, out, when="adapted")


def factors_dtype(node: ir.Node) -> str:
    """The type in which an op of adapters reads their factors: what is rounded to integers needs no factors of 32 bits."""
    return "float32" if operand(node, Role.TOKEN_SCALE) is None else "float16"


RULES: dict[str, Rule] = {
    "Split": split,
    "Gather": gather,
    "Add": add,
    "Gemm": linear,
    "LayerNormalization": _norm_rule("layer", adds=False, quantizes=False),
    "RMSNormalization": _norm_rule("rms", adds=False, quantizes=False),
    "HeadNorm": head_norm,
    "AddNorm": _norm_rule(None, adds=True, quantizes=False),
    "NormQuantize": _norm_rule(None, adds=False, quantizes=True),
    "AddNormQuantize": _norm_rule(None, adds=True, quantizes=True),
    "Gelu": _activation_rule("gelu", quantizes=False),
    "GeluQuantize": _activation_rule("gelu", quantizes=True),
    "SwiGLU": _activation_rule("swiglu", quantizes=False),
    "SwiGLUQuantize": _activation_rule("swiglu", quantizes=True),
    "BlockHadamard": block_hadamard,
    "QuantizeTokens": quantize_tokens,
    "Embedding": partial_embedding,
    "QuantizedEmbedding": quantized_embedding,
    "AllReduce": all_reduce,
    "QuantizedLinear": quantized_linear,
    "GroupQuantizedLinear": group_linear,
    "LowRank": low_rank,
    "QuantizedLowRank": low_rank,
    "RotaryTable": rotary_table,
    "Attention": attention,
}

# Kernel calls of ops that do not take exactly one: Split is a view, Identity vanishes, Attention appends and then attends
# Changes of low rank are computed in steps with adapters only
_CALLS = {"Split": 0, "Identity": 0, "Attention": 2, "LowRank": 0, "QuantizedLowRank": 0}


def count_kernel_calls(graph: ir.Graph) -> int:
    """The number of kernel calls in one step of a graph, assuming that every op has a kernel."""
    return sum(_CALLS.get(node.op_type, 1) for node in graph)


def has_kernels(graph: ir.Graph) -> bool:
    """Whether every op of a graph has a kernel; passes remove or fuse those that have none."""
    return all(node.op_type in RULES for node in graph)
