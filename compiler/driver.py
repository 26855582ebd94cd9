"""A build from checkpoint to engine directory: every step is one call here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from belle_compile.compiler import layers
from belle_compile.compiler.accuracy import Accuracy
from belle_compile.compiler.adapter_basis import basis_file, basis_of
from belle_compile.compiler.backends import CompileOptions, Footprint, Payload
from belle_compile.compiler.backends.base import FIXED_BYTES
from belle_compile.compiler.build_request import BuildRequest, Job, resolve
from belle_compile.compiler.calibration import Calibration, prompt_template, read_calibration, special_tokens
from belle_compile.compiler.checkpoint import Checkpoint, open_checkpoint
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import build_graph
from belle_compile.compiler.footprint import check_memory
from belle_compile.compiler.golden import golden_answers
from belle_compile.compiler.integers import IntegerPlan, damage_record, integer_plan
from belle_compile.compiler.ir.lazy import describe
from belle_compile.compiler.ir.text import to_onnx
from belle_compile.compiler.judging import accuracy_of
from belle_compile.compiler.kv_types import KV_TYPES
from belle_compile.compiler.layers import Unquantized
from belle_compile.compiler.manifests import pass_records, target_info, toolchain
from belle_compile.compiler.places import checkpoint_name
from belle_compile.compiler.reading import DECRYPT
from belle_compile.compiler.report import (
    REPORT_NAME,
    Effects,
    PassEffects,
    Report,
    coverage_of,
    coverage_of_set,
    memory_of_ranks,
    pass_effects,
    render,
)
from belle_compile.compiler.request_writer import Written, write
from belle_compile.compiler.stages import Snapshots, carried, divided, unfused_calls
from belle_compile.compiler.weight_budget import check_least
from belle_compile.compiler.work_folder import keep_report, work_folder
from belle_compile.compiler.writer import GRAPH_NAME, EngineWriter, write_ranks
from belle_compile.passes.adapters.linears import adapted_linears
from belle_compile.passes.calibration.choose_bits import bits_within, steps_of
from belle_compile.passes.calibration.data import CalibrationData
from belle_compile.passes.calibration.sensitivity import LayerDamage
from belle_compile.passes.pipeline import passes_of, run_for, run_pipeline
from belle_compile.passes.presets import Recipe, manifest_words
from belle_compile.passes.quantization.scheme import ONE_SIZE, MoreBits
from belle_compile.runtime import host
from belle_compile.runtime.adapters.basis import BASIS_NAME
from belle_compile.runtime.artifact import GenerationDefaults, Manifest, ModelInfo, PassRecord
from belle_compile.runtime.memory import reuse_heap
from belle_compile.runtime.selftest import SELF_TEST_NAME

if TYPE_CHECKING:
    import onnx_ir as ir

    from belle_compile.passes.base import Pass
    from belle_compile.passes.pipeline import OnPass

__all__ = ["BuildRequest", "build"]

_WORST = 5  # layers that the gate's error names


@dataclass(frozen=True)
class _Source:
    """The input of a build. `graph` is the float32 graph; no stage changes it, they all work on copies. `integers` says what
    becomes of integers that the checkpoint holds. `written` are the requests in `calibration` where the model wrote them."""

    checkpoint: Checkpoint
    calibration: Calibration | None
    graph: ir.Model
    integers: IntegerPlan
    written: Written | None = None


@dataclass(frozen=True)
class _Optimized:
    """The results of the passes: the graph of each rank, the records of the passes and their effects. `whole` is the quantized
    graph before it was divided and fused, `unfused_calls` the kernel calls of one rank's share of it, and `unquantized` the
    graph before its linears were quantized (None if they were not)."""

    ranks: list[ir.Model]
    records: list[dict[str, Any]]
    effects: Effects
    whole: ir.Model
    unfused_calls: int
    unquantized: Unquantized | None


def build(request: BuildRequest) -> Path:
    """Compile a checkpoint to an engine directory, whole or not at all; returns its path.

    Raises CompileError for a checkpoint, target or output that cannot be built. The same request, checkpoint and toolchain give
    the same bytes, except for the choices of `tune`, for calibration that nobody chose, which depends on the host's cores, and
    for results of calibration and drift that were computed on another
    kind of processor. Peak memory is a few tensors, whatever the checkpoint's size.
    """
    job = resolve(request)
    with EngineWriter(request.output, force=request.force) as writer, work_folder(request.output) as folder:
        job.begin("open")
        source = _open(job, writer)
        job, uncalibrated = _decided(job.following(source.integers.recipe), source)
        planned = _plan(job, source.graph)
        digests = source.checkpoint.digests(lambda file, done, total: job.progress("digest")(done, total))
        model = _model_info(request, source, digests)
        if job.self_written is not None:
            written = write(request, job.self_written, source.checkpoint, digests, folder, build)
            source = replace(source, calibration=written.calibration, written=written)

        job.begin("optimize")
        data = _calibration_data(job, source.calibration, digests, folder)
        keep, more_bits = _kept(job, planned, source.calibration, data), _more_bits(job, planned, source, data)
        observer = pass_effects(job.backend, source.checkpoint.tokenizer_json, model.parameters, request.drift)
        optimized = _optimize(job, source.graph, _passes(job, data, keep, more_bits), observer)

        job.begin("compile")
        tune = job.progress("tune") if request.tune else None
        options = CompileOptions(request.kv_cache, optimized.unfused_calls, tune, job.progress("compile"), request.library)
        payloads = job.backend.compile(optimized.ranks, job.target, options)

        writer.check_space(sum(payload.file_bytes for payload in payloads) + FIXED_BYTES)
        writer.write("tokenizer.json", source.checkpoint.tokenizer_json.encode())
        _write_graph(job, optimized.whole, writer)
        if request.on_weight is not None:
            _describe_weights(optimized.ranks, request.on_weight)
        write_ranks(writer, payloads, job.progress("weights"))

        manifest = _manifest(job, source, model, optimized, payloads)
        damage = _damage(job, source.calibration, optimized.unquantized, folder)
        coverage = _coverage(job, source, model.dimensions["vocab_size"])
        memory, ranks = memory_of_ranks(payloads)

        def report() -> bytes:
            files, effects = dict(writer.files), optimized.effects
            return render(Report(manifest, files, effects, memory, damage, coverage, ranks, uncalibrated)).encode()

        if (accuracy := _accuracy(job, writer, manifest, source, folder)) is not None:
            manifest = replace(manifest, accuracy=_judgement(job, source, accuracy))
            if missed := _missed(job, accuracy):
                kept = keep_report(folder / REPORT_NAME, report())
                worst = [layer.name for layer in damage[:_WORST]]
                raise missed(worst, request.size_budget, kept)

        job.begin("self-test")
        kv_type = payloads[0].footprint.kv.dtype
        golden = golden_answers(writer.draft(manifest), manifest, job.backend, optimized.ranks, kv_type)
        writer.write(SELF_TEST_NAME, golden.to_text().encode())
        writer.write(REPORT_NAME, report())
        return writer.finish(manifest)


def _passes(
    job: Job, data: CalibrationData | None = None, keep: tuple[str, ...] = (), more_bits: MoreBits = ONE_SIZE
) -> tuple[Pass, ...]:
    """The passes of a build; without requests (`data` None), only those that need none."""
    rank, targets = job.request.lora_rank, job.request.lora_targets
    return passes_of(job.recipe, data, keep, job.target.ranks, more_bits=more_bits, lora_rank=rank, lora_targets=targets)


def _write_graph(job: Job, whole: ir.Model, writer: EngineWriter) -> None:
    """Write the quantized graph before it was divided and fused and, for adapters, the basis of its linears."""
    writer.write(GRAPH_NAME, to_onnx(whole))
    if job.request.lora_rank:
        linears, _ = adapted_linears(whole.graph, job.request.lora_targets)
        writer.write(BASIS_NAME, basis_file(basis_of(linears)))


def _describe_weights(ranks: Sequence[ir.Model], on_weight: Callable[[str], None]) -> None:
    """Call `on_weight` with the computation of each weight that a rank reads."""
    for rank, model in enumerate(ranks):
        prefix = f"rank {rank}: " if len(ranks) > 1 else ""
        for value in model.graph.initializers.values():
            if value.uses() and value.const_value is not None:
                on_weight(prefix + describe(value.const_value))


def _open(job: Job, writer: EngineWriter) -> _Source:
    request = job.request
    checkpoint = open_checkpoint(
        request.checkpoint,
        template=request.template,
        reading=request.reading,
        generation=request.generation,
        on_decrypted=job.progress(DECRYPT),
    )
    writer.check_space(_estimated_bytes(checkpoint, job.recipe))
    calibration = None
    if isinstance(request.calibration, Path):
        calibration = read_calibration(request.calibration, checkpoint, raw=request.raw_requests)
    graph = build_graph(checkpoint)
    integers = integer_plan(graph, job.recipe, request.methods)
    if request.weight_budget is not None and integers.recipe.keeps_integers:
        found, remedy = "a checkpoint whose integers are kept", "leave it out"
        raise CompileError("quantization", "a weight budget", found=found, expected="weights to choose bits for", remedy=remedy)
    return _Source(checkpoint, calibration, graph, integers)


def _decided(job: Job, source: _Source) -> tuple[Job, str]:
    """The job, without self-written requests where nobody asked for them and they would take too long; and the reason."""
    options = job.self_written
    if options is None:
        return job, ""
    parameters, cores = _parameters(source), len(host.usable_cores())
    reason = options.reason_against(parameters, cores)
    job.request.on_note(reason or options.reason_for(parameters, cores))
    return (job.uncalibrated(), reason) if reason else (job, "")


def _parameters(source: _Source) -> int:
    """The parameters of the graph, so that tied tensors count once."""
    initializers = source.graph.graph.initializers
    return sum(prod(tensor.shape) for name, tensor in source.checkpoint.tensors.items() if name in initializers)


def _plan(job: Job, graph: ir.Model) -> Unquantized | None:
    """Raise CompileError, before anything takes long, if the model exceeds the target's memory, cannot be divided among the
    ranks, or needs more than the weight budget. Only passes that need no requests are run for that. Returns the graph before
    its linears are quantized, None if they are not."""
    before, fusions = carried(_passes(job), job.backend, job.applied, fuse=job.request.fuse)
    stages = _Stages(before, job.recipe)
    whole = graph.clone()
    run_pipeline(whole, before, on_pass=stages.observer)

    def footprints(ranks: int) -> list[Footprint]:
        return job.backend.footprint(divided(whole, fusions, ranks), job.target.with_ranks(ranks), job.request.kv_cache)

    check_memory(job.target, footprints)
    if job.request.weight_budget is not None:
        check_least(job.request.weight_budget, sum(rank.weights for rank in footprints(job.target.ranks)))
    return stages.unquantized()


def _calibration_data(
    job: Job, calibration: Calibration | None, digests: Mapping[str, str], folder: Path
) -> CalibrationData | None:
    """The requests for the passes that calibrate."""
    if calibration is None:
        return None
    reuse_heap()
    sequences = tuple(sample.tokens for sample in calibration.calibration)
    return CalibrationData.of_files(
        sequences, calibration.digest, digests, job.request.reading.facts, folder, job.progress("calibrate")
    )


def _kept(
    job: Job, planned: Unquantized | None, calibration: Calibration | None, data: CalibrationData | None
) -> tuple[str, ...]:
    """The names of the linears that stay float32 within the size budget."""
    if job.request.size_budget <= 1:
        return ()
    assert planned and calibration and data, "resolve refuses a size budget without them"
    return layers.kept(planned, job.request.size_budget, calibration, data, job.request.on_progress)


def _more_bits(job: Job, planned: Unquantized | None, source: _Source, data: CalibrationData | None) -> MoreBits:
    """The linears that get more than 4 bits within the weight budget."""
    if (budget := job.request.weight_budget) is None:
        return ONE_SIZE
    assert planned and source.calibration and data, "resolve refuses a weight budget without them"

    def weight_bytes(more_bits: MoreBits) -> int:
        before, fusions = carried(_passes(job, more_bits=more_bits), job.backend, job.applied, fuse=job.request.fuse)
        whole = source.graph.clone()
        run_pipeline(whole, before)
        ranks = divided(whole, fusions, job.target.ranks)
        return sum(rank.weights for rank in job.backend.footprint(ranks, job.target, job.request.kv_cache))

    units = layers.noise_of_int4(planned, source.calibration, data, job.request.on_progress)
    return bits_within(budget, steps_of(units), weight_bytes)


def _optimize(job: Job, graph: ir.Model, passes: Sequence[Pass], effects: PassEffects) -> _Optimized:
    ranks = job.target.ranks
    before, fusions = carried(passes, job.backend, job.applied, fuse=job.request.fuse)
    stages = _Stages(before, job.recipe, effects.observe)
    graphs, records = run_for(graph.clone(), (*before, *fusions), ranks, job.request.dump_ir, stages.observer)
    whole = stages.observer.after(before[-1])
    return _Optimized(
        ranks=graphs,
        records=records,
        effects=effects.result(job.progress("drift")),
        whole=whole,
        unfused_calls=unfused_calls(job.backend, whole, ranks),
        unquantized=stages.unquantized(),
    )


class _Stages:
    """The stages of a pipeline whose graphs a build needs later: the one before linears are quantized, and the one after
    `before`, the passes on the whole model."""

    def __init__(self, before: Sequence[Pass], recipe: Recipe, on_pass: OnPass | None = None) -> None:
        self._linears = layers.before_linears(before) if recipe.quantizes else None
        last_passes = [before[-1], *(self._linears.before[-1:] if self._linears else ())]
        self.observer = Snapshots(*last_passes, on_pass=on_pass)

    def unquantized(self) -> Unquantized | None:
        if self._linears is None:
            return None
        return Unquantized(self.observer.after(self._linears.before[-1]), self._linears)


def _damage(job: Job, calibration: Calibration | None, unquantized: Unquantized | None, folder: Path) -> list[LayerDamage]:
    """The linears by the error that quantization causes in their outputs; empty without requests or without quantization."""
    if calibration is None or unquantized is None:
        return []
    return layers.errors(unquantized, calibration, folder / "layers", job.progress("errors"))


def _accuracy(job: Job, writer: EngineWriter, manifest: Manifest, source: _Source, folder: Path) -> Accuracy | None:
    """The accuracy of the engine on the held-out requests; None without requests or without a gate."""
    if source.calibration is None or job.request.gate is None:
        return None
    holdout, progress = source.calibration.holdout, job.progress("gate")
    return accuracy_of(writer.draft(manifest), job.target.ranks, source.graph, holdout, folder / "gate", progress)


def _judgement(job: Job, source: _Source, accuracy: Accuracy) -> dict[str, Any]:
    """The manifest's entry on accuracy."""
    assert job.request.gate is not None, "only a gate measures"
    origin = {"requests_written_by": "the model itself"} if source.written else {}
    return accuracy.to_plain() | {"limits": job.request.gate.to_plain()} | origin


