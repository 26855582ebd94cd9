"""A rank's graph as a torch.nn.Module, and its trace as the file that libtorch loads.

torch.jit is deprecated. So the module is the smallest thing around the graph: it calls the functions of ops.py and scripted.py
node by node, and holds nothing else. What follows torch.jit, such as torch.export, can take the same module.
"""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch

from belle_compile.compiler.backends.torchscript import ops, scripted
from belle_compile.compiler.backends.torchscript.weights import graph_tile, is_packed, module_weights
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.ops import attributes_of, operand, spec_of
from belle_compile.compiler.ir.signature import Role, dtype_name
from belle_compile.runtime.executors.torchscript_model import FACTS_NAME
from belle_compile.runtime.program import BLOCK_SIZE

Tensor = torch.Tensor

INPUTS = (
    "token_ids", "positions", "logit_rows", "slots", "lengths", "cells", "cell_positions", "cell_of", "groups", "blocks",
    "keys", "values", "key_scales", "value_scales",
)  # fmt: skip
_DEBUGGING = (".debug_pkl", ".data/serialization_id")  # members with paths of sources, and a digest of these
_MANGLED = re.compile(rb"[./]___torch_mangle_\d+")  # part of the name of a type that the process has traced before


class GraphModule(torch.nn.Module):
    """The graph of one rank. Its weights are buffers; a module file holds empty ones, which the executor replaces.

    `forward` takes the inputs that `INPUTS` names: int64 token_ids and positions [T] and logit_rows [R]; the plan of attention
    (runtime/executors/torchscript_plan.py); and the KV cache, which it writes to: keys and values [layers, blocks, tokens,
    heads, head_dim], with scales [layers, blocks, tokens, heads] if it is int8. It returns float32 logits [R, vocabulary].
    """

    def __init__(self, graph: ir.Model) -> None:
        super().__init__()
        self._nodes = list(graph.graph)
        self._output = graph.graph.outputs[0]
        self._tile = graph_tile(graph)
        self._weights = {weight.name: weight for weight in module_weights(graph)}
        for weight in self._weights.values():
            zero = torch.zeros((), dtype=getattr(torch, dtype_name(weight.tensor.dtype)))
            zeros = zero.expand(tuple(weight.tensor.shape.numpy()))  # takes no memory
            if weight.attribute:
                self.register_buffer(weight.attribute, zeros)
            if weight.packed:
                self.register_buffer(weight.packed, torch.ops.onednn.qlinear_prepack(zeros.contiguous(), None))

    def forward(self, *inputs: Tensor) -> Tensor:
        step = dict(zip(INPUTS, inputs, strict=True))
        values: dict[ir.Value, Any] = {}
        masks: dict[ir.Value | None, Tensor] = {}
        for node in self._nodes:
            result = self._run(node, step, values, masks)
            results = result if isinstance(result, tuple) else (result,)
            values.update(zip(node.outputs, results, strict=True))
        logits: Tensor = values[self._output]
        return logits

    def _run(
        self,
        node: ir.Node,
        step: Mapping[str, Tensor],
        values: Mapping[ir.Value, Any],
        masks: dict[ir.Value | None, Tensor],
    ) -> Any:
        spec = spec_of(node)
        options = {name: value for name, value in attributes_of(node).items() if name in spec.meaningful}
        if node.op_type == "Split":
            x, sizes = node.inputs
            assert x is not None and sizes is not None and sizes.const_value is not None, "verified"
            return torch.split(values[x], sizes.const_value.numpy().tolist(), dim=-1)
        if node.op_type == "RotaryTable":
            frequencies = self._value(operand(node, Role.FREQUENCY), step, values)
            return ops.rotary_table(step["positions"], step["lengths"], frequencies, **options)
        if node.op_type == "Attention":
            return self._attention(node, options, step, values, masks)
        if is_packed(node):
            xq, xs, weight, ws, bias = (value for _, value in spec.operands(node))
            assert xq is not None and weight is not None, "verified"
            packed = getattr(self, self._weights[str(weight.name)].packed)
            given = (self._value(value, step, values) for value in (xs, ws, bias))
            return ops.packed_linear(values[xq], packed, *given)
        function = ops.OPS.get(node.op_type)
        if function is None:
            what, expected = f"op {node.op_type}", ", ".join(sorted(SUPPORTED))
            raise CompileError("torchscript", what, node=str(node.name), found="no meaning in torch", expected=expected)
        return function(*(self._value(value, step, values) for _, value in spec.operands(node)), **options)

    def _value(self, value: ir.Value | None, step: Mapping[str, Tensor], values: Mapping[ir.Value, Any]) -> Any:
        """A node's input: a result, a weight or an input of the graph; None for one left out."""
        if value is None:
            return None
        if value.is_initializer():
            return getattr(self, self._weights[str(value.name)].attribute)
        return step[str(value.name)] if value.is_graph_input() else values[value]

    def _attention(
        self,
        node: ir.Node,
        options: Mapping[str, Any],
        step: Mapping[str, Tensor],
        values: Mapping[ir.Value, Any],
        masks: dict[ir.Value | None, Tensor],
    ) -> Tensor:
        """Append keys and values to the pools of the layer, then attend; layers with the same slopes share their masks."""
        layer, head_dim, heads, kv_heads = (options[name] for name in ("layer", "head_dim", "num_heads", "num_kv_heads"))
        q, k, v = (self._value(value, step, values).view(-1, count, head_dim)
                   for value, count in zip(node.inputs[:3], (heads, kv_heads, kv_heads), strict=True))  # fmt: skip
        if (table := operand(node, Role.ROTARY)) is not None:
            cos_sin = values[table]
            q, k = ops.rotate(q, cos_sin), ops.rotate(k, cos_sin)
        keys, stored, *scales = (step[name].select(0, layer) for name in ("keys", "values", "key_scales", "value_scales"))
        keys = scripted.append(keys, scales[0], step["slots"], k)
        stored = scripted.append(stored, scales[1], step["slots"], v)
        slopes = operand(node, Role.SLOPE)
        if slopes not in masks:
            found = self._value(slopes, step, values)
            masks[slopes] = scripted.masks(
                step["cell_positions"], step["groups"], found, kv_heads, heads // kv_heads, self._tile
            )
        attended: Tensor = scripted.attend(
            q, keys, stored, *scales, *(step[name] for name in ("cells", "cell_of", "groups", "blocks")), masks[slopes],
            1 if slopes is None else kv_heads, self._tile, options["scale"],
        )  # fmt: skip
        return attended


