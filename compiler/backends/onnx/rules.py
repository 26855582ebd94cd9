"""The translation rules, one per op: each appends the nodes that compute what the op means."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir

from belle_compile.compiler.backends.base import Array
from belle_compile.compiler.backends.onnx.attention import attention, qkv_reader, rotary_table
from belle_compile.compiler.backends.onnx.graph import MICROSOFT, StoredTensor
from belle_compile.compiler.backends.onnx.kernels import RuntimeTranslation
from belle_compile.compiler.backends.onnx.translation import (
    Attributes,
    Planes,
    Rule,
    TokenScale,
    Translation,
    tensor_of,
    width_of,
)
from belle_compile.compiler.ir.lazy import part_of, pieces_of
from belle_compile.compiler.ir.meanings import LIMITS, golay_signs
from belle_compile.compiler.ir.ops import attributes_of, operand, spec_of
from belle_compile.compiler.ir.signature import Role

HIGH = 256  # what the integers of the high plane stand for
# Products with fewer weights take as long on two threads as on one (20 us of 0.9 million on a Zen 5 at one token)
SMALL = 4_000_000


def gather(t: RuntimeTranslation, node: ir.Node, attributes: Attributes) -> None:
    """An embedding if the table is a weight, else the rows whose logits are needed."""
    table, _ = node.inputs
    assert table is not None
    if table.is_initializer():
        name, stored = str(node.name), t.kernels.weight_floats
        rows = _rows_of_table(t, table, name, stored)
        t.values[node.outputs[0]] = t.cast(rows, "float32", f"{name}.float32", of=stored)
    else:
        t.values[node.outputs[0]] = t.interface.rows(t.graph, t.value(table), width_of(table))


def quantized_embedding(t: RuntimeTranslation, node: ir.Node, attributes: Attributes) -> None:
    name = str(node.name)
    table, scales = node.inputs[1], node.inputs[2]
    assert table is not None and scales is not None
    integers = _rows_of_table(t, table, f"{name}.integers", "int8")
    floats = t.graph.op("Cast", integers, name=f"{name}.floats", to=int(ir.DataType.FLOAT))
    each = t.graph.op(
        "Gather",
        t.stored(tensor_of(scales), source=str(tensor_of(table).name)),
        t.step.token_ids,
        name=f"{name}.scales",
        axis=0,
    )
    column = t.graph.op("Unsqueeze", each, t.graph.constant("last_axis", [-1], "int64"), name=f"{name}.scales.column")
    t.values[node.outputs[0]] = t.graph.op("Mul", floats, column, name=name)


def _rows_of_table(t: RuntimeTranslation, table: ir.Value, name: str, dtype: str) -> ir.Value:
    """The rows [B, S, width] of a table. A table that a linear reads too is stored once, as the linear takes it: then its rows
    are columns."""
    if not any(spec_of(user).is_linear for user, _ in table.uses()):
        return t.graph.op("Gather", t.stored(tensor_of(table), dtype), t.step.token_ids, name=name, axis=0)
    matrix = t.matrix(tensor_of(table), dtype)
    columns = t.graph.op("Gather", matrix, t.step.token_ids, name=f"{name}.columns", axis=1)
    return t.graph.op("Transpose", columns, name=name, perm=[1, 2, 0])


def split(t: Translation, node: ir.Node, attributes: Attributes) -> None:
    sizes = t.graph.constant(str(node.inputs[1].name), tensor_of(node.inputs[1]).numpy(), "int64")  # type: ignore[union-attr]
    names = [str(output.name) for output in node.outputs]
    t.values |= zip(node.outputs, t.graph.ops("Split", t.value(node.inputs[0]), sizes, outputs=names, axis=-1), strict=True)


def add(t: Translation, node: ir.Node, attributes: Attributes) -> None:
    x, r = (t.value(value) for value in node.inputs)
    t.values[node.outputs[0]] = t.graph.op("Add", x, r, name=str(node.outputs[0].name))


def layer_norm(t: Translation, node: ir.Node, attributes: Attributes) -> None:
    x, gain, bias = t.value(node.inputs[0]), operand(node, Role.GAIN), operand(node, Role.BIAS)
    assert gain is not None
    vectors = [t.stored(tensor_of(value)) for value in (gain, bias) if value is not None]
    kept = {"axis": -1, "epsilon": attributes["epsilon"]}
    t.values[node.outputs[0]] = t.graph.op(node.op_type, x, *vectors, name=str(node.name), **kept)


def head_norm(t: Translation, node: ir.Node, attributes: Attributes) -> None:
    """The RMS norm of the last axis of the heads [B, S, heads, head_dim]."""
    gain, name, graph = operand(node, Role.GAIN), str(node.outputs[0].name), t.graph
    head_dim = tensor_of(gain).shape.numpy()[0]
    shape = graph.constant(f"heads.{head_dim}", [0, 0, -1, head_dim], "int64")
    heads = graph.op("Reshape", t.value(node.inputs[0]), shape, name=f"{name}.heads")
    normed = graph.op("RMSNormalization", heads, t.stored(tensor_of(gain)), name=f"{name}.normed", axis=-1,
                      epsilon=attributes["epsilon"])  # fmt: skip
    t.values[node.outputs[0]] = graph.op("Reshape", normed, graph.constant("rows.flat", [0, 0, -1], "int64"), name=name)


def add_norm(t: Translation, node: ir.Node, attributes: Attributes) -> None:
    x, r, gain, bias = t.value(node.inputs[0]), t.value(node.inputs[1]), operand(node, Role.GAIN), operand(node, Role.BIAS)
    assert gain is not None
    op = {"rms": "SkipSimplifiedLayerNormalization", "layer": "SkipLayerNormalization"}[attributes["kind"]]
    vectors = [t.stored(tensor_of(value)) for value in (gain, bias) if value is not None]
    total, normed = node.outputs
    names = [str(normed.name), "", "", str(total.name)]  # ONNX Runtime can also give the mean and the deviation
    outputs = t.graph.ops(op, x, r, *vectors, outputs=names, domain=MICROSOFT, epsilon=attributes["epsilon"])
    t.values |= {normed: outputs[0], total: outputs[3]}


def gelu(t: Translation, node: ir.Node, attributes: Attributes) -> None:
    t.values[node.outputs[0]] = t.graph.op("Gelu", t.value(node.inputs[0]), name=str(node.outputs[0].name), approximate="tanh")


def swiglu(t: Translation, node: ir.Node, attributes: Attributes) -> None:
    gate, up = (t.value(value) for value in node.inputs)
    name = str(node.outputs[0].name)
    silu = t.graph.op("QuickGelu", gate, name=f"{name}.silu", domain=MICROSOFT, alpha=1.0)
    t.values[node.outputs[0]] = t.graph.op("Mul", silu, up, name=name)


def block_hadamard(t: Translation, node: ir.Node, attributes: Attributes) -> None:
    """Two products with small Hadamard matrices, since H_ab is the Kronecker product of H_a and H_b: a + b products a channel
    in place of a * b. Both have at least two rows at any number of tokens, because ONNX Runtime adds in another order in
    products of a single row with a matrix that is not constant. The signs are multiplied with first, unless a linear did."""
    x, name, block = node.inputs[0], str(node.outputs[0].name), attributes["block"]
    width = width_of(x)
    outer = 1 << (block.bit_length() - 1) // 2
    inner = block // outer
    graph = t.graph
    signed = t.value(x)
    if x not in t.signed:
        signs = graph.constant(f"hadamard.signs.{width}.{block}", np.tile(golay_signs(block), width // block), t.floats)
        signed = graph.op("Mul", signed, signs, name=f"{name}.signed")
    shape = graph.constant(f"hadamard.shape.{width}.{block}", [0, 0, width // block, outer, inner], "int64")
    blocks = graph.op("Reshape", signed, shape, name=f"{name}.blocks")
    second = graph.constant(f"hadamard.{inner}", hadamard(inner), t.floats)
    half = graph.op("MatMul", blocks, second, name=f"{name}.half")
    first = graph.constant(f"hadamard.{outer}.{block}", hadamard(outer) * np.float32(block**-0.5), t.floats)
    whole = graph.op("MatMul", first, half, name=f"{name}.whole")
    t.values[node.outputs[0]] = graph.op("Reshape", whole, graph.constant("rows.flat", [0, 0, -1], "int64"), name=name)


def hadamard(size: int) -> Array:
    """The Hadamard matrix of +1 and -1 in natural order; `size` is a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def quantize_tokens(t: RuntimeTranslation, node: ir.Node, attributes: Attributes) -> None:
    """x / absmax * limit, rounded half to even. A row of zeros may get any integers, since its scale is 0."""
    name, x, step, bits = str(node.name), t.value(node.inputs[0]), operand(node, Role.STEP), attributes["bits"]
    limit, graph = LIMITS[bits], t.graph
    xq, xs = node.outputs
    if step is not None:
        known = tensor_of(step)
        inverse = graph.weight(
            StoredTensor(f"{step.name}.inverse", "float32", (1,), lambda: np.float32(1) / known.numpy(), str(step.name))
        )
        scaled = graph.op("Mul", x, inverse, name=f"{name}.scaled")
        bounds = t.number(f"limit.-{limit}", -limit), t.number(f"limit.{limit}", limit)
        scaled, steps = graph.op("Clip", scaled, *bounds, name=f"{name}.clipped"), 1
        t.scales[xs] = TokenScale(None, lambda: float(known.numpy()[0]), str(step.name))
    else:
        magnitudes = graph.op("Abs", x, name=f"{name}.abs")
        absmax = graph.op("ReduceMax", magnitudes, graph.constant("last_axis", [-1], "int64"), name=f"{name}.absmax")
        scaled, steps = graph.op("Div", x, absmax, name=f"{name}.shares"), limit
        t.scales[xs] = TokenScale(absmax, lambda: 1 / limit, f"1/{limit}")
    if bits == 8:
        t.values[xq] = t.kernels.integers(graph, scaled, str(xq.name), steps)
    else:
        t.planes[xq] = _planes(t, scaled, str(xq.name), steps)


