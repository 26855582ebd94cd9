"""Tensor parallelism: a rank's graph, with its heads, its feed-forward channels and its part of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.ops import attributes_of
from belle_compile.passes.base import Pass, PassResult, Phase
from belle_compile.passes.partition.channels import Ranges, channels_of_rank, width_of
from belle_compile.passes.partition.rank_graph import RankGraph


@dataclass(frozen=True)
class PartitionTensors(Pass):
    """q = Gemm(x, Wq); a = Attention(q, k, v); y = Gemm(a, Wo, b); Add(y, x)   becomes, for the heads of a rank,
    q = Gemm(x, Wq[heads]); a = Attention(q, k, v); y = Gemm(a, Wo[:, heads], b or 0); Add(AllReduce(y), x)

    and likewise for the channels of the feed-forward part (Shoeybi et al., Megatron-LM, arXiv:1909.08053). The embedding gives
    zeros for tokens of other ranks, and an AllReduce follows it; the head gives the logits of the rank's tokens. Every rank has
    the norms and the residual stream. Weights are parts of the whole ones, so that all ranks together have the integers and
    scales of a model on one rank; before a sum, each rank quantizes its part of the activations by itself. Rank 0 adds the bias
    before a sum and the others add zeros, so that ranks with equal shares have equal kernels. `shares.py` defines the shares.

    Run it after quantization and before fusion. Raises CompileError where heads, channels or vocabulary cannot be divided, and
    at a node other than a linear, attention or activation where a rank has a part.
    """

    phase: ClassVar[Phase] = Phase.PARTITION
    rank: int
    ranks: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks:
            raise CompileError("partition", "option rank", found=str(self.rank), expected=f"0 to {self.ranks - 1}")

    @property
    def options(self) -> dict[str, Any]:
        """The options that all ranks have in common, so that their records are equal."""
        return {"ranks": self.ranks}

    def run(self, model: ir.Model) -> PassResult:
        if self.ranks == 1 or "ranks" in model.metadata_props:
            return PassResult()
        graph = model.graph
        whole, parts = list(graph), channels_of_rank(graph, self.rank, self.ranks)
        rank_graph = RankGraph(parts, self.rank, self.ranks)
        for node in whole:
            rank_graph.rebuild(node)
        logits = graph.outputs[0]
        facts = self._facts(model, parts[logits])
        graph.outputs[0] = rank_graph.new[logits]
        graph.remove(whole, safe=True)
        graph.extend(rank_graph.nodes)
        for name, value in list(graph.initializers.items()):
            if not value.uses():
                del graph.initializers[name]
        for value in rank_graph.weights.values():
            graph.register_initializer(value)
        for node in rank_graph.nodes:
            if node.op_type == "Attention":
                facts |= {key: attributes_of(node)[key] for key in ("num_heads", "num_kv_heads")}
        model.metadata_props.update({key: str(value) for key, value in facts.items()})
        return PassResult(rank_graph.changes)

    def _facts(self, model: ir.Model, tokens: Ranges) -> dict[str, int]:
        """The rank's entries in the metadata, among them the size of the whole vocabulary and the rank's first token in it."""
        vocabulary = width_of(model.graph.outputs[0])
        return {"rank": self.rank, "ranks": self.ranks, "vocab_size": vocabulary, "first_token": tokens[0][0]}
