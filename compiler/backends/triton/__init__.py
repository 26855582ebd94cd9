"""The GPU backend: Triton kernels as machine code for one architecture, and a Program that starts them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from belle_compile.compiler.backends import Lowered

if TYPE_CHECKING:
    import onnx_ir as ir

    from belle_compile.compiler.backends.triton.kernels.base import Kernel


def compile_graphs(
    models: Sequence[ir.Model], archs: Sequence[str], *, calls_before_fusion: int, kv_cache: str = "auto"
) -> list[Lowered]:
    """Lower the verified graph of each rank and compile its kernels, each with its variants and alternatives. Ranks with the
    same kernels share their code."""
    from belle_compile.compiler.backends.triton.compile import archive, compile_kernels, toolchain
    from belle_compile.compiler.backends.triton.lower import lower

    (arch,) = archs
    ranks = [lower(model, calls_before_fusion, kv_cache) for model in models]
    choices = [some for rank in ranks for kernel in rank.kernels for _, some in _choices(kernel)]
    compiled = compile_kernels([first for first, *_ in choices], arch, [one for _, *others in choices for one in others])
    lowered = []
    for rank in ranks:
        names, alternatives = _named(rank.kernels, compiled.keys())
        launches = {name: compiled[name][1] for name in sorted(names)}
        program = replace(rank.program, launches=launches, alternatives=alternatives)
        file = archive({name: compiled[name][0] for name in names})
        lowered.append(Lowered(program, rank.weights, {f"kernels-{arch}.zip": file}, toolchain(), buffers=rank.buffers))
    return lowered


def _choices(kernel: Kernel) -> list[tuple[int | None, tuple[Kernel, ...]]]:
    """Of a kernel, each variant with its alternatives."""
    return [(bound, (variant, *variant.alternatives())) for bound, variant in kernel.variants()]


def _named(kernels: Sequence[Kernel], compiled: Collection[str]) -> tuple[set[str], dict[str, dict[str, tuple[str, ...]]]]:
    """All names, and those of alternatives as a program has them, of what was compiled."""
    names: set[str] = set()
    alternatives: dict[str, dict[str, tuple[str, ...]]] = {}
    for kernel in kernels:
        for bound, (variant, *others) in _choices(kernel):
            there = tuple(one.name for one in others if one.name in compiled)
            names |= {variant.name, *there}
            if there:
                alternatives.setdefault(variant.name, {})["any" if bound is None else str(bound)] = there
    return names, alternatives