def _planes(t: RuntimeTranslation, x: ir.Value, name: str, steps: int) -> Planes:
    """The 16 bits of x * steps as 256 * high + low: high is rounded so that low lies from -128 to 127."""
    graph = t.graph
    scaled = x if steps == 1 else graph.op("Mul", x, t.number(f"limit.{steps}", steps), name=f"{name}.scaled")
    integers = graph.op("Round", scaled, name=f"{name}.integers")
    shifted = graph.op("Add", integers, t.number("half_high", HIGH / 2), name=f"{name}.shifted")
    parts = graph.op("Mul", shifted, t.number("inverse_high", 1 / HIGH), name=f"{name}.parts")
    high = graph.op("Floor", parts, name=f"{name}.high")
    whole = graph.op("Mul", high, t.number("high", HIGH), name=f"{name}.whole")
    low = graph.op("Sub", integers, whole, name=f"{name}.low")
    parts_of_bytes = (t.kernels.integers(graph, part, f"{part.name}.bytes") for part in (high, low))
    return Planes(*parts_of_bytes)


def linear(t: RuntimeTranslation, node: ir.Node, attributes: Attributes) -> None:
    """x @ weight + bias, of floats as weights are stored."""
    weight, bias, stored = operand(node, Role.WEIGHT), operand(node, Role.BIAS), t.kernels.weight_floats
    x = t.cast(t.value(node.inputs[0]), stored, f"{node.name}.x.{stored}")

    def part(tensors: _Tensors, name: str) -> ir.Value:
        whole = name if tensors.bias is None else f"{name}.product"
        product = t.graph.op(
            "MatMul", x, t.matrix(tensors.weight, stored), name=whole if stored == "float32" else f"{name}.{stored}"
        )
        return _with_bias(t, t.cast(product, "float32", whole, of=stored), tensors.bias, name)

    _each_part(t, node, _Tensors(tensor_of(weight), None, None if bias is None else tensor_of(bias)), part)


