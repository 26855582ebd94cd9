"""A graph as text, stable and readable, for golden tests and --dump-ir; and as ONNX without weights, for Netron."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from belle_compile.compiler.ir import ops
from belle_compile.compiler.ir.signature import TensorSpec
from belle_compile.compiler.ir.verify import verify

_EXACT = "exact "  # prefix of the metadata key, followed by an attribute's name, that keeps a float with all of its 64 bits
_INLINE = 16  # int64 initializers with at most this many elements are printed with their values


def to_text(model: ir.Model) -> str:
    """One line for each input, weight and node, in graph order, without attributes that equal their default. What passes noted
    about a node for later ones is a comment.

    Example::

        graph bloom {family: bloom}
          input token_ids: int32[T]
          weight h.0.qkv.weight: float32[96, 32]
          h.0.qkv = Gemm(h.0.norm, h.0.qkv.weight, -) {transB=1}: float32[T, 96]
          output logits
    """
    facts = ", ".join(f"{key}: {model.metadata_props[key]}" for key in sorted(model.metadata_props))
    lines = [f"graph {model.graph.name}" + (f" {{{facts}}}" if facts else "")]
    lines += [f"  input {value.name}: {TensorSpec.of(value)}" for value in model.graph.inputs]
    lines += [f"  weight {_weight(value)}" for value in model.graph.initializers.values()]
    lines += [f"  {_node(node)}" for node in model.graph]
    lines += [f"  output {value.name}" for value in model.graph.outputs]
    return "\n".join(lines) + "\n"


def to_onnx(model: ir.Model) -> bytes:
    """The graph as an ONNX file that opens in Netron: weights have names and shapes, but no values."""
    graph = model.clone()
    for value in graph.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        if tensor.dtype == ir.DataType.INT64:
            continue  # the sizes of Split
        shape = ir.Shape(tensor.shape.numpy())
        value.const_value = ir.ExternalTensor(
            "weights-left-out", offset=0, length=tensor.nbytes, dtype=tensor.dtype, shape=shape, name=str(value.name)
        )
    for node in graph.graph:
        for name, attribute in node.attributes.items():
            if isinstance(attribute.value, float):  # ONNX stores 32 bits, but names of kernels depend on all 64
                node.metadata_props[_EXACT + name] = repr(attribute.value)
    content: bytes = ir.to_proto(graph).SerializeToString(deterministic=True)
    return content


def from_onnx(content: bytes, weight: Callable[[str, Sequence[int], ir.DataType], ir.TensorProtocol]) -> ir.Model:
    """Read and verify the graph of a file that `to_onnx` made; `weight(name, shape, dtype)` makes each initializer's tensor."""
    model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(content))
    for name, value in model.graph.initializers.items():
        if isinstance(tensor := value.const_value, ir.ExternalTensor):
            value.const_value = weight(name, tensor.shape.numpy(), tensor.dtype)
    for node in model.graph:
        for key in [key for key in node.metadata_props if key.startswith(_EXACT)]:
            name = key.removeprefix(_EXACT)
            node.attributes[name] = ir.AttrFloat32(name, float(node.metadata_props.pop(key)))
    verify(model)
    return model


def save_onnx(model: ir.Model, path: Path) -> None:
    """Write the file that `to_onnx` makes."""
    path.write_bytes(to_onnx(model))


def _weight(value: ir.Value) -> str:
    text = f"{value.name}: {TensorSpec.of(value)}"
    tensor = value.const_value
    if tensor is not None and tensor.dtype == ir.DataType.INT64 and tensor.size <= _INLINE:
        text += f" = {tensor.numpy().tolist()}"
    return text


def _node(node: ir.Node) -> str:
    spec = ops.spec_of(node)
    given = ", ".join("-" if value is None else str(value.name) for value in node.inputs)
    attributes = {name: value for name, value in ops.attributes_of(node).items() if value != spec.attributes[name].default}
    braces = f" {{{', '.join(f'{name}={value}' for name, value in attributes.items())}}}" if attributes else ""
    results = ", ".join(str(value.name) for value in node.outputs)
    types = ", ".join(str(TensorSpec.of(value)) for value in node.outputs)
    named = all(f"{value.name}.".startswith(f"{node.name}.") for value in node.outputs)
    notes = ([] if named else [str(node.name)]) + [f"{key}: {node.metadata_props[key]}" for key in sorted(node.metadata_props)]
    comment = f"  # {', '.join(notes)}" if notes else ""
    return f"{results} = {f'{spec.domain}::' if spec.domain else ''}{node.op_type}({given}){braces}: {types}{comment}"
