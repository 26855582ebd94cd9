"""The TorchScript backend: a rank's graph as a traced module, for hosts that have PyTorch or libtorch.

The module computes with PyTorch's own kernels. Its int8 products are exact, with the scale of each token: in those of
`quantized::linear_dynamic` all tokens of a step have one scale, so that an answer would depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from belle_compile.compiler.backends.base import Array, Backend, CompileOptions, Footprint, Passes, Payload, Repartitionable
from belle_compile.compiler.devices import Device, Target
from belle_compile.compiler.kv_types import AUTO
from belle_compile.runtime.artifact import KernelCalls
from belle_compile.runtime.executors.torchscript_model import MODEL_NAME, read_facts

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

    from belle_compile.passes.presets import Recipe

_EXACT = ("amx", "avx512vnni")  # instruction sets with which PyTorch's int8 products are exact


class TorchScriptBackend(Backend, Repartitionable):
    """Makes engines for x86-64 processors with VNNI that run where PyTorch is installed; one rank."""

    name = "torchscript"
    kv_types = ("float32", "bfloat16", "float16", "int8")

    def isas(self, device: Device) -> tuple[str, ...]:
        return tuple(isa for isa in device.isas if isa in _EXACT)

    def passes(self, recipe: Recipe) -> Passes:
        return Passes()

    def refusal(self, target: Target, recipe: Recipe) -> str:
        if target.ranks > 1:
            return "several ranks, where a module runs in one process"
        if recipe.weights.group is not None:
            return f"weights in {recipe.weights}, for which PyTorch has no product with integer activations"
        return super().refusal(target, recipe)

    def footprint(self, graphs: Sequence[ir.Model], target: Target, kv_cache: str = AUTO) -> list[Footprint]:
        from belle_compile.compiler.backends.torchscript.weights import footprint

        return [footprint(graph, kv_cache) for graph in graphs]

    def compile(self, graphs: Sequence[ir.Model], target: Target, options: CompileOptions) -> list[Payload]:
        return [self._payload(graph, options) for graph in graphs]

    def _payload(self, graph: ir.Model, options: CompileOptions) -> Payload:
        from belle_compile.compiler.backends.torchscript.module import trace
        from belle_compile.compiler.backends.torchscript.weights import facts_text, footprint, stored_weights

        options.on_kernels(0, 1)
        needed = footprint(graph, options.kv_cache)
        model = trace(graph, facts_text(graph, needed.kv.dtype))
        options.on_kernels(1, 1)
        return Payload(
            files={MODEL_NAME: model},
            weights=[stored_weights(graph)],
            footprint=needed,
            kernel_calls=KernelCalls(options.unfused_calls, self.kernel_calls(graph)),
            toolchain={"torch": version("torch")},
        )

    def has_kernels(self, graph: ir.Model) -> bool:
        from belle_compile.compiler.backends.torchscript.module import SUPPORTED

        return all(node.op_type in SUPPORTED for node in graph.graph)

    def kv_type(self, rank: Path) -> str:
        return read_facts(rank / MODEL_NAME).kv_dtype

    def unpack(self, packed: Array, shape: tuple[int, ...], dtype: str) -> Array:
        from belle_compile.compiler.backends.torchscript.weights import unpack

        return unpack(packed, shape)
