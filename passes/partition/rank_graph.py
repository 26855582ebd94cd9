"""The nodes and weights of a rank, made from those of the whole graph one after the other."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import onnx_ir as ir

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.build import make_initializer, make_node
from belle_compile.compiler.ir.lazy import lazy, part_of
from belle_compile.compiler.ir.meanings import GROUP
from belle_compile.compiler.ir.ops import attributes_of
from belle_compile.passes.base import is_weight
from belle_compile.passes.partition.channels import ACTIVATIONS, KEEPS_CHANNELS, Ranges
from belle_compile.passes.partition.shares import TOKENS, share


@dataclass(frozen=True)
class _Linear:
    """Inputs of a linear op by what they hold: `rows` one row for every output, `columns` one column for every so many inputs;
    `bias` is one of the rows too."""

    rows: tuple[int, ...]
    columns: Mapping[int, int]
    bias: int | None


_LINEARS = {
    "Gemm": _Linear((1, 2), {1: 1}, 2),
    "IntegerLinear": _Linear((1,), {1: 1}, None),
    "Dequantize": _Linear((2, 3), {}, 3),
    "GroupQuantizedLinear": _Linear((2, 3, 4), {2: 1, 3: GROUP}, 4),
}
_SLOPES = 7  # input of Attention


@dataclass
class RankGraph:
    """Takes the whole graph's nodes in order through `rebuild`. `parts` are the channels that rank `rank` of `ranks` has of
    values; `new` are the values that stand for old ones, `weights` the new weights."""

    parts: Mapping[ir.Value, Ranges]
    rank: int
    ranks: int
    new: dict[ir.Value, ir.Value] = field(default_factory=dict)
    nodes: list[ir.Node] = field(default_factory=list)
    weights: dict[Hashable, ir.Value] = field(default_factory=dict)
    changes: int = 0
    _addends: set[ir.Value] = field(default_factory=set)  # integer products that ranks have to add up, once they are scaled

    def rebuild(self, node: ir.Node) -> None:
        """Append what a node becomes; raises CompileError where a rank cannot have a part of it."""
        given = [value for value in node.inputs if value in self.parts]
        gives = [value for value in node.outputs if value in self.parts]
        if node.op_type in _LINEARS:
            self._linear(node, _LINEARS[node.op_type])
        elif node.op_type == "QuantizedEmbedding" or (node.op_type == "Gather" and is_weight(node.inputs[0])):
            self._embedding(node)
        elif node.op_type == "Attention":
            self._attention(node)
        elif node.op_type == "Split" and gives:
            fused, old = node.inputs
            assert old is not None
            sizes = np.asarray([_width(self.parts[value]) for value in node.outputs], np.int64)
            self._append(node, [fused, self._weight(node, ir.Tensor(sizes, name=str(old.name)))])
        elif (node.op_type in (*ACTIVATIONS, *KEEPS_CHANNELS) and gives) or not (given or gives):
            self._append(node, node.inputs)
        else:
            named = ", ".join(str(value.name) for value in gives or given if value is not None)
            raise CompileError(
                "partition", f"parts of {named}", node=str(node.name), found=node.op_type,
                expected="linears, attention and activations where ranks have parts",
            )  # fmt: skip

    def _linear(self, node: ir.Node, kind: _Linear) -> None:
        """By rows where the rank has parts of its outputs, by columns where it has parts of its inputs."""
        source, output = node.inputs[0], node.outputs[0]
        assert source is not None
        inputs = list(node.inputs)
        if source in self._addends or (kind.columns and source in self.parts):
            if output in self.parts:
                expected = "the whole result of a linear of parts"
                raise CompileError("partition", f"parts of {output.name}", node=str(node.name), found="both", expected=expected)
            for index, size in kind.columns.items():
                channels = tuple((start // size, -(-stop // size)) for start, stop in self.parts[source])
                inputs[index] = self._part(node, inputs[index], channels, axis=1)
            if kind.bias is None:
                self._append(node, inputs)
                self._addends.add(output)
                return
            if self.rank and kind.bias < len(inputs):
                inputs[kind.bias] = self._zeros(inputs[kind.bias])
            self._append(node, inputs)
            self._sum(node)
        elif output in self.parts:
            for index in kind.rows:
                if index < len(inputs) and inputs[index] is not None:
                    inputs[index] = self._part(node, inputs[index], self.parts[output], axis=0)
            self._append(node, inputs)
        else:
            self._append(node, inputs)

    def _embedding(self, node: ir.Node) -> None:
        """Of some tokens: those that the head gives the logits of, where it is as long."""
        ids, *tables = node.inputs if node.domain else reversed(node.inputs)
        assert tables[0] is not None and tables[0].shape is not None
        size = tables[0].shape.numpy()[0]
        tokens = (share(size, TOKENS, self.rank, self.ranks, f"tokens of {node.name}"),)
        first = ir.Tensor(np.asarray([tokens[0][0]], np.int32), name=f"{node.name}.first_token")
        weights = [self._part(node, table, tokens, axis=0) for table in tables]
        self._append(node, [ids, *weights, self._weight(node, first)], op=node.op_type if node.domain else "Embedding")
        self._sum(node)

    def _attention(self, node: ir.Node) -> None:
        options, inputs = attributes_of(node), list(node.inputs)
        (queries,), (keys,) = (self.parts[value] for value in node.inputs[:2] if value is not None)
        heads, kv_heads = (tuple(channel // options["head_dim"] for channel in part) for part in (queries, keys))
        options |= {"num_heads": heads[1] - heads[0], "num_kv_heads": kv_heads[1] - kv_heads[0]}
        if len(inputs) > _SLOPES and inputs[_SLOPES] is not None:
            inputs[_SLOPES] = self._part(node, inputs[_SLOPES], (heads,), axis=0)
        self._append(node, inputs, attributes=options)

    def _sum(self, node: ir.Node) -> None:
        """An AllReduce of what the node's new one gives; readers of the old value read that."""
        addend = self.new[node.outputs[0]]
        total = make_node("AllReduce", [addend], f"{node.name}.all_reduce")
        self.nodes.append(total)
        self.new[node.outputs[0]] = total.outputs[0]

    def _append(
        self,
        node: ir.Node,
        inputs: Sequence[ir.Value | None],
        *,
        op: str | None = None,
        attributes: Mapping[str, int | float | str] | None = None,
    ) -> None:
        """A node of the old one's names, and of its op and attributes but for what is given."""
        given = [None if value is None else self.new.get(value, value) for value in inputs]
        if attributes is None:
            attributes = {} if op else {key: attribute.value for key, attribute in node.attributes.items()}
        made = make_node(
            op or node.op_type,
            given,
            str(node.name),
            outputs=[str(value.name) for value in node.outputs],
            attributes=attributes,
        )
        self.nodes.append(made)
        self.new.update(zip(node.outputs, made.outputs, strict=True))
        self.changes += any(new is not old for new, old in zip(inputs, node.inputs, strict=False)) or op is not None

    def _part(self, node: ir.Node, weight: ir.Value | None, ranges: Ranges, axis: int) -> ir.Value:
        """The rows or columns of a weight that the rank has; all readers of the same ones share them."""
        if weight is None or not is_weight(weight) or weight.const_value is None:
            found = f"{weight.name if weight else 'nothing'}, which is computed"
            raise CompileError("partition", "a part of a weight", node=str(node.name), found=found, expected="a weight")
        key = weight, ranges, axis
        return self.weights.get(key) or self._weight(key, part_of(weight.const_value, ranges, axis, str(weight.name)))

    def _zeros(self, bias: ir.Value | None) -> ir.Value:
        assert bias is not None and bias.shape is not None
        shape = tuple(bias.shape.numpy())
        key = bias, "zeros"
        zeros = lazy(str(bias.name), lambda: np.zeros(shape, np.float32), shape, ir.DataType.FLOAT, step="zeros")
        return self.weights.get(key) or self._weight(key, zeros)

    def _weight(self, key: Hashable, tensor: ir.TensorProtocol) -> ir.Value:
        """A new weight, named like the whole one, with a number where several parts are made of one."""
        taken = {value.name for value in self.weights.values()}
        name = next(name for name in _names(str(tensor.name)) if name not in taken)
        self.weights[key] = value = make_initializer(tensor, name)
        return value


def _names(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}.{number}" for number in count(2))


def _width(ranges: Ranges) -> int:
    return sum(stop - start for start, stop in ranges)
