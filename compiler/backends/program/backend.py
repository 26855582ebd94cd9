"""Base class of the backends that make programs: it derives footprint and payload from a lowered graph."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from belle_compile.compiler.backends.base import (
    FIXED_BYTES,
    SCALED_PRODUCTS,
    Backend,
    Footprint,
    KVCache,
    PackedTensor,
    Passes,
    Payload,
    Repartitionable,
    StepPlan,
    tensor_bytes,
)
from belle_compile.compiler.backends.weights_header import weights_header
from belle_compile.compiler.devices import Target
from belle_compile.compiler.kv_types import AUTO
from belle_compile.runtime.artifact import KernelCalls, PassRecord
from belle_compile.runtime.program import PROGRAM_NAME, Program, Weight
from belle_compile.runtime.program_json import program_to_json, read_program, seal

if TYPE_CHECKING:
    import onnx_ir as ir

    from belle_compile.compiler.backends.program.lowering import LoweredGraph
    from belle_compile.passes.presets import Recipe


class ProgramBackend(Backend, Repartitionable):
    """A backend whose payload is a program of kernel calls over planned memory. `process_bytes` is the device memory of a
    process beside kernels, program and tokenizer; `maps_weights` is the field of its footprints."""

    process_bytes: int
    maps_weights: bool

    @abstractmethod
    def lower(self, graph: ir.Model, unfused_calls: int, kv_cache: str) -> LoweredGraph:
        """The program, weights and kernels of a rank's graph; raises CompileError for an op without a kernel."""

    def passes(self, recipe: Recipe) -> Passes:
        """All methods and fusions: lowering refuses an op that has no kernel, and names it."""
        return Passes(needed=SCALED_PRODUCTS)

    def adapter_refusal(self, target: Target) -> str:
        return "adapters for engines of one rank only" if target.ranks > 1 else ""

    def footprint(self, graphs: Sequence[ir.Model], target: Target, kv_cache: str = AUTO) -> list[Footprint]:
        return [self.footprint_of(self.lower(graph, 0, kv_cache)) for graph in graphs]

    def footprint_of(self, lowered: LoweredGraph) -> Footprint:
        """The footprint of a rank that runs a lowered graph."""
        program = lowered.program
        return Footprint(
            weights=sum(map(tensor_bytes, lowered.weights)),
            activations=program.arena_bytes + program.scratch_bytes,
            reserve=FIXED_BYTES + self.process_bytes,
            kv=KVCache(program.kv.dtype, program.kv.block_bytes, program.block_size, program.max_context),
            step=StepPlan(program, tuple(lowered.buffers)),
            maps_weights=self.maps_weights,
        )

    def payload(
        self,
        lowered: LoweredGraph,
        program: Program,
        kernels: Callable[[bytes], Mapping[str, bytes]],
        toolchain: Mapping[str, str],
        tuning: PassRecord | None = None,
    ) -> Payload:
        """The payload of a lowered graph. `program` is its program, completed with facts from compilation; `kernels` returns
        the files of compiled kernels by name, each with the seal of the program that it is called with at its end."""
        calls = program.kernel_calls
        weights = by_call(program, lowered.weights)
        header = weights_header([tensor for group in weights for tensor in group])
        text = program_to_json(replace(program, weights_header=hashlib.sha256(header).hexdigest()))
        return Payload(
            files={PROGRAM_NAME: text.encode(), **kernels(seal(text))},
            weights=weights,
            footprint=self.footprint_of(lowered),
            kernel_calls=KernelCalls(calls.before_fusion, calls.after_fusion),
            toolchain=toolchain,
            tuning=tuning,
        )

    def kernel_calls(self, graph: ir.Model) -> int:
        from belle_compile.compiler.backends.program import rules

        return rules.count_kernel_calls(graph.graph)

    def has_kernels(self, graph: ir.Model) -> bool:
        from belle_compile.compiler.backends.program import rules

        return rules.has_kernels(graph.graph)

    def kv_type(self, rank: Path) -> str:
        return read_program(rank).kv.dtype


def by_call(program: Program, weights: Sequence[PackedTensor]) -> list[list[PackedTensor]]:
    """The weights in their order, grouped by the call that reads them first."""
    named = {tensor.name: tensor for tensor in weights}
    groups = []
    for call in program.calls:
        names = dict.fromkeys(arg.name for arg in call.args if isinstance(arg, Weight))
        groups.append([named.pop(name) for name in names if name in named])
    assert not named, f"no call reads {', '.join(named)}"
    return groups
