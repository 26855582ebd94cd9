"""The inputs and outputs of a translated model: for the executor of this project, or as ONNX Runtime GenAI expects them.

Both have sequences side by side as [B, S] tokens, and for each layer the keys and values of the cache, `past_key_values.N.key`
and `.value`, with outputs `present.N.key` and `.value`, all [B, KV, C, D]: C positions of room, filled from the beginning.
Bound to the same memory, they are updated in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import onnx_ir as ir

from belle_compile.compiler.backends.onnx.graph import OnnxGraph


@dataclass(frozen=True)
class StepValues:
    """The values of a step that nodes of several layers read.

    `token_ids` [B, S]; `last` int32 [B], the position of each sequence's last token, which ONNX Runtime calls seqlens_k;
    `total` int32 [], 1 + the largest of these; `rope_length` int32 [B], the lengths that dynamic RoPE depends on.
    """

    token_ids: ir.Value
    last: ir.Value
    total: ir.Value
    rope_length: ir.Value


class Interface(ABC):
    """Makes the inputs of a model, and its output from the logits."""

    logits_dims: tuple[str, ...]

    @abstractmethod
    def begin(self, graph: OnnxGraph, dynamic_rope: bool) -> StepValues:
        """Append the inputs, and nodes that compute the values of the step from them."""

    def token_positions(self, graph: OnnxGraph, step: StepValues) -> ir.Value:
        """Append what computes the positions of the tokens, int32 [B, S], which end at the last one of each sequence."""
        length = graph.op("Shape", step.token_ids, name="step.length", start=1)
        count = graph.op("Cast", length, name="step.length.int32", to=int(ir.DataType.INT32))
        scalar = graph.op("Squeeze", count, graph.constant("zero", [0], "int64"), name="step.length.scalar")
        zero, one = graph.constant("zero.int32", 0, "int32"), graph.constant("one.scalar", 1, "int32")
        offsets = graph.op("Range", zero, scalar, one, name="step.offsets")
        first = graph.op("Sub", step.last, count, name="step.before_last")
        column = graph.op("Unsqueeze", first, graph.constant("last_axis", [-1], "int64"), name="step.before_first")
        before = graph.op("Add", column, offsets, name="step.positions.before")
        return graph.op("Add", before, one, name="step.positions")

    @abstractmethod
    def rows(self, graph: OnnxGraph, hidden: ir.Value, width: int) -> ir.Value:
        """The rows of `hidden` [B, S, width] whose logits are requested."""


class ServingInterface(Interface):
    """Inputs of int32: input_ids [B, S], last_positions [B], total_length [], logit_rows [R], which are numbers of tokens of
    all B * S, and rope_lengths [B] where RoPE is dynamic. The logits are [R, V]."""

    logits_dims = ("R",)

    def begin(self, graph: OnnxGraph, dynamic_rope: bool) -> StepValues:
        token_ids = graph.input("input_ids", "int32", ("B", "S"))
        last = graph.input("last_positions", "int32", ("B",))
        total = self.total(graph)
        self._logit_rows = graph.input("logit_rows", "int32", ("R",))
        lengths = graph.input("rope_lengths", "int32", ("B",)) if dynamic_rope else last
        return StepValues(token_ids, last, total, lengths)

    def total(self, graph: OnnxGraph) -> ir.Value:
        """1 + the largest of the last positions."""
        return graph.input("total_length", "int32", ())

    def rows(self, graph: OnnxGraph, hidden: ir.Value, width: int) -> ir.Value:
        flat = graph.op("Reshape", hidden, graph.constant("rows.shape", [-1, width], "int64"), name="rows.tokens")
        return graph.op("Gather", flat, self._logit_rows, name="rows", axis=0)


class GenAIInterface(Interface):
    """Inputs of int64: input_ids [B, S] and attention_mask [B, L], which is 1 for the tokens of a sequence so far. The logits
    are [B, S, V]."""

    logits_dims = ("B", "S")

    def begin(self, graph: OnnxGraph, dynamic_rope: bool) -> StepValues:
        token_ids = graph.input("input_ids", "int64", ("B", "S"))
        mask = graph.input("attention_mask", "int64", ("B", "L"))
        one = graph.constant("one", [1], "int64")
        count = graph.op("ReduceSum", mask, one, name="lengths", keepdims=0)
        lengths = graph.op("Cast", count, name="lengths.int32", to=int(ir.DataType.INT32))
        last = graph.op("Sub", lengths, graph.constant("one.int32", [1], "int32"), name="last_positions")
        shape = graph.op("Shape", mask, name="mask.length", start=1)
        scalar = graph.op("Squeeze", shape, graph.constant("zero", [0], "int64"), name="total_length.int64")
        total = graph.op("Cast", scalar, name="total_length", to=int(ir.DataType.INT32))
        return StepValues(token_ids, last, total, lengths)

    def rows(self, graph: OnnxGraph, hidden: ir.Value, width: int) -> ir.Value:
        return hidden