SUPPORTED = frozenset({*ops.OPS, "Split", "RotaryTable", "Attention"})


def trace(graph: ir.Model, facts: str) -> bytes:
    """The traced module of a graph as an archive that libtorch loads, with its facts as an extra file. The same graph gives the
    same bytes. Raises CompileError for an op that has no meaning in torch."""
    module = GraphModule(graph).eval()
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, see above
        traced: Any = torch.jit.trace(  # type: ignore[no-untyped-call]
            module, _example(graph), check_trace=False, _store_inputs=False
        )
        for attribute, _ in module.named_buffers():
            setattr(traced, attribute, torch.empty(0))
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer, _extra_files={FACTS_NAME: facts})
    return _normalized(buffer.getvalue())


def _example(graph: ir.Model) -> tuple[Tensor, ...]:
    """Inputs of a step of two tokens of one sequence."""
    facts = graph.metadata_props
    layers, kv_heads, head_dim = (int(facts[key]) for key in ("num_layers", "num_kv_heads", "head_dim"))
    pool, numbers = torch.zeros(layers, 1, BLOCK_SIZE, kv_heads, head_dim), torch.arange(2)
    scales = torch.zeros(layers, 1, BLOCK_SIZE, kv_heads)
    tile = graph_tile(graph)
    tiles = -(-2 // tile)
    cells = torch.arange(tiles * tile)
    step = {
        "token_ids": torch.zeros(2, dtype=torch.int64), "positions": numbers, "logit_rows": numbers[:1], "slots": numbers,
        "lengths": numbers + 1, "cells": cells.clamp(max=1), "cell_positions": cells, "cell_of": numbers,
        "groups": torch.tensor([[tiles, 1, BLOCK_SIZE]]), "blocks": torch.zeros(1, dtype=torch.int64),
        "keys": pool, "values": pool.clone(), "key_scales": scales, "value_scales": scales.clone(),
    }  # fmt: skip
    return tuple(step[name] for name in INPUTS)


def _normalized(archive: bytes) -> bytes:
    """The archive without what depends on where and when it was made. Names in pickles end with a newline, so that they can be
    shortened."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(result, "w") as target:
        for name in source.namelist():
            if not name.endswith(_DEBUGGING):
                content, (_, _, member) = source.read(name), name.partition("/")
                if member.startswith(("code/", "data.pkl")):
                    content, member = _MANGLED.sub(b"", content), _MANGLED.sub(b"", member.encode()).decode()
                target.writestr(zipfile.ZipInfo(f"model/{member}"), content)
    return result.getvalue()
