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
from belle_compile.compiler.ir.ops import attributes_of, operand, spec_of
from belle_compile.compiler.ir.signature import OF_GROUPS, OF_OUTPUTS, Role
from belle_compile.passes.base import is_weight
from belle_compile.passes.partition.channels import ACTIVATIONS, KEEPS_CHANNELS, OF_HEADS, Ranges
from belle_compile.passes.partition.shares import TOKENS, share

_PART_BY_PART = (*ACTIVATIONS, *KEEPS_CHANNELS, *OF_HEADS)  # ops that a rank computes for the channels it has


@dataclass
class RankGraph:
    """The graph of rank `rank` of `ranks`: `rebuild` is called for each node of the whole graph, in order.

    `parts` are the channels that the rank has of each divided value; `new` maps values of the whole graph to the rank's values;
    `weights` are the rank's weights, by a key of what they are made from (a weight, ranges and an axis).
    """

    parts: Mapping[ir.Value, Ranges]
    rank: int
    ranks: int
    new: dict[ir.Value, ir.Value] = field(default_factory=dict)
    nodes: list[ir.Node] = field(default_factory=list)
    weights: dict[Hashable, ir.Value] = field(default_factory=dict)
    changes: int = 0
    _addends: set[ir.Value] = field(default_factory=set)  # integer sums that ranks have to add up once they are scaled

    def rebuild(self, node: ir.Node) -> None:
        """Append the rank's form of a node; raises CompileError where a rank cannot have a part of the node."""
        spec = spec_of(node)
        divided_inputs = [value for value in node.inputs if value in self.parts]
        divided_outputs = [value for value in node.outputs if value in self.parts]
        if spec.is_linear or spec.scales_sums:
            self._linear(node)
        elif is_weight(spec.operand(node, Role.TABLE)):
            self._embedding(node)
        elif node.op_type == "Attention":
            self._attention(node)
        elif node.op_type == "Split" and divided_outputs:
            fused, old = node.inputs
            assert old is not None
            sizes = np.asarray([_width(self.parts[value]) for value in node.outputs], np.int64)
            self._append(node, [fused, self._weight(node, ir.Tensor(sizes, name=str(old.name)))])
        elif (node.op_type in _PART_BY_PART and divided_outputs) or not (divided_inputs or divided_outputs):
            self._append(node, node.inputs)
        else:
            named = ", ".join(str(value.name) for value in divided_outputs or divided_inputs if value is not None)
            raise CompileError(
                "partition", f"parts of {named}", node=str(node.name), found=node.op_type,
                expected="linears, attention and activations where ranks have parts",
            )  # fmt: skip

    def _linear(self, node: ir.Node) -> None:
        """Divide a linear, or the scaling of its sums: by inputs where the rank has some of these, else by outputs."""
        source, output = node.inputs[0], node.outputs[0]
        assert source is not None
        if source in self._addends or (spec_of(node).is_linear and source in self.parts):
            self._by_inputs(node, source)
        elif output in self.parts:
            inputs = [
                self._part(node, value, self.parts[output], axis=0) if taken.role in OF_OUTPUTS and value is not None else value
                for taken, value in spec_of(node).operands(node)
            ]
            self._append(node, inputs)
        else:
            self._append(node, node.inputs)

    def _by_inputs(self, node: ir.Node, source: ir.Value) -> None:
        """Append a linear that computes an addend of every output from the rank's inputs and their columns of the weight."""
        spec, output = spec_of(node), node.outputs[0]
        if output in self.parts:
            expected = "the whole result of a linear of parts"
            raise CompileError("partition", f"parts of {output.name}", node=str(node.name), found="both", expected=expected)
        inputs: list[ir.Value | None] = []
        for taken, value in spec.operands(node):
            if value is None:
                inputs.append(None)
            elif taken.role is Role.WEIGHT:
                inputs.append(self._part(node, value, self.parts[source], axis=1))
            elif taken.role in OF_GROUPS:
                size = attributes_of(node)["group"]
                groups = tuple((start // size, -(-stop // size)) for start, stop in self.parts[source])
                inputs.append(self._part(node, value, groups, axis=1))
            else:
                inputs.append(self._zeros(value) if taken.role is Role.BIAS and self.rank else value)
        self._append(node, inputs)
        if spec.accumulates:
            self._addends.add(output)
        else:
            self._sum(node)

    def _embedding(self, node: ir.Node) -> None:
        """Append an embedding of the rank's tokens: those whose logits it computes, where the head is as long as the table."""
        table, scale = operand(node, Role.TABLE), operand(node, Role.SCALE)
        assert table is not None and table.shape is not None
        size = table.shape.numpy()[0]
        tokens = (share(size, TOKENS, self.rank, self.ranks, f"tokens of {node.name}"),)
        first = ir.Tensor(np.asarray([tokens[0][0]], np.int32), name=f"{node.name}.first_token")
        weights = [self._part(node, value, tokens, axis=0) for value in (table, scale) if value is not None]
        inputs = [operand(node, Role.INDEX), *weights, self._weight(node, first)]
        self._append(node, inputs, op="Embedding" if node.op_type == "Gather" else node.op_type)
        self._sum(node)

    def _attention(self, node: ir.Node) -> None:
        options = attributes_of(node)
        (queries,), (keys,) = (self.parts[value] for value in node.inputs[:2] if value is not None)
        heads, kv_heads = (tuple(channel // options["head_dim"] for channel in part) for part in (queries, keys))
        options |= {"num_heads": heads[1] - heads[0], "num_kv_heads": kv_heads[1] - kv_heads[0]}
        inputs = [
            self._part(node, value, (heads,), axis=0) if taken.role is Role.SLOPE and value is not None else value
            for taken, value in spec_of(node).operands(node)
        ]
        self._append(node, inputs, attributes=options)

    def _sum(self, node: ir.Node) -> None:
        """Append an AllReduce of the result of the node just appended for `node`; readers of the old result read the sum."""
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
        """Append a node that has the names of the old one, and its op and attributes unless others are given."""
        rank_inputs = [None if value is None else self.new.get(value, value) for value in inputs]
        if attributes is None:
            attributes = {} if op else {key: attribute.value for key, attribute in node.attributes.items()}
        rank_node = make_node(
            op or node.op_type,
            rank_inputs,
            str(node.name),
            outputs=[str(value.name) for value in node.outputs],
            attributes=attributes,
        )
        self.nodes.append(rank_node)
        self.new.update(zip(node.outputs, rank_node.outputs, strict=True))
        self.changes += any(new is not old for new, old in zip(inputs, node.inputs, strict=False)) or op is not None

    def _part(self, node: ir.Node, weight: ir.Value | None, ranges: Ranges, axis: int) -> ir.Value:
        """The rank's rows (axis 0) or columns (axis 1) of a weight; all readers of the same ones share them."""
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
        """Register a weight that is named like the whole one, with a number where several parts are made of one."""
        taken = {value.name for value in self.weights.values()}
        name = next(name for name in _names(str(tensor.name)) if name not in taken)
        self.weights[key] = value = make_initializer(tensor, name)
        return value


def _names(name: str) -> Iterator[str]:
    """name, name.2, name.3, ..."""
    yield name
    yield from (f"{name}.{number}" for number in count(2))


def _width(ranges: Ranges) -> int:
    return sum(stop - start for start, stop in ranges)
