"""Make an engine for another number of ranks from an existing one, without its checkpoint and without quantizing again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from belle_compile.compiler import backends, targets
from belle_compile.compiler.backends import Backend, CompileOptions, Footprint, Payload, Repartitionable
from belle_compile.compiler.backends.base import ANY_LIBRARY, FIXED_BYTES, TUNING, LibraryChoice
from belle_compile.compiler.devices import Target
from belle_compile.compiler.engine_graph import fusions_of, graph_of, reader_of
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.footprint import check_memory
from belle_compile.compiler.golden import golden_answers
from belle_compile.compiler.kv_types import KV_TYPES
from belle_compile.compiler.manifests import pass_records, target_info
from belle_compile.compiler.report import REPORT_NAME, Effects, Report, memory_of_ranks, render
from belle_compile.compiler.stages import divided, unfused_calls
from belle_compile.compiler.writer import GRAPH_NAME, EngineWriter, write_ranks
from belle_compile.passes.partition.partition_tensors import PartitionTensors
from belle_compile.passes.pipeline import FUSION, run_for
from belle_compile.passes.presets import UNQUANTIZED
from belle_compile.runtime.adapters.basis import BASIS_NAME
from belle_compile.runtime.artifact import Manifest, read_manifest, verify_files
from belle_compile.runtime.selftest import SELF_TEST_NAME

if TYPE_CHECKING:
    pass

_TOKENIZER = "tokenizer.json"
_PARTITION = PartitionTensors(0, 1).name
_MADE = "made from an engine for other ranks, whose report has what was measured of that"
_UNMEASURED = "not measured: made from an engine, without the model's own logits"


@dataclass(frozen=True)
class RepartitionRequest:
    """The engine to start from, the target and the directory of the new one; the other fields are those of `BuildRequest`.
    `backend` defaults to the engine's own, or to the target's default where the engine's does not serve it."""

    engine: Path
    output: Path
    target: str
    force: bool = False
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    backend: str | None = None
    library: LibraryChoice = ANY_LIBRARY


@dataclass(frozen=True)
class _Job:
    """The manifest of the old engine, the backend that reads its weights, and the target and backend of the new engine."""

    old: Manifest
    reader: Repartitionable
    target: Target
    backend: Backend


def repartition(request: RepartitionRequest) -> Path:
    """Make an engine for another target from the weights of an engine; returns its path.

    Weights, programs and kernels are byte for byte those of a build of the checkpoint for this target; an engine built with
    `tune` gets the built-in tilings instead of its measured ones. The manifest's accuracy is dropped, because it depends on the
    number of ranks: each rank rounds the activations that it holds before ranks sum.

    Raises CompileError if the engine has no graph or does not fit the target, EngineError if it is damaged.
    """
    job, on_progress = _resolve(request), request.on_progress
    target, backend = job.target, job.backend
    with EngineWriter(request.output, force=request.force) as writer:
        verify_files(request.engine, job.old, full=True, progress=lambda file, done, total: on_progress("digest", done, total))
        on_progress("optimize", 0, 0)
        graph, fusions = graph_of(request.engine, job.old, job.reader), fusions_of(job.old, backend)
        kv_cache = backend.nearest_kv_type(job.reader.kv_type(request.engine / "rank0"))

        def footprints(ranks: int) -> list[Footprint]:
            return backend.footprint(divided(graph, fusions, ranks), target.with_ranks(ranks), kv_cache)

        check_memory(target, footprints)
        graphs, records = run_for(graph.clone(), fusions, target.ranks)

        on_progress("compile", 0, 0)
        options = CompileOptions(
            kv_cache,
            unfused_calls(backend, graph, target.ranks),
            on_kernels=partial(on_progress, "compile"),
            library=request.library,
        )
        payloads = backend.compile(graphs, target, options)
        writer.check_space(sum(payload.file_bytes for payload in payloads) + FIXED_BYTES)
        writer.write(_TOKENIZER, (request.engine / _TOKENIZER).read_bytes())
        writer.write(GRAPH_NAME, (request.engine / GRAPH_NAME).read_bytes())
        write_ranks(writer, payloads, lambda done, total: on_progress("weights", done, total))
        manifest = _manifest(job, records, payloads)
        on_progress("self-test", 0, 0)
        golden = golden_answers(writer.draft(manifest), manifest, backend, graphs, payloads[0].footprint.kv.dtype)
        writer.write(SELF_TEST_NAME, golden.to_text().encode())
        memory, ranks = memory_of_ranks(payloads)
        files, effects = dict(writer.files), Effects(unmeasured=_UNMEASURED)
        report = Report(manifest, files, effects, memory, ranks=ranks, uncalibrated=_MADE)
        writer.write(REPORT_NAME, render(report).encode())
        return writer.finish(manifest)


def _resolve(request: RepartitionRequest) -> _Job:
    """Read the engine's manifest and look up the names in the request. If the backend stays the same, the new engine is for
    those of the old one's instruction sets that the target has."""
    old = read_manifest(request.engine)
    reader = reader_of(request.engine, old, "repartition")
    if BASIS_NAME in old.files:
        found, remedy = "an engine that takes adapters", "build it again from its checkpoint"
        raise CompileError("repartition", f"engine {request.engine}", found=found, remedy=remedy)
    device, *_ = targets.resolve(request.target)
    own = backends.get(old.target.backend)
    name = request.backend or (own.name if own.isas(device) else None)
    target, backend = targets.choose(request.target, name)
    if backend is own:
        target = target.carrying([isa for isa in old.target.isas if isa in target.isas])
    backends.check(backend, target, UNQUANTIZED)
    backend.check_library(target, request.library)
    return _Job(old, reader, target, backend)


def _manifest(job: _Job, records: Sequence[dict[str, Any]], payloads: Sequence[Payload]) -> Manifest:
    first = payloads[0]
    replaced = {_PARTITION, TUNING, *(step.name for step in FUSION)}
    before = [record for record in job.old.passes if record.name not in replaced]
    return replace(
        job.old,
        target=target_info(job.target, job.backend, payloads),
        passes=(*before, *pass_records(records)),
        kernel_calls=first.kernel_calls,
        toolchain=dict(job.old.toolchain) | dict(first.toolchain),
        quantization=dict(job.old.quantization) | {"kv_cache": KV_TYPES[first.footprint.kv.dtype].manifest},
        files={},
        accuracy=None,
    )
