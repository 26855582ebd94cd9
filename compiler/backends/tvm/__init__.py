"""The CPU backend: TIR kernels for several instruction sets in one engine, and a Program that calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from belle_compile.compiler.backends import Lowered

if TYPE_CHECKING:
    import onnx_ir as ir

    from belle_compile.compiler.backends.tvm.kernels.base import Kernel
    from belle_compile.compiler.backends.tvm.tuning.table import TilingTable
    from belle_compile.runtime.program import Program


def compile_graphs(
    models: Sequence[ir.Model],
    isas: Sequence[str] = ("avx2", "avx512vnni", "amx"),
    *,
    calls_before_fusion: int,
    kv_cache: str = "auto",
    tune: Callable[[int, int], None] | None = None,
) -> list[Lowered]:
    """Lower the verified graph of each rank and compile its kernels for every instruction set named; `kv_cache` as in `lower`.
    Ranks with the same kernels share their libraries.

    The kernels' tilings are those of the tables in this repository, and nothing is measured, unless `tune` is given: then
    those of the best instruction set that this host has are searched here, and `tune(done, total)` hears of each shape.
    """
    from belle_compile.compiler.backends.tvm.isa import ISAS
    from belle_compile.compiler.backends.tvm.library import compile_library
    from belle_compile.compiler.backends.tvm.lower import lower

    ranks = [lower(model, calls_before_fusion, kv_cache) for model in models]
    tuned = _tune([(program, kernels) for program, _, kernels, _ in ranks], isas, tune) if tune else None
    compiled: dict[frozenset[Kernel], Mapping[str, bytes]] = {}
    lowered = []
    for program, weights, kernels, buffers in ranks:
        tables, same = _tables(kernels, isas, tuned), frozenset(kernels)
        if same not in compiled:
            compiled[same] = {table.library: compile_library(kernels, ISAS[table.isa], table) for table in tables}
        toolchain = _versions() | {"kernel tilings": "; ".join(table.describe() for table in tables)}
        lowered.append(Lowered(program, weights, compiled[same], toolchain, tuned, buffers))
    return lowered


def _versions() -> dict[str, str]:
    """What the libraries were compiled with."""
    from belle_compile.compiler.backends.tvm.library import compiler_version

    return {name: version(name) for name in ("apache-tvm", "apache-tvm-ffi")} | {"C compiler": compiler_version()}


def _tables(kernels: Sequence[Kernel], isas: Sequence[str], tuned: TilingTable | None) -> list[TilingTable]:
    """The tilings of each library: what was measured now, else those of this repository, and those of single processors where
    they differ for some kernel."""
    from belle_compile.compiler.backends.tvm.tuning.table import processors, read_table

    tables = []
    for isa in isas:
        if tuned and tuned.entries and tuned.isa == isa:
            tables.append(tuned)
            continue
        common = read_table(isa)
        own = [
            table for table in (read_table(isa, processor) for processor in processors(isa)) if _differ(kernels, table, common)
        ]
        tables += [common, *own]
    return tables


def _differ(kernels: Sequence[Kernel], one: TilingTable, other: TilingTable) -> bool:
    """Whether some kernel is to be compiled differently by two tables."""
    from belle_compile.compiler.backends.tvm.library import tiled

    return any(tiled(kernel, one) != tiled(kernel, other) for kernel in kernels)


def _tune(
    ranks: Sequence[tuple[Program, Sequence[Kernel]]], isas: Sequence[str], progress: Callable[[int, int], None]
) -> TilingTable:
    """Measure the shapes of all ranks' programs on this host."""
    from belle_compile.compiler.backends.tvm.isa import ISAS
    from belle_compile.compiler.backends.tvm.tuning import search
    from belle_compile.runtime.executors.cpu import choose_isa

    rows: dict[Kernel, int] = {}
    for program, kernels in ranks:
        limits = {"T": program.max_tokens, "R": program.max_rows}
        named = {call.kernel: limits[call.rows] for call in program.calls}
        rows |= {kernel: named[kernel.name] for kernel in kernels}
    return search.search(search.shapes_of(rows), ISAS[choose_isa(tuple(isas))], progress=progress)