def quantized_linear(t: RuntimeTranslation, node: ir.Node, attributes: Attributes) -> None:
    """The exact integer product times the weight's scales, then times the token's, plus the bias."""
    xq, weight, scale, bias = node.inputs[0], operand(node, Role.WEIGHT), operand(node, Role.SCALE), operand(node, Role.BIAS)
    token_scale = operand(node, Role.TOKEN_SCALE)
    assert xq is not None and token_scale is not None
    scales = t.scales[token_scale]

    def part(tensors: _Tensors, name: str) -> ir.Value:
        bare = tensors.bias is None
        if xq in t.planes:
            planes = t.planes[xq]
            high = _product(t, planes.high, tensors, scales, f"{name}.high", HIGH)
            low = _product(t, planes.low, tensors, scales, f"{name}.low")
            last = bare and scales.rows is None
            product = t.graph.op("Add", high, low, name=name if last else f"{name}.product")
        else:
            product = _product(t, t.value(xq), tensors, scales, name if bare and scales.rows is None else f"{name}.product")
        if scales.rows is not None:
            product = t.graph.op("Mul", product, scales.rows, name=name if bare else f"{name}.scaled")
        return _with_bias(t, product, tensors.bias, name)

    signs = _signs_of_rotation(t, node.outputs[0]) if bias is None and t.kernels.signs_in_scales else None
    tensors = _Tensors(tensor_of(weight), tensor_of(scale), None if bias is None else tensor_of(bias), signs)
    _each_part(t, node, tensors, part)


