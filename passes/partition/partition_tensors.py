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
    zeros for tokens that other ranks have, with an AllReduce behind it; the head gives the logits of the rank's tokens. Norms
    and residual stream are on every rank. Weights are parts of the whole ones, so all ranks together have the integers and
    scales of one alone; activations before a sum are quantized by what a rank has of them. The bias behind a sum is that of
    rank 0, and zeros elsewhere, so that ranks with equal shares have equal kernels. Which shares: see `shares.py`.

    Needs quantization to have run, and fusion not to have. Raises CompileError where heads, channels or vocabulary
    cannot be divided, and at what is no linear, attention or activation where a rank has a part.
    """

    phase: ClassVar[Phase] = Phase.PARTITION
    rank: int
    ranks: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks:
            raise CompileError("partition", "option rank", found=str(self.rank), expected=f"0 to {self.ranks - 1}")

    @property
    def options(self) -> dict[str, Any]:
        """Those that all ranks share."""
        return {"ranks": self.ranks}

    def run(self, model: ir.Model) -> PassResult:
        if self.ranks == 1 or "ranks" in model.metadata_props:
            return PassResult()
        graph = model.graph
        old, parts = list(graph), channels_of_rank(graph, self.rank, self.ranks)
        mine = RankGraph(parts, self.rank, self.ranks)
        for node in old:
            mine.rebuild(node)
        logits = graph.outputs[0]
        facts = self._facts(model, parts[logits])
        graph.outputs[0] = mine.new[logits]
        graph.remove(old, safe=True)
        graph.extend(mine.nodes)
        for name, value in list(graph.initializers.items()):
            if not value.uses():
                del graph.initializers[name]
        for value in mine.weights.values():
            graph.register_initializer(value)
        for node in mine.nodes:
            if node.op_type == "Attention":
                facts |= {key: attributes_of(node)[key] for key in ("num_heads", "num_kv_heads")}
        model.metadata_props.update({key: str(value) for key, value in facts.items()})
        return PassResult(mine.changes)

    def _facts(self, model: ir.Model, tokens: Ranges) -> dict[str, int]:
        """Of the metadata: which rank it is, and the model's vocabulary with the first token that the rank has of it."""
        vocabulary = width_of(model.graph.outputs[0])
        return {"rank": self.rank, "ranks": self.ranks, "vocab_size": vocabulary, "first_token": tokens[0][0]}
