"""The work of each rank: what it holds, reads and computes, from the graphs that a build would compile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from belle_compile.compiler.backends import Backend, Footprint
from belle_compile.compiler.backends.base import KVCache
from belle_compile.compiler.devices import Target
from belle_compile.compiler.ir.ops import attributes_of, spec_of
from belle_compile.compiler.ir.signature import Role
from belle_compile.compiler.kv_types import AUTO
from belle_compile.compiler.stages import carried
from belle_compile.passes.pipeline import passes_of, run_for
from belle_compile.passes.presets import Recipe


@dataclass(frozen=True)
class Product:
    """A matrix product: the bytes of its weight, the operations for each row, and whether these are on integers. Its rows are
    all tokens of a step (`of_tokens`), or only those whose logits are computed."""

    weight_bytes: int
    operations: int
    integer: bool
    of_tokens: bool


@dataclass(frozen=True)
class AttentionWork:
    """The attention of a layer: the operations for a pair of a token and a token of its context, and the number of tokens that
    a token attends to at most (0: any)."""

    operations: int
    window: int

    def seen(self, context: int) -> int:
        """The number of tokens that a token attends to after `context` others."""
        return min(context, self.window) if self.window else context


@dataclass(frozen=True)
class RankWork:
    """The parts of a step of one rank, of at most `max_tokens` tokens.

    `attention` holds the attention of each layer, `calls` is the number of kernel calls, and `sums` holds the channels of each
    sum over ranks. `kv` is the rank's KV cache.
    """

    max_tokens: int
    kv: KVCache
    products: tuple[Product, ...]
    attention: tuple[AttentionWork, ...]
    calls: int
    sums: tuple[int, ...]


@dataclass(frozen=True)
class RankPlan:
    """What one rank holds, and the work of its step (None if the backend makes no program to derive it from)."""

    footprint: Footprint
    work: RankWork | None


def plans_of(graph: ir.Model, recipe: Recipe, backend: Backend, target: Target, kv_cache: str = AUTO) -> list[RankPlan]:
    """The plan of each rank of a target, from the float32 graph, which is not changed; no weight is read. Raises CompileError
    if the model cannot be divided among the ranks or the backend cannot compile it."""
    passes = carried(passes_of(recipe, ranks=target.ranks), backend, recipe.applied(calibrated=False))
    graphs, _ = run_for(graph.clone(), [step for part in passes for step in part], target.ranks)
    footprints = backend.footprint(graphs, target, kv_cache)
    return [RankPlan(footprint, _work(rank, footprint)) for rank, footprint in zip(graphs, footprints, strict=True)]


def _work(graph: ir.Model, footprint: Footprint) -> RankWork | None:
    if footprint.step is None:
        return None
    program = footprint.step.program
    attention = [attributes_of(node) for node in graph.graph if node.op_type == "Attention"]
    return RankWork(
        max_tokens=program.max_tokens,
        kv=footprint.kv,
        products=tuple(_products(graph)),
        attention=tuple(map(_attention_work, attention)),
        calls=sum(call.all_reduce is None and call.when not in ("runs", "adapted") for call in program.calls),
        sums=tuple(call.all_reduce.width for call in program.calls if call.all_reduce),
    )


def _attention_work(options: dict[str, Any]) -> AttentionWork:
    """The operations are those of scores and of weighted values, counting a multiplication and an addition each."""
    return AttentionWork(4 * int(options["num_heads"]) * int(options["head_dim"]), int(options["window"]))


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
