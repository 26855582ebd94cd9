"""A graph as text: stable and readable, for golden tests and --dump-ir; and as ONNX without weights, for Netron."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from compiler.ir import ops
from compiler.ir.signature import TensorSpec

_INLINE = 16  # initializers of up to this many int64 elements are printed with their values


def to_text(model: ir.Model) -> str:
    """One line per input, weight and node, in graph order; attributes that equal their default are left out.

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


def save_onnx(model: ir.Model, path: Path) -> None:
    """Write the graph as an ONNX file that opens in Netron: weights are named and shaped, their values left out."""
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
    path.write_bytes(ir.to_proto(graph).SerializeToString(deterministic=True))


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
    called = "" if named else f"  # {node.name}"
    return f"{results} = {f'{spec.domain}::' if spec.domain else ''}{node.op_type}({given}){braces}: {types}{called}"
