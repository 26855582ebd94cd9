"""Translation of a rank's graph to the ONNX that TensorRT's parser takes: opset 24 alone, and no integer products but those of
QuantizeLinear and DequantizeLinear.

Embedding, residual stream and attention are of the type `floats`. Scales, norms' results before they are quantized, and the
products of integers are float32, because TensorRT stores the sum of such a product in the type of its scales, and float16 ends
at 65,504. RoPE is computed in float32 as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from belle_compile.compiler.backends.base import Array
from belle_compile.compiler.backends.onnx import rules as shared
from belle_compile.compiler.backends.onnx.attention import rotary_table, rotated
from belle_compile.compiler.backends.onnx.graph import OnnxGraph, OnnxModel, StoredTensor
from belle_compile.compiler.backends.onnx.interface import Interface, StepValues
from belle_compile.compiler.backends.onnx.translation import Attributes, Rule, Translation, tensor_of, width_of
from belle_compile.compiler.ir.meanings import LIMITS
from belle_compile.compiler.ir.ops import operand
from belle_compile.compiler.ir.signature import Role

OPSET = 24  # the first with TensorScatter, which TensorRT runs as an update of the KV cache in place
_INT8 = 8


@dataclass(frozen=True)
class Quantized:
    """Activations that linears read as integers: the floats, and the scale of all tokens; None where the linears read the
    floats themselves."""

    floats: ir.Value
    step: ir.TensorProtocol | None


class TensorRtInterface(Interface):
    """Inputs: int32 input_ids [B, S]; int64 first_positions [B], the position of each sequence's first token; int32 logit_rows
    [R], which are numbers of tokens of all B * S; and int32 rope_lengths [B] where RoPE is dynamic.

    For each layer there are keys and values of the cache, past_key_values.N.key and .value, with outputs present.N.key and
    .value, all [B, KV, C, D]. The tokens of a sequence are written to the positions from its first one on; tokens behind the
    last one that counts may be anything, if there is room for them. The logits are [R, V].
    """

    logits_dims = ("R",)

    def begin(self, graph: OnnxGraph, dynamic_rope: bool) -> StepValues:
        token_ids = graph.input("input_ids", "int32", ("B", "S"))
        self.first = graph.input("first_positions", "int64", ("B",))
        self._logit_rows = graph.input("logit_rows", "int32", ("R",))
        count = graph.op("Shape", token_ids, name="step.length", start=1)
        zero, one = graph.constant("zero.scalar", 0, "int64"), graph.constant("one.int64.scalar", 1, "int64")
        scalar = graph.op("Squeeze", count, name="step.length.scalar")
        offsets = graph.op("Range", zero, scalar, one, name="step.offsets")
        first = graph.op("Unsqueeze", self.first, graph.constant("last_axis", [-1], "int64"), name="step.first")
        self.positions = graph.op("Add", first, offsets, name="step.positions")
        lengths = graph.input("rope_lengths", "int32", ("B",)) if dynamic_rope else self.first
        return StepValues(token_ids, lengths, lengths, lengths)

    def rows(self, graph: OnnxGraph, hidden: ir.Value, width: int) -> ir.Value:
        flat = graph.op("Reshape", hidden, graph.constant("rows.shape", [-1, width], "int64"), name="rows.tokens")
        return graph.op("Gather", flat, self._logit_rows, name="rows", axis=0)


class TensorRtTranslation(Translation):
    """A translation whose floats are of one type, "float16" or "float32", for a cache of `capacity` positions."""

    interface: TensorRtInterface

    def __init__(self, source: ir.Model, floats: str, capacity: int) -> None:
        super().__init__(source, TensorRtInterface(), OPSET, floats)
        self.shared["step.positions"] = self.interface.positions
        self.capacity = capacity
        self.quantized: dict[ir.Value, Quantized] = {}
        self.wide: set[ir.Value] = set()  # logits that are float32 already

    @property
    def positions(self) -> int:
        return self.capacity

    def as_float32(self, value: ir.Value, name: str) -> ir.Value:
        """A value of the type of all floats in float32; `name` is used where that is another one."""
        return value if self.floats == "float32" else self.graph.op("Cast", value, name=name, to=int(ir.DataType.FLOAT))

    def as_floats(self, value: ir.Value, name: str) -> ir.Value:
        """A float32 value in the type of all others; `name` is used where that is another one."""
        return value if self.floats == "float32" else self.graph.op("Cast", value, name=name, to=int(ir.DataType.FLOAT16))

    def finish(self, logits: ir.Value) -> OnnxModel:
        if logits in self.wide:
            return super().finish(logits)
        producer = logits.producer()
        assert producer is not None
        producer.name = logits.name = f"logits.{self.floats}"
        return super().finish(self.as_float32(logits, "logits"))


def translate(source: ir.Model, floats: str, capacity: int) -> OnnxModel:
    """The ONNX model of a verified graph of one rank; raises CompileError for an op that has no translation."""
    return TensorRtTranslation(source, floats, capacity).run(RULES)


def _dequantized(t: TensorRtTranslation, weight: ir.TensorProtocol, scale: ir.TensorProtocol) -> ir.Value:
    """The float32 values of an INT8 weight with a scale for each row."""
    name = f"{weight.name}.floats"
    if name not in t.shared:
        parts = t.stored(weight, "int8"), t.stored(scale, "float32", str(weight.name))
        t.shared[name] = t.graph.op("DequantizeLinear", *parts, name=name, axis=0)
    return t.shared[name]


def gather(t: TensorRtTranslation, node: ir.Node, attributes: Attributes) -> None:
    """An embedding if the table is a weight, else the rows whose logits are needed."""
    table, _ = node.inputs
    assert table is not None
    if table.is_initializer():
        rows = t.graph.op("Gather", t.stored(tensor_of(table)), t.step.token_ids, name=str(node.name), axis=0)
    else:
        rows = t.interface.rows(t.graph, t.value(table), width_of(table))
    t.values[node.outputs[0]] = rows


def quantized_embedding(t: TensorRtTranslation, node: ir.Node, attributes: Attributes) -> None:
    """TensorRT reads the INT8 rows of the tokens alone: it moves the scaling behind the Gather."""
    table = _dequantized(t, tensor_of(node.inputs[1]), tensor_of(node.inputs[2]))
    rows = t.graph.op("Gather", table, t.step.token_ids, name=f"{node.name}.float32", axis=0)
    t.values[node.outputs[0]] = t.as_floats(rows, str(node.name))


def add_norm(t: TensorRtTranslation, node: ir.Node, attributes: Attributes) -> None:
    total, normed = node.outputs
    gain, bias = operand(node, Role.GAIN), operand(node, Role.BIAS)
    t.values[total] = t.graph.op("Add", t.value(node.inputs[0]), t.value(node.inputs[1]), name=str(total.name))
    op = {"rms": "RMSNormalization", "layer": "LayerNormalization"}[attributes["kind"]]
    vectors = [t.stored(tensor_of(value)) for value in (gain, bias) if value is not None]
    t.values[normed] = t.graph.op(op, t.values[total], *vectors, name=str(normed.name), axis=-1, epsilon=attributes["epsilon"])


def swiglu(t: TensorRtTranslation, node: ir.Node, attributes: Attributes) -> None:
    gate, up = (t.value(value) for value in node.inputs)
    name = str(node.outputs[0].name)
    sigmoid = t.graph.op("Sigmoid", gate, name=f"{name}.sigmoid")
    silu = t.graph.op("Mul", gate, sigmoid, name=f"{name}.silu")
    t.values[node.outputs[0]] = t.graph.op("Mul", silu, up, name=name)


def quantize_tokens(t: TensorRtTranslation, node: ir.Node, attributes: Attributes) -> None:
    """Activations of 8 bits have one scale for all tokens. Those of 16 bits are the floats."""
    step, bits = operand(node, Role.STEP), attributes["bits"]
    if bits == _INT8 and step is None:
        raise t.refuse(node, "a scale for each token", "add static to --methods")
    t.quantized[node.outputs[0]] = Quantized(t.value(node.inputs[0]), tensor_of(step) if bits == _INT8 else None)


def linear(t: TensorRtTranslation, node: ir.Node, attributes: Attributes) -> None:
    """x @ weight + bias, of floats."""
    for part in _parts(t, node):
        t.values[part.output] = _with_bias(t, part, _product(t, part, t.value(node.inputs[0]), t.stored(part.weight)))


def quantized_linear(t: TensorRtTranslation, node: ir.Node, attributes: Attributes) -> None:
    """The product of integers in float32, or that of floats with dequantized weights."""
    xq = node.inputs[0]
    assert xq is not None
    x, step = t.quantized[xq].floats, t.quantized[xq].step
    for part in _parts(t, node):
        assert part.scale is not None
        weight = _dequantized(t, part.weight, part.scale)
        if step is None:
            weight = t.as_floats(weight, f"{weight.name}.{t.floats}")
            t.values[part.output] = _with_bias(t, part, _product(t, part, x, weight))
            continue
        result = _with_bias(t, part, _product(t, part, _rounded(t, xq, x, step), weight), "float32")
        if part.output.is_graph_output():
            t.wide.add(result)
        t.values[part.output] = result if result in t.wide else t.as_floats(result, f"{part.name}.{t.floats}")


@dataclass(frozen=True)
class _Part:
    """The constants of a linear, or of those of its outputs that become the value `output`."""

    output: ir.Value
    weight: ir.TensorProtocol
    scale: ir.TensorProtocol | None
    bias: ir.TensorProtocol | None

    @property
    def name(self) -> str:
        return str(self.output.name)


def _parts(t: TensorRtTranslation, node: ir.Node) -> list[_Part]:
    """A linear, or a linear for each part of its result where a Split alone reads it: TensorRT would split the dequantized
    weight, and multiply floats. It joins the products of integers again by itself."""
    constants = (operand(node, role) for role in (Role.WEIGHT, Role.SCALE, Role.BIAS))
    weight, scale, bias = (None if value is None else tensor_of(value) for value in constants)
    assert weight is not None
    output = node.outputs[0]
    readers = [user for user, _ in output.uses()]
    if len(readers) != 1 or readers[0].op_type != "Split":
        return [_Part(output, weight, scale, bias)]
    (splitter,) = readers
    t.skipped.add(splitter)
    parts, start = [], 0
    for value in splitter.outputs:
        stop = start + width_of(value)
        scale_rows, bias_rows = (tensor and shared.rows_of(tensor, start, stop) for tensor in (scale, bias))
        parts.append(_Part(value, shared.rows_of(weight, start, stop), scale_rows, bias_rows))
        start = stop
    return parts


def _rounded(t: TensorRtTranslation, xq: ir.Value, x: ir.Value, step: ir.TensorProtocol) -> ir.Value:
    """float32 activations that are integers within +-127 times the scale; QuantizeLinear alone would go down to -128."""
    name = f"{xq.name}.floats"
    if name not in t.shared:
        graph, zero, limit = t.graph, t.graph.constant("zero.int8", 0, "int8"), LIMITS[_INT8]
        lowest, highest, scale = (_times_step(t, step, count) for count in (-limit, limit, 1))
        clipped = graph.op("Clip", t.as_float32(x, f"{xq.name}.float32"), lowest, highest, name=f"{xq.name}.clipped")
        integers = graph.op("QuantizeLinear", clipped, scale, zero, name=str(xq.name))
        t.shared[name] = graph.op("DequantizeLinear", integers, scale, zero, name=name)
    return t.shared[name]


def _times_step(t: TensorRtTranslation, step: ir.TensorProtocol, count: int) -> ir.Value:
    """float32 []: `count` steps."""

    def value() -> Array:
        return np.asarray(np.float32(count) * step.numpy().reshape(()))

    return t.graph.weight(StoredTensor(f"{step.name}*{count}", "float32", (), value, str(step.name)))


def _product(t: TensorRtTranslation, part: _Part, x: ir.Value, weight: ir.Value) -> ir.Value:
    """x @ weight.T, without the bias of the part; TensorRT stores the transposed weight."""
    key = f"{weight.name}.T"
    if key not in t.shared:
        t.shared[key] = t.graph.op("Transpose", weight, name=key, perm=[1, 0])
    return t.graph.op("MatMul", x, t.shared[key], name=part.name if part.bias is None else f"{part.name}.product")


def _with_bias(t: TensorRtTranslation, part: _Part, product: ir.Value, dtype: str = "") -> ir.Value:
    return product if part.bias is None else t.graph.op("Add", product, t.stored(part.bias, dtype), name=part.name)


def attention(t: TensorRtTranslation, node: ir.Node, attributes: Attributes) -> None:
    """The step's keys and values are written to the cache, which attention reads up to each token's own position."""
    name, layer, head_dim = str(node.outputs[0].name), attributes["layer"], attributes["head_dim"]
    slopes, turned, graph = operand(node, Role.SLOPE), operand(node, Role.ROTARY), t.graph
    heads = {"q": attributes["num_heads"], "k": attributes["num_kv_heads"], "v": attributes["num_kv_heads"]}
    kv_dims = ("B", heads["k"], t.capacity, head_dim)
    parts = dict(zip("qkv", (t.value(value) for value in node.inputs[:3]), strict=True))
    if turned is not None:
        for part, count in (("q", "num_heads"), ("k", "num_kv_heads")):
            wide = rotated(t, node, t.as_float32(parts[part], f"{name}.{part}.float32"), count)
            parts[part] = t.as_floats(wide, f"{name}.{part}.rotated")
    by_head = {part: _by_head(t, value, heads[part], head_dim, f"{name}.{part}") for part, value in parts.items()}
    for part, side in (("k", "key"), ("v", "value")):
        past = graph.input(f"past_key_values.{layer}.{side}", t.floats, kv_dims)
        present = f"present.{layer}.{side}"
        by_head[part] = graph.op("TensorScatter", past, by_head[part], t.interface.first, name=present, axis=-2)
        t.presents.append((by_head[part], present, kv_dims))
    seen = _mask(t, attributes["window"])
    mask = seen if slopes is None else _alibi(t, slopes, heads["q"], seen)
    result = graph.op("Attention", *by_head.values(), mask, name=f"{name}.by_head", scale=attributes["scale"])
    tokens = graph.op("Transpose", result, name=f"{name}.by_token", perm=[0, 2, 1, 3])
    t.values[node.outputs[0]] = graph.op("Reshape", tokens, graph.constant("rows.flat", [0, 0, -1], "int64"), name=name)


def _by_head(t: TensorRtTranslation, x: ir.Value, heads: int, head_dim: int, name: str) -> ir.Value:
    """[B, heads, S, head_dim] from [B, S, heads * head_dim]."""
    shape = t.graph.constant(f"heads.{heads}.{head_dim}", [0, 0, heads, head_dim], "int64")
    by_token = t.graph.op("Reshape", x, shape, name=f"{name}.heads")
    return t.graph.op("Transpose", by_token, name=f"{name}.by_head", perm=[0, 2, 1, 3])


def _mask(t: TensorRtTranslation, window: int) -> ir.Value:
    """bool [B, 1, S, C]: whether a key's position is at most the token's own, and with a window one of the last up to there."""
    graph = t.graph
    keys = graph.constant("mask.keys", np.arange(t.capacity), "int64")
    if "mask" not in t.shared:
        t.shared["mask"] = graph.op("LessOrEqual", keys, _query_positions(t), name="mask")
    if not window:
        return t.shared["mask"]
    name = f"mask.window{window}"
    if name not in t.shared:
        before = graph.op(
            "Sub", _query_positions(t), graph.constant(f"window.{window}", window, "int64"), name=f"{name}.before"
        )
        near = graph.op("Greater", keys, before, name=f"{name}.near")
        t.shared[name] = graph.op("And", t.shared["mask"], near, name=name)
    return t.shared[name]


def _query_positions(t: TensorRtTranslation) -> ir.Value:
    """int64 [B, 1, S, 1]."""
    if "mask.queries" not in t.shared:
        axes = t.graph.constant("mask.axes", [1, 3], "int64")
        t.shared["mask.queries"] = t.graph.op("Unsqueeze", t.interface.positions, axes, name="mask.queries")
    return t.shared["mask.queries"]


def _alibi(t: TensorRtTranslation, slopes: ir.Value, heads: int, seen: ir.Value) -> ir.Value:
    """[B, heads, S, C]: what is added to the scores: slope * (position of the key - that of the token), and only keys are seen
    that the mask `seen` names. The difference keeps numbers small where they count, so that float16 represents them well."""
    name = f"{slopes.name}.bias.{seen.name}"
    if name not in t.shared:
        graph = t.graph
        keys = graph.constant("mask.keys", np.arange(t.capacity), "int64")
        apart = graph.op("Sub", keys, _query_positions(t), name=f"{name}.distance")
        distance = graph.op("Cast", apart, name=f"{name}.distance.float32", to=int(ir.DataType.FLOAT))
        added = graph.op("Mul", t.stored(tensor_of(slopes), "float32", dims=(heads, 1, 1)), distance, name=f"{name}.float32")
        hidden = graph.constant(f"hidden.{t.floats}", float(np.finfo(t.floats).min), t.floats)
        t.shared[name] = graph.op("Where", seen, t.as_floats(added, f"{name}.{t.floats}"), hidden, name=name)
    return t.shared[name]


_SHARED = ("Split", "Add", "LayerNormalization", "RMSNormalization", "HeadNorm", "Gelu", "BlockHadamard")
RULES: Mapping[str, Rule] = {op: shared.RULES[op] for op in _SHARED} | {
    "Gather": gather,
    "Gemm": linear,
    "AddNorm": add_norm,
    "SwiGLU": swiglu,
    "QuantizeTokens": quantize_tokens,
    "QuantizedEmbedding": quantized_embedding,
    "QuantizedLinear": quantized_linear,
    "RotaryTable": rotary_table,
    "Attention": attention,
}
