"""The TorchScript backend: a rank's program as a traced module, for hosts that have PyTorch or libtorch.

The module calls the kernels of the TVM backend, which the engine's libraries register as operators of libtorch. PyTorch's own
int8 products do not do: `quantized::linear_dynamic` has one scale for all tokens of a step, so that an answer would depend on
its neighbours, and `onednn::qlinear_pointwise`, which is exact, is slower.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING

from belle_compile.compiler.backends.base import Backend, CompileOptions, Payload
from belle_compile.compiler.backends.tvm import TvmBackend, versions
from belle_compile.compiler.backends.tvm.isa import ISAS
from belle_compile.compiler.devices import Target
from belle_compile.runtime.executors.torchscript_model import model_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from belle_compile.compiler.backends.program.lowering import LoweredGraph
    from belle_compile.compiler.backends.tvm.tuning.table import TilingTable
    from belle_compile.passes.presets import Recipe

_TORCH_BYTES = 256 << 20  # host memory of PyTorch's libraries


class TorchScriptBackend(TvmBackend):
    """Makes engines for x86-64 processors that run where PyTorch is installed; one rank.

    `plan` predicts no times: those of the TVM backend are without PyTorch's dispatcher.
    """

    name = "torchscript"
    reached = None
    process_bytes = TvmBackend.process_bytes + _TORCH_BYTES

    def adapter_refusal(self, target: Target) -> str:
        return Backend.adapter_refusal(self, target)

    def refusal(self, target: Target, recipe: Recipe) -> str:
        if target.ranks > 1:
            return "several ranks, where a module runs in one process"
        return super().refusal(target, recipe)

    def compile(self, graphs: Sequence[ir.Model], target: Target, options: CompileOptions) -> list[Payload]:
        payloads = super().compile(graphs, target, options)
        return [replace(payload, toolchain={**payload.toolchain, "torch": version("torch")}) for payload in payloads]

    def files(self, rank: LoweredGraph, table: TilingTable) -> dict[str, bytes]:
        """The library of the rank's kernels, which registers them as operators, and the module that calls these."""
        from belle_compile.compiler.backends.torchscript.module import in_namespace, trace
        from belle_compile.compiler.backends.torchscript.operators import namespace_of, operators_of, source_of
        from belle_compile.compiler.backends.tvm.library import compile_library

        operators = operators_of(rank.program, rank.kernels)
        toolchain = ", ".join(f"{name} {found}" for name, found in versions().items())
        namespace = namespace_of(operators, repr(rank.program), table.to_json(), toolchain)
        library = compile_library(rank.kernels, ISAS[table.isa], table, source_of(operators, namespace))
        module = in_namespace(trace(rank.program, operators, rank.weights), namespace)
        return {table.library: library, model_name(table.library): module}
