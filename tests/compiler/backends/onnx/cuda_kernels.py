"""The kernels of ONNX Runtime's CUDA provider for the ops of our models, and which nodes of a model have none.

The rows are those of docs/OperatorKernels.md in ONNX Runtime's repository, section CUDAExecutionProvider. They were compared
with onnxruntime-gpu 1.31.0: its provider was asked to place models with `session.disable_cpu_ep_fallback`, and took every node.
Each row has the version that an op has in the opset of our models: a kernel for another one is of no use to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx

F32, F16, I8, U8, I32, I64, BOOL = "float32", "float16", "int8", "uint8", "int32", "int64", "bool"
_NAMES = {1: F32, 2: U8, 3: I8, 6: I32, 7: I64, 9: BOOL, 10: F16}  # by number in ONNX
_FLOATS = frozenset({F32, F16})
_NUMBERS = _FLOATS | {I32, I64}
_ALL = _NUMBERS | {I8, U8, BOOL}
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Kernel:
    """A kernel for one version of an op, for operands of some types; `operand` is the one whose type decides. The result has
    this type, or the type `result`."""

    version: int
    types: frozenset[str]
    operand: int = 0
    result: str = ""


KERNELS: dict[tuple[str, str], Kernel] = {
    ("", "Abs"): Kernel(13, _NUMBERS | {I8, U8}),
    ("", "Add"): Kernel(14, _NUMBERS),
    ("", "Cast"): Kernel(23, _ALL),
    ("", "Clip"): Kernel(13, _FLOATS | {I64, I8, U8}),
    ("", "Cos"): Kernel(22, _FLOATS),
    ("", "Div"): Kernel(14, _NUMBERS | {I8, U8}),
    ("", "Floor"): Kernel(13, _FLOATS),
    ("", "Gather"): Kernel(13, _ALL),
    ("", "Gelu"): Kernel(20, _FLOATS),
    ("", "Greater"): Kernel(13, _NUMBERS, result=BOOL),
    ("", "LayerNormalization"): Kernel(17, _FLOATS),
    ("", "MatMul"): Kernel(13, _FLOATS),
    ("", "MatMulInteger"): Kernel(10, frozenset({I8}), result=I32),
    ("", "Max"): Kernel(13, _NUMBERS),
    ("", "Mul"): Kernel(14, _NUMBERS | {I8, U8}),
    ("", "Pad"): Kernel(23, _FLOATS | {BOOL}),
    ("", "Pow"): Kernel(15, _NUMBERS),
    ("", "QuantizeLinear"): Kernel(23, _FLOATS),
    ("", "RMSNormalization"): Kernel(23, _FLOATS),
    ("", "Reciprocal"): Kernel(13, _FLOATS),
    ("", "ReduceMax"): Kernel(20, _NUMBERS | {I8, U8}),
    ("", "Reshape"): Kernel(23, _ALL),
    ("", "RotaryEmbedding"): Kernel(23, _FLOATS),
    ("", "Round"): Kernel(22, _FLOATS),
    ("", "Sin"): Kernel(22, _FLOATS),
    ("", "Slice"): Kernel(13, _ALL),
    ("", "Split"): Kernel(18, _ALL),
    ("", "Sub"): Kernel(14, _NUMBERS | {I8, U8}),
    ("", "Transpose"): Kernel(23, _ALL),
    ("", "Unsqueeze"): Kernel(23, _ALL),
    ("", "Where"): Kernel(16, _NUMBERS | {U8}, operand=1),
    (MICROSOFT, "GroupQueryAttention"): Kernel(1, frozenset({F16})),
    (MICROSOFT, "QuickGelu"): Kernel(1, _FLOATS),
    (MICROSOFT, "SkipLayerNormalization"): Kernel(1, _FLOATS),
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): Kernel(1, _FLOATS),
}


def without_kernel(path: Path) -> list[str]:
    """The nodes of a model that the CUDA provider would leave to the CPU: name, op, its version and type."""
    graph, opsets = _read(path)
    types = {entry.name: _NAMES[entry.type.tensor_type.elem_type] for entry in graph.input}
    types |= {entry.name: _NAMES[entry.data_type] for entry in graph.initializer}
    return list(_unplaced(graph, opsets, types))


def _read(path: Path) -> tuple[onnx.GraphProto, dict[str, int]]:
    model = onnx.load(path, load_external_data=False)
    return model.graph, {entry.domain: entry.version for entry in model.opset_import}


def _unplaced(graph: onnx.GraphProto, opsets: dict[str, int], types: dict[str, str]) -> Iterator[str]:
    for node in graph.node:
        version = 1 if node.domain else onnx.defs.get_schema(node.op_type, opsets[""]).since_version
        kernel = KERNELS.get((node.domain, node.op_type))
        found = types[node.input[kernel.operand if kernel else 0]]
        if kernel is None or kernel.version != version or found not in kernel.types:
            yield f"{node.name}: {node.op_type} {version} of {found}"
        result = kernel.result if kernel and kernel.result else found
        if node.op_type == "Cast":
            result = _NAMES[next(attribute.i for attribute in node.attribute if attribute.name == "to")]
        if node.op_type == "QuantizeLinear":
            result = types[node.input[2]]
        types |= dict.fromkeys(node.output, result)
