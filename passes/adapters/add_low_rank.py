"""Room for adapters beside linears: changes of low rank, whose values are loaded at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from belle_compile.compiler.ir.basis import AdaptedLinear
from belle_compile.compiler.ir.build import make_node
from belle_compile.compiler.ir.ops import spec_of
from belle_compile.passes.adapters.linears import adapted_linears
from belle_compile.passes.base import Pass, PassResult, Phase

SUFFIX = ".low_rank"


@dataclass(frozen=True)
class AddLowRank(Pass):
    """y = Gemm(x, W, b)   becomes   y = LowRank(Gemm(x, W, b), x, sequences)

    y = Dequantize(IntegerLinear(xq, wq), xs, ws, b)   becomes   y = QuantizedLowRank(Dequantize(...), xq, xs, sequences)

    for the linears whose names are or end with one of `lora_targets`, by default all but the head. The new ops add what the
    adapter of each token's sequence adds, of rank `lora_rank` at most (https://arxiv.org/abs/2106.09685); they read what the
    linear reads, so that no fusion is lost. Refuses a linear whose weight was changed in a way that no pass has recorded.
    """

    phase: ClassVar[Phase] = Phase.ADAPTERS
    lora_rank: int
    lora_targets: tuple[str, ...] = ()

    def run(self, model: ir.Model) -> PassResult:
        graph = model.graph
        sequences = next(value for value in graph.inputs if value.name == "sequences")
        linears, refusals = adapted_linears(graph, self.lora_targets)
        added = [linear for linear in linears if not any(spec_of(reader).adapted for reader in linear.result.consumers())]
        for linear in added:
            self._add(linear, sequences, graph)
        return PassResult(len(added), refusals)

    def _add(self, linear: AdaptedLinear, sequences: ir.Value, graph: ir.Graph) -> None:
        y, producer = linear.result, linear.result.producer()
        assert producer is not None, "a linear computes its result"
        readers = list(y.uses())
        op = "LowRank" if len(linear.inputs) == 1 else "QuantizedLowRank"
        attributes: dict[str, int | float | str] = {"targets": linear.name, "rank": self.lora_rank}
        node = make_node(op, [y, *linear.inputs, sequences], f"{linear.name}{SUFFIX}", attributes=attributes)
        graph.insert_after(producer, node)
        for use in readers:
            use.node.replace_input_with(use.idx, node.outputs[0])
