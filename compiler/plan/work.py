"""What each rank has to hold, read and compute, from the graphs that a build would compile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from belle_compile.compiler.backends import plan_graph
from belle_compile.compiler.checkpoint import Checkpoint
from belle_compile.compiler.families import build_graph
from belle_compile.compiler.ir.ops import attributes_of, spec_of
from belle_compile.compiler.ir.signature import Role
from belle_compile.passes.pipeline import Recipe, passes_of, run_for
from belle_compile.runtime.program import KVLayout
from belle_compile.runtime.serving.kv_blocks import blocks_for


@dataclass(frozen=True)
class Product:
    """A matrix product: bytes of its weight, operations for each row, whether these are on integers, and whether its rows are
    the tokens of a step or those that logits are wanted of."""

    weight_bytes: int
    operations: int
    integer: bool
    of_tokens: bool


@dataclass(frozen=True)
class RankWork:
    """What one rank holds (bytes of weights and of workspace, the layout of its KV cache) and what a step of it is made of:
    products, attention (of each layer, operations for a token and a token of context), kernel calls, and channels that it sums
    with the other ranks, one entry for each sum. A step has `max_tokens` at most."""

    rank: int
    max_tokens: int
    weight_bytes: int
    workspace_bytes: int
    kv: KVLayout
    products: tuple[Product, ...]
    attention: tuple[int, ...]
    calls: int
    sums: tuple[int, ...]

    def kv_bytes(self, context: int) -> int:
        """Keys and values of so many tokens of a sequence, in whole blocks."""
        return blocks_for(context) * self.kv.block_bytes


def works_of(
    checkpoint: Checkpoint, recipe: Recipe, ranks: int, kv_cache: str = "auto", *, gpu: bool = False
) -> list[RankWork]:
    """The work of each of `ranks`, on GPUs or on processors; no weight is read. Raises CompileError where the model cannot be
    divided so."""
    graphs, _ = run_for(build_graph(checkpoint), passes_of(recipe, ranks=ranks), ranks)
    return [_work(rank, one, kv_cache, gpu) for rank, one in enumerate(graphs)]


def _work(rank: int, graph: ir.Model, kv_cache: str, gpu: bool) -> RankWork:
    lowered = plan_graph(graph, gpu, kv_cache)
    program, weights = lowered.program, lowered.weights
    attention = [attributes_of(node) for node in graph.graph if node.op_type == "Attention"]
    return RankWork(
        rank=rank,
        max_tokens=program.max_tokens,
        weight_bytes=sum(weight.bytes for weight in weights),
        workspace_bytes=program.arena_bytes + program.scratch_bytes,
        kv=program.kv,
        products=tuple(_products(graph)),
        attention=tuple(map(_attention_operations, attention)),
        calls=sum(call.all_reduce is None and call.when != "runs" for call in program.calls),
        sums=tuple(call.all_reduce.width for call in program.calls if call.all_reduce),
    )


def _attention_operations(options: dict[str, Any]) -> int:
    """Of scores and weighted values, a multiplication and an addition each."""
    return 4 * int(options["num_heads"]) * int(options["head_dim"])


def _products(graph: ir.Model) -> Iterator[Product]:
    for node in graph.graph:
        spec = spec_of(node)
        if not spec.is_linear:
            continue
        x, weight, output = spec.operand(node, Role.ACTIVATION), spec.operand(node, Role.WEIGHT), node.outputs[0]
        assert weight is not None and weight.shape is not None and weight.dtype is not None and output.shape is not None
        outputs, inputs = weight.shape.numpy()
        wide = x is not None and x.dtype == ir.DataType.INT16
        yield Product(
            weight_bytes=int(outputs * inputs * weight.dtype.itemsize),
            operations=2 * outputs * inputs * (2 if wide else 1),
            integer=not spec.is_float_linear,
            of_tokens=str(output.shape[0]) == "T",
        )
