"""What a graph's module is made of beside its trace: weights, facts, and the memory that it takes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from math import prod

import numpy as np
import onnx_ir as ir

from belle_compile.compiler.backends.base import FIXED_BYTES, PROCESS_BYTES, Array, Footprint, KVCache, tensor_bytes
from belle_compile.compiler.backends.weights_header import weights_header
from belle_compile.compiler.ir.ops import operand, spec_of
from belle_compile.compiler.ir.signature import Role, dtype_name
from belle_compile.compiler.kv_types import AUTO
from belle_compile.runtime.executors.torchscript_model import (
    STEP_ROWS,
    STEP_TOKENS,
    ModelFacts,
    StoredWeight,
    kv_block_bytes,
    query_tile,
)
from belle_compile.runtime.executors.torchscript_plan import GATHERED_BYTES, padded_keys
from belle_compile.runtime.program import ALIGNMENT, BLOCK_SIZE
from belle_compile.runtime.schema import canonical_json, to_plain

_TORCH_BYTES = 256 << 20  # host memory of PyTorch's libraries
_VALUES_KEPT = 6  # results of one layer, as wide as its widest, that are alive at the same time
_FACTS = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "max_position", "vocab_size")


@dataclass(frozen=True)
class FlatTensor:
    """A weight as one row, padded to whole cache lines."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pack: Callable[[], Array]


@dataclass(frozen=True)
class ModuleWeight:
    """A weight that a node reads, and the module's attributes that it becomes, as in `StoredWeight`."""

    name: str
    tensor: ir.TensorProtocol
    attribute: str
    packed: str


def module_weights(graph: ir.Model) -> list[ModuleWeight]:
    """The weights that nodes read; the sizes of Split are constants of the trace."""
    found = []
    for name, value in graph.graph.initializers.items():
        if value.uses() and value.dtype != ir.DataType.INT64:
            assert value.const_value is not None, "verified"
            packing = [is_packed(node) and operand(node, Role.WEIGHT) is value for node in value.consumers()]
            plain, identifier = not all(packing), re.sub(r"\W", "_", name)
            found.append(
                ModuleWeight(
                    name,
                    value.const_value,
                    f"weight_{identifier}" if plain else "",
                    f"packed_{identifier}" if any(packing) else "",
                )
            )
    names = [attribute for weight in found for attribute in (weight.attribute, weight.packed) if attribute]
    assert len(set(names)) == len(names), "names that differ in punctuation alone"
    return found


def is_packed(node: ir.Node) -> bool:
    """Whether a node multiplies int8 activations by a weight that is packed when the module is loaded. Activations of 16 bits
    need the integers of their products, which PyTorch gives for plain weights only."""
    return node.op_type == "QuantizedLinear" and node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.INT8


def stored_weights(graph: ir.Model) -> list[FlatTensor]:
    """The tensors of weights.safetensors."""
    return [_flat(weight.name, weight.tensor) for weight in module_weights(graph)]


def unpack(packed: Array, shape: tuple[int, ...]) -> Array:
    """The tensor of that shape that a row of the file holds."""
    return packed[: prod(shape)].reshape(shape)


def graph_tile(graph: ir.Model) -> int:
    """The positions of a tile of attention."""
    facts = graph.metadata_props
    return query_tile(int(facts["num_heads"]) // int(facts["num_kv_heads"]))


def facts_text(graph: ir.Model, kv_dtype: str) -> str:
    """The facts about a graph's module, as JSON."""
    facts = ModelFacts(
        torch=version("torch"),
        **{name: int(graph.metadata_props[name]) for name in _FACTS},
        kv_dtype=kv_dtype,
        tile=graph_tile(graph),
        weights_header=hashlib.sha256(weights_header(stored_weights(graph))).hexdigest(),
        weights={
            weight.name: StoredWeight(
                weight.attribute, weight.packed, dtype_name(weight.tensor.dtype), tuple(weight.tensor.shape.numpy())
            )
            for weight in module_weights(graph)
        },
    )
    return canonical_json(to_plain(facts))


def footprint(graph: ir.Model, kv_cache: str) -> Footprint:
    """The memory of a graph's module. "auto" is a KV cache of bfloat16 where the graph has quantized linears, else float32."""
    facts = {name: int(graph.metadata_props[name]) for name in _FACTS}
    specs = [spec_of(node) for node in graph.graph]
    quantized = any(spec.is_linear and not spec.is_float_linear for spec in specs)
    dtype = kv_cache if kv_cache != AUTO else "bfloat16" if quantized else "float32"
    block = kv_block_bytes(facts["num_layers"], facts["num_kv_heads"], facts["head_dim"], dtype)
    return Footprint(
        weights=sum(map(tensor_bytes, stored_weights(graph))),
        activations=_activation_bytes(graph, facts),
        reserve=FIXED_BYTES + PROCESS_BYTES + _TORCH_BYTES,
        kv=KVCache(dtype, block, BLOCK_SIZE, facts["max_position"]),
    )


def _activation_bytes(graph: ir.Model, facts: dict[str, int]) -> int:
    """An estimate of what PyTorch allocates in the largest step: some results of the widest layer, masks for all keys, the
    keys and values of a group, and logits."""
    widest = max(_width(value) for node in graph.graph for value in node.outputs if not value.is_graph_output())
    keys = padded_keys(facts["max_position"])
    slopes = any(operand(node, Role.SLOPE) is not None for node in graph.graph)
    masked_heads = facts["num_heads"] if slopes else facts["num_heads"] // facts["num_kv_heads"]
    gathered = max(GATHERED_BYTES, 4 * keys * facts["num_kv_heads"] * facts["head_dim"])
    rows = STEP_TOKENS * (_VALUES_KEPT * widest + 2 * masked_heads * keys) + 2 * STEP_ROWS * facts["vocab_size"]
    return 4 * rows + 3 * gathered


def _width(value: ir.Value) -> int:
    """The last dimension of a value; 1 for a number per row."""
    width = value.shape[-1] if value.shape is not None else None
    return width if isinstance(width, int) else 1


def _flat(name: str, tensor: ir.TensorProtocol) -> FlatTensor:
    dtype = dtype_name(tensor.dtype)
    size, items = prod(tensor.shape.numpy()), ALIGNMENT // np.dtype(dtype).itemsize

    def pack() -> Array:
        padded = np.zeros(-(-size // items) * items, dtype)
        padded[:size] = tensor.numpy().reshape(-1)
        return padded

    return FlatTensor(name, dtype, (-(-size // items) * items,), pack)