def _missed(job: Job, accuracy: Accuracy) -> Callable[[Sequence[str], float, str], CompileError] | None:
    """The error of an engine that misses limits, for `Gate.missed`'s last arguments; None if it keeps them. Limits that are
    missed on requests which nobody chose end no build: a note says so."""
    gate = job.request.gate
    misses = gate.misses(accuracy) if gate else []
    if not gate or not misses:
        return None
    if job.self_written is not None and job.self_written.by_default:
        found = ", ".join(f"{found} ({expected})" for found, expected in misses)
        job.request.on_note(f"the engine misses limits of the gate on requests that the model wrote: {found}; see the report")
        return None
    return partial(gate.missed, accuracy, misses)


def _coverage(job: Job, source: _Source, vocabulary: int) -> dict[str, Any] | None:
    """The coverage of the requests for the report; None without requests."""
    if (calibration := source.calibration) is None:
        return None
    used, held_out = ([sample.tokens for sample in samples] for samples in (calibration.calibration, calibration.holdout))
    coverage = {"digest": calibration.digest} | coverage_of(used, held_out, vocabulary)
    if source.written is not None:
        return {"origin": source.written.sentence} | coverage
    return coverage | (coverage_of_set(job.request.calibration) if isinstance(job.request.calibration, Path) else {})


