"""Attention as GroupQueryAttention of com.microsoft, which appends to a cache with room in place; RoPE and ALiBi for it."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from belle_compile.compiler.backends.base import Array
from belle_compile.compiler.backends.onnx.graph import MICROSOFT, StoredTensor
from belle_compile.compiler.backends.onnx.kernels import RuntimeTranslation
from belle_compile.compiler.backends.onnx.translation import Attributes, Translation, tensor_of
from belle_compile.compiler.ir.meanings import rotary_table as rotary_meaning
from belle_compile.compiler.ir.ops import attributes_of, operand
from belle_compile.compiler.ir.signature import Role

_HEAD_UNIT = 8  # GroupQueryAttention takes heads whose size is a multiple of this,
_FUSED_HEAD = 16  # and turns them itself where it is a multiple of this


def cached_head_dim(head_dim: int) -> int:
    """The size of a head in the KV cache: heads of other sizes than GroupQueryAttention takes are filled up with zeros."""
    return -(-head_dim // _HEAD_UNIT) * _HEAD_UNIT


def qkv_reader(split: ir.Node) -> ir.Node | None:
    """The attention that reads the parts of a Split as its q, k and v, which nothing else reads; None if there is none, or if
    other nodes come between them."""
    readers = {user for output in split.outputs for user, _ in output.uses()}
    if len(readers) != 1 or len(split.outputs) != 3:
        return None
    (reader,) = readers
    if reader.op_type != "Attention" or list(reader.inputs[:3]) != list(split.outputs):
        return None
    return reader if attributes_of(reader)["head_dim"] % _HEAD_UNIT == 0 and not _turned_apart(reader) else None


def _turned_apart(node: ir.Node) -> bool:
    """Whether RoPE is computed by nodes of its own: with frequencies that depend on the length of a sequence, or heads of a
    size that GroupQueryAttention does not turn."""
    table = operand(node, Role.ROTARY)
    if table is None:
        return False
    producer = table.producer()
    assert producer is not None
    return bool(attributes_of(producer)["dynamic_factor"]) or attributes_of(node)["head_dim"] % _FUSED_HEAD > 0


def rotary_table(t: Translation, node: ir.Node, attributes: Attributes) -> None:
    """Nothing: attention reads tables of its own, or appends the nodes that compute them; see `rotated`."""


def attention(t: RuntimeTranslation, node: ir.Node, attributes: Attributes) -> None:
    name, layer = str(node.outputs[0].name), attributes["layer"]
    graph, step = t.graph, t.step
    slopes, turned = operand(node, Role.SLOPE), operand(node, Role.ROTARY)
    packed = node.inputs[0] in t.values and node.inputs[1] not in t.values
    operands = [t.value(node.inputs[0]), None, None] if packed else [t.value(value) for value in node.inputs[:3]]
    tables: list[ir.Value | None] = [None, None]
    apart = _turned_apart(node)
    if turned is not None and apart:
        operands[:2] = [rotated(t, node, x, heads) for x, heads in zip(operands, ("num_heads", "num_kv_heads"), strict=False)]
    elif turned is not None:
        tables = list(_tables(t, turned.producer(), t.kv_floats))
    operands = [x and t.cast(x, t.kv_floats, f"{name}.{part}.{t.kv_floats}") for x, part in zip(operands, "qkv", strict=True)]
    head_dim = attributes["head_dim"]
    padding = cached_head_dim(head_dim) - head_dim
    if padding:
        operands = [_padded(t, x, head_dim, f"{name}.{part}") for x, part in zip(operands, "qkv", strict=True)]
    kv_dims = ("B", attributes["num_kv_heads"], t.kernels.capacity or "C", head_dim + padding)
    past = [graph.input(f"past_key_values.{layer}.{part}", t.kv_floats, kv_dims) for part in ("key", "value")]
    bias = None if slopes is None else _alibi(t, slopes, attributes["num_heads"])
    presents = [f"present.{layer}.{part}" for part in ("key", "value")]
    attended = f"{name}.padded" if padding else name
    outputs = graph.ops(
        "GroupQueryAttention", *operands, *past, step.last, step.total, *tables, None, bias, outputs=[attended, *presents],
        domain=MICROSOFT, num_heads=attributes["num_heads"], kv_num_heads=attributes["num_kv_heads"],
        scale=attributes["scale"], do_rotary=int(turned is not None and not apart),
        **({"local_window_size": attributes["window"]} if attributes["window"] else {}),
    )  # fmt: skip
    result = _cut(t, outputs[0], head_dim, name) if padding else outputs[0]
    t.values[node.outputs[0]] = t.cast(result, "float32", f"{name}.float32", of=t.kv_floats)
    t.presents += [(value, present, kv_dims) for value, present in zip(outputs[1:], presents, strict=True)]


def _alibi(t: RuntimeTranslation, slopes: ir.Value, heads: int) -> ir.Value:
    """What ALiBi adds to the scores; all layers read one value of it."""
    if (name := f"{slopes.name}.bias") not in t.shared:
        t.shared[name] = t.kernels.alibi(t, slopes, heads)
    return t.shared[name]


def _padded(t: Translation, x: ir.Value | None, head_dim: int, name: str) -> ir.Value:
    """Heads [B, S, heads * head_dim] with zeros behind each."""
    graph, more = t.graph, cached_head_dim(head_dim) - head_dim
    heads = graph.op("Reshape", x, graph.constant(f"heads.{head_dim}", [0, 0, -1, head_dim], "int64"), name=f"{name}.heads")
    pads = graph.constant(f"pads.{more}", [0] * 7 + [more], "int64")
    padded = graph.op("Pad", heads, pads, name=f"{name}.padded")
    return graph.op("Reshape", padded, graph.constant("rows.flat", [0, 0, -1], "int64"), name=f"{name}.padded.rows")


def _cut(t: Translation, x: ir.Value, head_dim: int, name: str) -> ir.Value:
    """Heads without the zeros that `_padded` put behind them."""
    graph, whole = t.graph, cached_head_dim(head_dim)
    heads = graph.op("Reshape", x, graph.constant(f"heads.{whole}", [0, 0, -1, whole], "int64"), name=f"{name}.heads")
    ends = [graph.constant(f"slice.{end}", [end], "int64") for end in (0, head_dim, 3)]
    cut = graph.op("Slice", heads, *ends, name=f"{name}.cut")
    return graph.op("Reshape", cut, graph.constant("rows.flat", [0, 0, -1], "int64"), name=name)


def _tables(t: Translation, node: ir.Node | None, dtype: str = "float32") -> tuple[ir.Value, ir.Value]:
    """The cosines and sines of all positions, each [positions, head_dim / 2]."""
    assert node is not None
    attributes, inv_freq = attributes_of(node), tensor_of(node.inputs[2])
    positions, half = t.positions, inv_freq.shape.numpy()[0]

    def columns(part: slice) -> Array:
        at = np.arange(positions, dtype=np.int32)
        table = rotary_meaning(at, np.zeros_like(at), inv_freq.numpy(), **attributes)
        return np.ascontiguousarray(table[:, part])

    parts = ("cos", slice(None, half)), ("sin", slice(half, None))
    cos, sin = (
        t.graph.weight(StoredTensor(f"{node.name}.{key}", dtype, (positions, half), partial(columns, part), str(node.name)))
        for key, part in parts
    )
    return cos, sin


def rotated(t: Translation, node: ir.Node, x: ir.Value | None, heads: str) -> ir.Value:
    """Queries or keys, turned by their positions."""
    table = operand(node, Role.ROTARY)
    assert table is not None
    producer = table.producer()
    assert producer is not None
    if (cos_sin := t.rotations.get(producer)) is None:
        dynamic = attributes_of(producer)["dynamic_factor"]
        t.rotations[producer] = cos_sin = _dynamic(t, producer) if dynamic else _looked_up(t, producer)
    count, name = attributes_of(node)[heads], f"{node.name}.{heads}.rotated"
    return t.graph.op("RotaryEmbedding", x, *cos_sin, name=name, num_heads=count)


def _positions(t: Translation) -> ir.Value:
    """int32 [B, S]: the positions of the tokens."""
    if (name := "step.positions") not in t.shared:
        t.shared[name] = t.interface.token_positions(t.graph, t.step)
    return t.shared[name]


def _looked_up(t: Translation, node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """The cosines and sines of each token [B, S, head_dim / 2], from the tables."""
    positions = _positions(t)
    cos, sin = (
        t.graph.op("Gather", table, positions, name=f"{node.name}.{key}.rows", axis=0)
        for table, key in zip(_tables(t, node), ("cos", "sin"), strict=True)
    )
    return cos, sin


def _dynamic(t: Translation, node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """The cosines and sines of each token, with frequencies that depend on the length of its sequence."""
    graph, name, attributes, inv_freq = t.graph, str(node.name), attributes_of(node), tensor_of(node.inputs[2])
    half = inv_freq.shape.numpy()[0]
    factor, original = attributes["dynamic_factor"], attributes["original_max"]
    exponents = np.arange(0, 2 * half, 2, dtype=np.float32) / np.float32(2 * half)
    last_axis = graph.constant("last_axis", [-1], "int64")
    length = graph.op("Unsqueeze", t.step.rope_length, last_axis, name=f"{name}.length")
    length = graph.op("Cast", length, name=f"{name}.length.float", to=int(ir.DataType.FLOAT))
    grown = graph.op("Mul", length, t.number(f"{name}.factor", factor), name=f"{name}.grown")
    share = graph.op("Div", grown, t.number(f"{name}.original", original), name=f"{name}.share")
    stretch = graph.op("Sub", share, t.number(f"{name}.rest", factor - 1), name=f"{name}.stretch")
    positive = graph.op("Max", stretch, t.number("one.float", 1), name=f"{name}.stretch.positive")
    power = graph.op("Pow", positive, t.number(f"{name}.power", 2 * half / (2 * half - 2)), name=f"{name}.stretched")
    base = graph.op("Mul", power, t.number(f"{name}.base", attributes["base"]), name=f"{name}.base.grown")
    powers = graph.op("Pow", base, graph.constant(f"{name}.exponents", exponents, "float32"), name=f"{name}.periods")
    stretched = graph.op("Reciprocal", powers, name=f"{name}.frequencies.stretched")
    long = graph.op("Greater", length, t.number(f"{name}.original", original), name=f"{name}.long")
    plain = t.stored(inv_freq, "float32")
    frequencies = graph.op("Where", long, stretched, plain, name=f"{name}.frequencies")
    middle = graph.op("Unsqueeze", frequencies, graph.constant("one", [1], "int64"), name=f"{name}.frequencies.rows")
    positions = graph.op("Cast", _positions(t), name=f"{name}.positions", to=int(ir.DataType.FLOAT))
    column = graph.op("Unsqueeze", positions, last_axis, name=f"{name}.positions.column")
    angles = graph.op("Mul", column, middle, name=f"{name}.angles")
    scaling = t.number(f"{name}.scaling", attributes["attention_scaling"])
    cos, sin = (
        graph.op("Mul", graph.op(op, angles, name=f"{name}.{op}"), scaling, name=f"{name}.{op}.scaled") for op in ("Cos", "Sin")
    )
    return cos, sin
