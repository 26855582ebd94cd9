"""The CPU backend: TIR kernels for several instruction sets in one engine, and a Program that calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

from belle_compile.compiler.backends.base import (
    PROCESS_BYTES,
    TUNING,
    Array,
    CompileOptions,
    Payload,
    Reached,
)
from belle_compile.compiler.backends.program.backend import ProgramBackend
from belle_compile.compiler.backends.tvm.isa import ISAS
from belle_compile.compiler.devices import Device, Target
from belle_compile.runtime.artifact import PassRecord

if TYPE_CHECKING:
    import onnx_ir as ir

    from belle_compile.compiler.backends.program.lowering import LoweredGraph
    from belle_compile.compiler.backends.tvm.kernels.base import Kernel
    from belle_compile.compiler.backends.tvm.tuning.table import TilingTable
    from belle_compile.runtime.program import Program

# Fitted to measurements on two cores of a Zen 4 (benchmarks/results/README.md, SCALING.md) and of a Xeon with AMX (ranks.json);
# PLAN.md compares predictions and measurements. LLaMA-1.1B decodes at 0.94 of the read bandwidth, and a step of SmolLM2 takes
# 0.75 ms beyond its reads, in 306 calls.
_REACHED = Reached(
    read=0.94, several=0.92, integer=0.85, floating=0.5, call_s=2.4e-6, source="measured on hosts with Zen 4 and with AMX"
)


class TvmBackend(ProgramBackend):
    """Makes engines for x86-64 processors, with kernels for several instruction sets, of which the runtime uses the best that
    its host has. Weights are stored in panels of 16 outputs.

    Kernels get the tilings of the tables in this repository. With `CompileOptions.tune`, the tilings for the best instruction
    set of this host are measured during the build instead.
    """

    name = "tvm"
    kv_types = ("float32", "bfloat16", "float16", "int8")
    reached: Reached | None = _REACHED
    process_bytes = PROCESS_BYTES
    maps_weights = True

    def isas(self, device: Device) -> tuple[str, ...]:
        return tuple(isa for isa in device.isas if isa in ISAS)

    def tuning_refusal(self, target: Target) -> str:
        return ""

    def lower(self, graph: ir.Model, unfused_calls: int, kv_cache: str) -> LoweredGraph:
        from belle_compile.compiler.backends.tvm.lower import lower

        return lower(graph, unfused_calls, kv_cache)

    def compile(self, graphs: Sequence[ir.Model], target: Target, options: CompileOptions) -> list[Payload]:
        """Compile each rank; ranks with the same kernels share their libraries."""
        ranks = [self.lower(graph, options.unfused_calls, options.kv_cache) for graph in graphs]
        tuned = _tune([(rank.program, rank.kernels) for rank in ranks], target.isas, options.tune) if options.tune else None
        record = tuning_record(tuned) if tuned else None
        distinct = {frozenset(rank.kernels): rank for rank in ranks}
        tables_of = {key: _tables(rank.kernels, target.isas, tuned) for key, rank in distinct.items()}
        done, total = 0, sum(len(key) * len(tables) for key, tables in tables_of.items())
        compiled: dict[frozenset[Kernel], dict[str, bytes]] = {}
        for key, rank in distinct.items():
            compiled[key] = {}
            for table in tables_of[key]:
                options.on_kernels(done, total)
                compiled[key] |= self.files(rank, table)
                done += len(rank.kernels)
        options.on_kernels(done, total)
        payloads = []
        for rank in ranks:
            key = frozenset(rank.kernels)
            tables = tables_of[key]
            toolchain = versions() | {"kernel tilings": "; ".join(table.describe() for table in tables)}
            payloads.append(self.payload(rank, rank.program, partial(_sealed, compiled[key]), toolchain, record))
        return payloads

    def files(self, rank: LoweredGraph, table: TilingTable) -> dict[str, bytes]:
        """The files of a rank for one instruction set by name: the library of its kernels."""
        from belle_compile.compiler.backends.tvm.library import compile_library

        return {table.library: compile_library(rank.kernels, ISAS[table.isa], table)}

    def unpack(self, packed: Array, shape: tuple[int, ...], dtype: str) -> Array:
        from belle_compile.compiler.backends.tvm.packing import unpack

        return unpack(packed, shape, dtype)


def _sealed(files: Mapping[str, bytes], seal: bytes) -> Mapping[str, bytes]:
    """Libraries with a seal behind their last section, where loaders of ELF files do not look; other files as they are."""
    return {name: content + seal if name.endswith(".so") else content for name, content in files.items()}


def tuning_record(tuned: TilingTable) -> PassRecord:
    """The manifest's record of a table measured for a build; its `changes` are the number of shapes measured."""
    notes = () if tuned.entries else ("the model has no int8 linear layer to tune",)
    return PassRecord(TUNING, tuned.to_plain(), len(tuned.entries), notes)


def versions() -> dict[str, str]:
    """The versions of the tools that compile the libraries."""
    from belle_compile.compiler.backends.tvm.library import compiler_version

    return {name: version(name) for name in ("apache-tvm", "apache-tvm-ffi")} | {"C compiler": compiler_version()}


def _tables(kernels: Sequence[Kernel], isas: Sequence[str], tuned: TilingTable | None) -> list[TilingTable]:
    """The tilings of each library. For an instruction set these are the table measured for this build, else the repository's
    common table and those tables of single processors that compile a kernel differently."""
    from belle_compile.compiler.backends.tvm.tuning.table import processors, read_table

    tables = []
    for isa in isas:
        if tuned and tuned.entries and tuned.isa == isa:
            tables.append(tuned)
            continue
        common = read_table(isa)
        processor_tables = (read_table(isa, processor) for processor in processors(isa))
        tables += [common, *(table for table in processor_tables if _differ(kernels, table, common))]
    return tables


def _differ(kernels: Sequence[Kernel], first: TilingTable, second: TilingTable) -> bool:
    """Whether the two tables give any of the kernels different tilings."""
    from belle_compile.compiler.backends.tvm.library import tiled

    return any(tiled(kernel, first) != tiled(kernel, second) for kernel in kernels)


def _tune(
    ranks: Sequence[tuple[Program, Sequence[Kernel]]], isas: Sequence[str], progress: Callable[[int, int], None]
) -> TilingTable:
    """Measure the shapes of all ranks' programs on this host."""
    from belle_compile.compiler.backends.tvm.tuning import search
    from belle_compile.runtime.executors.cpu import choose_isa

    rows: dict[Kernel, int] = {}
    for program, kernels in ranks:
        limits = {"T": program.max_tokens, "R": program.max_rows}
        rows_by_name = {call.kernel: limits[call.rows] for call in program.calls}
        rows |= {kernel: rows_by_name[kernel.name] for kernel in kernels}
    return search.search(search.shapes_of(rows), ISAS[choose_isa(tuple(isas))], progress=progress)
