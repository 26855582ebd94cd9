"""The GPU backend: Triton kernels compiled to machine code for one architecture, and a Program that launches them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from belle_compile.compiler.backends.base import Array, CompileOptions, Payload, Reached
from belle_compile.compiler.backends.program.backend import ProgramBackend
from belle_compile.compiler.backends.triton.installed import require_triton
from belle_compile.compiler.devices import Device, Target
from belle_compile.runtime.host import GPU_ARCHS, GPU_RESERVE_BYTES

if TYPE_CHECKING:
    import onnx_ir as ir

    from belle_compile.compiler.backends.program.lowering import LoweredGraph
    from belle_compile.compiler.backends.triton.kernels.base import Kernel
    from belle_compile.passes.presets import Recipe

_INT8_BITS = 8  # the fewest bits of a weight that a kernel reads

# Fitted to BLOOM-7B's shape on an H200 (benchmarks/results/gpu-check.json). `read`: the head's weights are read at 0.95 of the
# data sheet's bandwidth. `call_s`: a token takes 0.33 ms more than reading all weights, in 307 calls. `several`: batches of 8.
# `integer` and `floating`: a prompt of 2,048 tokens, the former with the time of norms and activations, the latter for
# attention alone.
_REACHED = Reached(
    read=0.93, several=0.58, integer=0.4, floating=0.16, call_s=1.1e-6,
    source="measured on an H200; other GPUs are taken to reach the same shares of their figures",
)  # fmt: skip


class TritonBackend(ProgramBackend):
    """Makes engines for NVIDIA GPUs; the host of the build needs no GPU. The rows of weights are padded with zeros. A kernel
    may have variants for numbers of rows and alternatives, among which the serving host chooses by measurement when it first
    loads the engine."""

    name = "triton"
    kv_types = ("float32", "float16", "int8")
    reached = _REACHED
    process_bytes = GPU_RESERVE_BYTES
    maps_weights = False  # they are copied to the GPU

    def isas(self, device: Device) -> tuple[str, ...]:
        return tuple(isa for isa in device.isas if isa in GPU_ARCHS)

    def estimates(self, device: Device) -> bool:
        return bool(device.compute_capability)

    def refusal(self, target: Target, recipe: Recipe) -> str:
        if recipe.weights.bits < _INT8_BITS:
            return f"int{recipe.weights.bits} weights, for which it has no kernel"
        return super().refusal(target, recipe)

    def tuning_refusal(self, target: Target) -> str:
        return "nothing to measure: the host that serves chooses among the engine's kernels when it first loads it"

    def lower(self, graph: ir.Model, unfused_calls: int, kv_cache: str) -> LoweredGraph:
        require_triton()
        from belle_compile.compiler.backends.triton.lower import lower

        return lower(graph, unfused_calls, kv_cache)

    def compile(self, graphs: Sequence[ir.Model], target: Target, options: CompileOptions) -> list[Payload]:
        """Compile each rank; a kernel that several ranks have is compiled once."""
        from belle_compile.compiler.backends.triton.compile import compile_kernels, toolchain

        (arch,) = target.isas
        ranks = [self.lower(graph, options.unfused_calls, options.kv_cache) for graph in graphs]
        choices = [variants for rank in ranks for kernel in rank.kernels for _, variants in _choices(kernel)]
        needed, alternatives = [first for first, *_ in choices], [kernel for _, *others in choices for kernel in others]
        compiled = compile_kernels(needed, arch, alternatives, on_kernels=options.on_kernels)
        payloads = []
        for rank in ranks:
            names, alternative_names = _compiled_names(rank.kernels, compiled.keys())
            launches = {name: compiled[name][1] for name in sorted(names)}
            program = replace(rank.program, launches=launches, alternatives=alternative_names)
            modules = {name: compiled[name][0] for name in names}
            payloads.append(self.payload(rank, program, partial(_archived, f"kernels-{arch}.zip", modules), toolchain()))
        return payloads

    def unpack(self, packed: Array, shape: tuple[int, ...], dtype: str) -> Array:
        inside = tuple(slice(size) for size in shape)
        values: Array = packed[inside]
        return values


def _archived(name: str, modules: Mapping[str, bytes], seal: bytes) -> Mapping[str, bytes]:
    """The archive of machine code under its file name."""
    from belle_compile.compiler.backends.triton.compile import archive

    return {name: archive(modules, seal)}


def _choices(kernel: Kernel) -> list[tuple[int | None, tuple[Kernel, ...]]]:
    """Each variant of a kernel with its alternatives, by the variant's bound on the rows."""
    return [(bound, (variant, *variant.alternatives())) for bound, variant in kernel.variants()]


def _compiled_names(
    kernels: Sequence[Kernel], compiled: Collection[str]
) -> tuple[set[str], dict[str, dict[str, tuple[str, ...]]]]:
    """The names of all variants and alternatives of `kernels` that were compiled, and the alternatives as a program holds
    them."""
    names: set[str] = set()
    alternatives: dict[str, dict[str, tuple[str, ...]]] = {}
    for kernel in kernels:
        for bound, (variant, *others) in _choices(kernel):
            compiled_others = tuple(other.name for other in others if other.name in compiled)
            names |= {variant.name, *compiled_others}
            if compiled_others:
                alternatives.setdefault(variant.name, {})["any" if bound is None else str(bound)] = compiled_others
    return names, alternatives
