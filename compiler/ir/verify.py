"""Checks that a graph is valid for this compiler: after the frontend, and after every pass."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir import ops
from belle_compile.compiler.ir.signature import TensorSpec

_INT32 = ir.DataType.INT32

INTERFACE: Mapping[str, TensorSpec] = {
    "token_ids": TensorSpec(_INT32, ("T",)),
    "positions": TensorSpec(_INT32, ("T",)),  # the token's position in its sequence, from 0
    "sequences": TensorSpec(_INT32, ("T",)),  # the token's row of block_table
    "block_table": TensorSpec(_INT32, ("B", "MB")),  # physical block of each logical block of 16 tokens
    "logit_rows": TensorSpec(_INT32, ("R",)),  # indices of the tokens whose logits are requested
}


def verify(model: ir.Model) -> None:
    """Raise a CompileError that names the node, unless the graph is valid.

    Its inputs must be those of INTERFACE, its output float32 logits [R, V]. Every value must be defined once and before its
    use. Every op must be registered, and inputs, attributes, dtypes and shapes be as its spec says. Each layer of the cache
    must have one Attention, all of the same cache geometry, which the metadata must not contradict. Sums over ranks are allowed
    only where the metadata says that there are several ranks, and only of values that nothing else reads, because they are
    computed in place; so are changes of low rank.
    """
    _verify_interface(model)
    _verify_order(model.graph)
    for node in model.graph:
        _verify_node(node)
    _verify_cache(model)
    _verify_ranks(model)
    _verify_adapters(model.graph)


def _verify_interface(model: ir.Model) -> None:
    graph = model.graph
    found = {str(value.name): str(TensorSpec.of(value)) for value in graph.inputs}
    required = {name: str(spec) for name, spec in INTERFACE.items()}
    if list(found.items()) != list(required.items()):
        raise CompileError("verify", "graph inputs", found=_listed(found), expected=_listed(required))
    outputs = {str(value.name): TensorSpec.of(value) for value in graph.outputs}
    logits = outputs.get("logits")
    fits = logits is not None and len(outputs) == len(graph.outputs) == 1 and logits.dtype == ir.DataType.FLOAT
    if logits is None or not fits or len(logits.dims) != 2 or logits.dims[0] != "R" or not isinstance(logits.dims[1], int):
        text = _listed({name: str(spec) for name, spec in outputs.items()})
        raise CompileError("verify", "graph outputs", found=text or "none", expected="logits float32[R, vocabulary size]")
    imports = dict(graph.opset_imports)
    if imports != {"": ops.ONNX_OPSET, ops.BELLE: ops.BELLE_OPSET}:
        expected = f'"" {ops.ONNX_OPSET} and "{ops.BELLE}" {ops.BELLE_OPSET}'
        raise CompileError("verify", "opset imports", found=str(imports), expected=expected)


def _verify_order(graph: ir.Graph) -> None:
    defined: dict[str, ir.Value] = {}
    node_names: set[str] = set()

    def define(value: ir.Value, node: str) -> None:
        name = str(value.name or "")
        if not name or name in defined:
            raise CompileError("verify", f"value {name!r}", node=node, found="a second definition", expected="one of each name")
        defined[name] = value

    for value in graph.inputs:
        define(value, "")
    for value in graph.initializers.values():
        define(value, "")
        tensor = value.const_value
        if tensor is None or TensorSpec.of(value) != TensorSpec(tensor.dtype, tuple(tensor.shape.numpy())):
            found = "no tensor" if tensor is None else str(TensorSpec(tensor.dtype, tuple(tensor.shape.numpy())))
            raise CompileError("verify", f"initializer {value.name}", found=found, expected=str(TensorSpec.of(value)))
    for node in graph:
        name = str(node.name or "")
        if not name or name in node_names:
            raise CompileError("verify", f"{node.op_type} node", node=name, found="a second node", expected="one of each name")
        node_names.add(name)
        for used in node.inputs:
            if used is not None and defined.get(str(used.name)) is not used:
                expected = "a definition before its use"
                raise CompileError("verify", f"input {used.name}", node=name, found="none", expected=expected)
        for value in node.outputs:
            define(value, name)
    for value in graph.outputs:
        if defined.get(str(value.name)) is not value:
            raise CompileError("verify", f"graph output {value.name}", found="no definition", expected="a value of the graph")


def _verify_node(node: ir.Node) -> None:
    inferred = ops.infer_outputs(node)
    if len(inferred) != len(node.outputs):
        what, found = f"outputs of {node.op_type}", str(len(node.outputs))
        raise CompileError("verify", what, node=str(node.name), found=found, expected=str(len(inferred)))
    for value, expected in zip(node.outputs, inferred, strict=True):
        if TensorSpec.of(value) != expected:
            raise CompileError(
                "verify", f"output {value.name}", node=str(node.name), found=str(TensorSpec.of(value)), expected=str(expected)
            )


def _verify_cache(model: ir.Model) -> None:
    owners: dict[int, str] = {}
    known = {key: int(model.metadata_props[key]) for key in ("num_kv_heads", "head_dim") if key in model.metadata_props}
    layers = int(model.metadata_props.get("num_layers", 1 << 30))
    for node in model.graph:
        if node.op_type != "Attention":
            continue
        attributes, name = ops.attributes_of(node), str(node.name)
        layer = attributes["layer"]
        if layer in owners or not 0 <= layer < layers:
            found = f"layer {layer}, also of node {owners[layer]}" if layer in owners else f"layer {layer}"
            raise CompileError("verify", "cache of Attention", node=name, found=found, expected="one layer of the cache each")
        owners[layer] = name
        for key in ("num_kv_heads", "head_dim"):
            if attributes[key] != known.setdefault(key, attributes[key]):
                found, expected = str(attributes[key]), str(known[key])
                raise CompileError("verify", f"{key} of Attention", node=name, found=found, expected=expected)
        if attributes["num_heads"] % attributes["num_kv_heads"]:
            found, expected = str(attributes["num_heads"]), f"a multiple of num_kv_heads = {attributes['num_kv_heads']}"
            raise CompileError("verify", "num_heads of Attention", node=name, found=found, expected=expected)


def _verify_ranks(model: ir.Model) -> None:
    facts = model.metadata_props
    rank, ranks = int(facts.get("rank", 0)), int(facts.get("ranks", 1))
    if not 0 <= rank < ranks:
        raise CompileError("verify", "rank of the metadata", found=f"{rank} of {ranks}", expected="a rank below their number")
    for node in model.graph:
        if node.op_type != "AllReduce":
            continue
        addend = node.inputs[0]
        if ranks == 1:
            raise CompileError("verify", "AllReduce", node=str(node.name), found="one rank", expected="ranks in the metadata")
        if addend is None or addend.producer() is None or len(addend.uses()) > 1 or addend.is_graph_output():
            found = f"{addend.name}, which is read elsewhere or not computed" if addend else "nothing"
            raise CompileError("verify", "AllReduce", node=str(node.name), found=found, expected="a value of its own")


def _listed(specs: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {spec}" for name, spec in specs.items())


def _verify_adapters(graph: ir.Graph) -> None:
    targets: set[str] = set()
    for node in graph:
        if not ops.spec_of(node).adapted:
            continue
        y, changed = node.inputs[0], ops.columns_of_targets(node).keys()
        if y is None or y.producer() is None or len(y.uses()) > 1 or y.is_graph_output() or targets & changed:
            found = f"{y.name if y else 'nothing'}, which is read elsewhere or not computed, or a second op for a linear of it"
            expected = "the result of one linear, or of several side by side, which nothing else reads"
            raise CompileError("verify", node.op_type, node=str(node.name), found=found, expected=expected)
        targets |= changed