def _estimated_bytes(checkpoint: Checkpoint, recipe: Recipe) -> int:
    values = sum(prod(tensor.shape) for tensor in checkpoint.tensors.values())
    return values * (1 if recipe.quantizes else 4) + FIXED_BYTES


def _model_info(request: BuildRequest, source: _Source, digests: dict[str, str]) -> ModelInfo:
    """Describe the model for the manifest."""
    path, checkpoint, graph = Path(request.checkpoint), source.checkpoint, source.graph
    return ModelInfo(
        family=checkpoint.family,
        name=checkpoint_name(path),
        parameters=_parameters(source),
        dimensions={name: int(value) for name, value in sorted(graph.metadata_props.items()) if value.isdecimal()},
        source_digests=digests,
    )


def _manifest(job: Job, source: _Source, model: ModelInfo, optimized: _Optimized, payloads: Sequence[Payload]) -> Manifest:
    first, checkpoint = payloads[0], source.checkpoint
    notes = *checkpoint.notes, *source.integers.notes, *(source.calibration.notes if source.calibration else ())
    opened = PassRecord("open-checkpoint", {"template": checkpoint.template.name} | job.request.reading.facts, 0, notes)
    damage = damage_record(optimized.whole)
    written = source.written.record if source.written else None
    calibrated = job.request.calibration is not None
    return Manifest(
        model=model,
        target=target_info(job.target, job.backend, payloads),
        passes=(*filter(None, (opened, written)), *pass_records(optimized.records), *filter(None, (damage, first.tuning))),
        quantization=manifest_words(job.recipe, calibrated)
        | dict(first.quantization)
        | {"kv_cache": KV_TYPES[first.footprint.kv.dtype].manifest},
        kernel_calls=first.kernel_calls,
        prompt_template=prompt_template(checkpoint),
        special_tokens=special_tokens(checkpoint),
        generation=GenerationDefaults(**checkpoint.generation),
        toolchain=toolchain(first),
        files={},
    )
