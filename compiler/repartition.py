"""An engine for another number of ranks, made of one that is there: without its checkpoint, and nothing is quantized again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from belle_compile.compiler import targets
from belle_compile.compiler.backends import BEHIND_LOGITS, Lowered, compile_graphs, count_kernel_calls, plan_graph
from belle_compile.compiler.driver import KV_CACHES, TUNING
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.footprint import SERVED_TOKENS, check_memory, file_bytes, required_bytes
from belle_compile.compiler.ir.text import from_onnx
from belle_compile.compiler.report import REPORT_NAME, Effects, Report, memory_of, render
from belle_compile.compiler.unpacking import WholeWeights
from belle_compile.compiler.writer import GRAPH_NAME, EngineWriter, write_ranks
from belle_compile.passes.partition.partition_tensors import PartitionTensors
from belle_compile.passes.pipeline import FUSION, run_for, run_ranks
from belle_compile.runtime.artifact import (
    KernelCalls,
    Manifest,
    PassRecord,
    Requirements,
    TargetInfo,
    read_manifest,
    verify_files,
)
from belle_compile.runtime.program import KVLayout, Program, read_program

if TYPE_CHECKING:
    import onnx_ir as ir

    from belle_compile.passes.base import Pass

_TOKENIZER = "tokenizer.json"
_PARTITION = PartitionTensors(0, 1).name
_MADE = "made from an engine for other ranks, whose report has what was measured of that"
_UNMEASURED = "not measured: made from an engine, without the model's own logits"


@dataclass(frozen=True)
class RepartitionRequest:
    """Which engine to make another one of, for what, and where to; the others as in a `BuildRequest`."""

    engine: Path
    output: Path
    target: str
    force: bool = False
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None


def repartition(request: RepartitionRequest) -> Path:
    """Makes an engine for the target of the weights in another; returns its path.

    Weights, programs and kernels are those, byte for byte, that a build of the checkpoint for this target gives (but for
    kernels built with `tune`: tilings are those of this repository here). The accuracy in the manifest is not taken over: where
    ranks sum, activations are rounded by what each of them has.

    Raises CompileError where the engine has no graph, or does not fit the target, EngineError where it is damaged.
    """
    old = read_manifest(request.engine)
    target = targets.parse(request.target)
    if old.target.backend == ("triton" if target.is_gpu else "tvm"):
        target = target.carrying(old.target.isas)
    say = request.on_progress
    if GRAPH_NAME not in old.files:
        remedy = "build it again from its checkpoint"
        raise CompileError("repartition", f"engine {request.engine}", found=f"no {GRAPH_NAME}", remedy=remedy)
    with EngineWriter(request.output, force=request.force) as writer:
        verify_files(request.engine, old, full=True, progress=lambda file, done, total: say("digest", done, total))
        say("optimize", 0, 0)
        weights, program = (
            WholeWeights(request.engine, rows=old.target.backend == "triton"),
            read_program(request.engine / "rank0"),
        )
        graph_bytes = (request.engine / GRAPH_NAME).read_bytes()
        graph = from_onnx(graph_bytes, weights.tensor)
        fusions = _fusions(old)
        weights.find(_divided(graph, fusions, old.target.ranks)[0])
        check_memory(target, partial(_planned, graph, fusions, program, target))
        graphs, records = _divided(graph, fusions, target.ranks)

        say("compile", 0, 0)
        lowered = compile_graphs(
            graphs, target, calls_before_fusion=_calls_before_fusion(program, graph, target.ranks),
            kv_cache=_kv_cache(program.kv, target),
        )  # fmt: skip
        writer.check_space(sum(map(file_bytes, lowered)))
        writer.write(_TOKENIZER, (request.engine / _TOKENIZER).read_bytes())
        writer.write(GRAPH_NAME, graph_bytes)
        write_ranks(writer, lowered, lambda done, total: say("weights", done, total))
        manifest = _manifest(old, target, records, lowered)
        ranks = [memory_of(rank, required_bytes(rank), SERVED_TOKENS) for rank in lowered]
        memory, several = max(ranks, key=lambda rank: rank.required), ranks if len(ranks) > 1 else ()
        report = Report(
            manifest, dict(writer.files), Effects(unmeasured=_UNMEASURED), memory, ranks=several, uncalibrated=_MADE
        )
        writer.write(REPORT_NAME, render(report).encode())
        return writer.finish(manifest)


def _fusions(manifest: Manifest) -> list[Pass]:
    """The fusions of an engine, as its passes are named."""
    known = {step.name: step for step in FUSION}
    return [known[record.name] for record in manifest.passes if record.name in known]


def _divided(graph: ir.Model, fusions: Sequence[Pass], ranks: int) -> tuple[list[ir.Model], list[dict[str, Any]]]:
    """The graphs of the ranks, and what the passes did; `graph` stays as it is."""
    return run_for(graph.clone(), fusions, ranks)


def _planned(graph: ir.Model, fusions: Sequence[Pass], program: Program, target: targets.Target, ranks: int) -> list[Lowered]:
    return [plan_graph(model, target.is_gpu, _kv_cache(program.kv, target)) for model in _divided(graph, fusions, ranks)[0]]


def _kv_cache(kv: KVLayout, target: targets.Target) -> str:
    """The type of the new KV cache: the old one, but for GPUs, which have no bfloat16 cache."""
    return "float16" if target.is_gpu and kv.dtype == "bfloat16" else kv.dtype


def _calls_before_fusion(program: Program, graph: ir.Model, ranks: int) -> int:
    """What the engine's program says, with the sums of the new ranks for those that it has."""
    added = count_kernel_calls(run_ranks(graph, (), ranks)[0][0]) - count_kernel_calls(graph) if ranks > 1 else 0
    own = sum(call.all_reduce is not None or call.kind in BEHIND_LOGITS for call in program.calls)
    return program.kernel_calls.before_fusion - own + added


def _manifest(old: Manifest, target: targets.Target, records: Sequence[dict[str, Any]], lowered: Sequence[Lowered]) -> Manifest:
    calls, memory = lowered[0].program.kernel_calls, max(map(required_bytes, lowered))
    fused = {_PARTITION, *(step.name for step in FUSION)}
    before = [record for record in old.passes if record.name not in fused and record.name != TUNING]
    after = [PassRecord(r["name"], r["options"], int(r["changes"]), tuple(r["refusals"])) for r in records]
    return replace(
        old,
        target=TargetInfo(
            target.name,
            "triton" if target.is_gpu else "tvm",
            target.isas,
            Requirements(target.arch, target.isas, memory),
            target.ranks,
        ),
        passes=(*before, *after),
        kernel_calls=KernelCalls(calls.before_fusion, calls.after_fusion),
        toolchain=dict(old.toolchain) | dict(lowered[0].toolchain),
        quantization=dict(old.quantization) | {"kv_cache": KV_CACHES[lowered[0].program.kv.dtype]},
        files={},
        accuracy=None,
    )