def _signs_of_rotation(t: RuntimeTranslation, output: ir.Value) -> Array | None:
    """float32: the signs by which a BlockHadamard multiplies the outputs of a linear, 1 for outputs without; None if there are
    none. Only SwiGLU's product of gate and up lies between, which takes over a sign of up. They are noted as done."""
    readers = output.uses()
    if len(readers) != 1:
        return None
    ((reader, index),) = readers
    if reader.op_type == "Split":
        parts = [_signs_of_rotation(t, value) for value in reader.outputs]
        if all(part is None for part in parts):
            return None
        filled = (np.ones(width_of(v), np.float32) if p is None else p for v, p in zip(reader.outputs, parts, strict=True))
        return np.concatenate(list(filled))
    product = reader.outputs[0]
    if (reader.op_type, index) != ("SwiGLU", 1) or [user.op_type for user, _ in product.uses()] != ["BlockHadamard"]:
        return None
    ((rotation, _),) = product.uses()
    block = attributes_of(rotation)["block"]
    t.signed.add(product)
    return np.tile(golay_signs(block), width_of(product) // block)


class _Tensors:
    """The constants of a linear, or of some of its outputs; `signs` are multiplied with the scales."""

    def __init__(
        self,
        weight: ir.TensorProtocol,
        scale: ir.TensorProtocol | None,
        bias: ir.TensorProtocol | None,
        signs: Array | None = None,
    ) -> None:
        self.weight, self.scale, self.bias, self.signs = weight, scale, bias, signs

    def rows(self, start: int, stop: int) -> _Tensors:
        """The constants of the outputs start..stop."""
        scale, bias = (tensor and rows_of(tensor, start, stop) for tensor in (self.scale, self.bias))
        signs = None if self.signs is None else self.signs[start:stop]
        return _Tensors(rows_of(self.weight, start, stop), scale, bias, signs)


def rows_of(tensor: ir.TensorProtocol, start: int, stop: int) -> ir.TensorProtocol:
    for piece in pieces_of(tensor):
        if piece.at == start and piece.ranges == ((0, stop - start),) and piece.axis == 0:
            return piece.tensor
    return part_of(tensor, [(start, stop)], 0, f"{tensor.name}.{start}")


def _each_part(t: RuntimeTranslation, node: ir.Node, tensors: _Tensors, part: Callable[[_Tensors, str], ir.Value]) -> None:
    """Translate a linear. If a Split alone reads it, each part becomes a linear of its own, because ONNX Runtime would copy
    the parts; but not q, k and v, which attention takes as one value, and no small parts."""
    output = node.outputs[0]
    readers = [user for user, _ in output.uses()]
    if len(readers) == 1 and readers[0].op_type == "Split":
        (splitter,) = readers
        together = qkv_reader(splitter) is not None
        if not together and tensors.weight.size < SMALL * len(splitter.outputs):
            t.values[output] = part(tensors, str(output.name))
            return
        t.skipped.add(splitter)
        if not together:
            start = 0
            for value in splitter.outputs:
                stop = start + width_of(value)
                t.values[value] = part(tensors.rows(start, stop), str(value.name))
                start = stop
            return
        t.values[splitter.outputs[0]] = part(tensors, str(node.name))
        return
    t.values[output] = part(tensors, str(output.name))


def _product(
    t: RuntimeTranslation, integers: ir.Value, tensors: _Tensors, scales: TokenScale, name: str, unit: int = 1
) -> ir.Value:
    """integers @ weight times the scales of its outputs, which take up the constant part of the activations' scales."""
    assert tensors.scale is not None
    source = str(tensors.weight.name)
    factor = partial(_times, tensors.scale, scales.factor, unit, tensors.signs)
    label = f"{source}.scale*{scales.name}" + (f"*{unit}" if unit > 1 else "") + ("" if tensors.signs is None else "*signs")
    outputs = tensors.weight.shape.numpy()[0]
    scale = t.graph.weight(StoredTensor(label, "float32", (outputs,), factor, source))
    return t.kernels.integer_product(t.graph, integers, t.matrix(tensors.weight, "int8"), scale, outputs, name)


def _times(scale: ir.TensorProtocol, factor: Callable[[], float], unit: int, signs: Array | None) -> Array:
    product: Array = (scale.numpy().astype(np.float64) * (factor() * unit)).astype(np.float32)
    return product if signs is None else product * signs


def _with_bias(t: Translation, product: ir.Value, bias: ir.TensorProtocol | None, name: str) -> ir.Value:
    if bias is None:
        return product
    return t.graph.op("Add", product, t.stored(bias), name=name)


RULES: dict[str, Rule] = {
    "Gather": gather,
    "Split": split,
    "Add": add,
    "Gemm": linear,
    "LayerNormalization": layer_norm,
    "RMSNormalization": layer_norm,
    "HeadNorm": head_norm,
    "AddNorm": add_norm,
    "Gelu": gelu,
    "SwiGLU": swiglu,
    "BlockHadamard": block_hadamard,
    "QuantizeTokens": quantize_tokens,
    "QuantizedEmbedding": quantized_embedding,
    "QuantizedLinear": quantized_linear,
    "RotaryTable": rotary_table,
    "Attention": attention,
}
