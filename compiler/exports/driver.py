"""An export from checkpoint or engine to a directory of another runtime: every step is one call here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from belle_compile import __version__
from belle_compile.compiler.build_request import BuildRequest
from belle_compile.compiler.calibration import Calibration, read_calibration
from belle_compile.compiler.checkpoint import Checkpoint, open_checkpoint
from belle_compile.compiler.checkpoint.tensors import FLOAT_DTYPES
from belle_compile.compiler.directory import AtomicDirectory
from belle_compile.compiler.driver import build
from belle_compile.compiler.exports import from_engine, judging
from belle_compile.compiler.exports.directory import output_directory, write_record
from belle_compile.compiler.exports.model import HEAD, ExportedModel
from belle_compile.compiler.exports.plans import plan_of
from belle_compile.compiler.exports.request import AUTO_DTYPE, ExportJob, ExportRequest, resolve
from belle_compile.compiler.families import build_graph, registry
from belle_compile.compiler.integers import damage_record, integer_plan
from belle_compile.compiler.places import checkpoint_name
from belle_compile.compiler.reading import DECRYPT
from belle_compile.compiler.request_writer import Written, write
from belle_compile.compiler.self_written import SelfWritten
from belle_compile.compiler.work_folder import kept_words, work_folder
from belle_compile.passes.calibration.data import CalibrationData
from belle_compile.passes.pipeline import run_pipeline
from belle_compile.passes.presets import UNQUANTIZED, manifest_words
from belle_compile.runtime.artifact import GenerationDefaults
from belle_compile.runtime.memory import reuse_heap
from belle_compile.runtime.schema import to_plain

_SPARE_BYTES = 32 << 20  # tokenizer, configs, record


def export(request: ExportRequest) -> dict[str, Any]:
    """Write the export of a checkpoint or an engine, whole or not at all; returns its record.

    Raises CompileError for a source, format or output that cannot be exported, and for an export that misses a limit of the
    gate. The same request and checkpoint give the same bytes. Peak memory is a few tensors.
    """
    job = resolve(request)
    if job.from_engine:
        return _export_engine(job)
    with output_directory(request.output, force=request.force) as directory, work_folder(request.output) as folder:
        job.begin("open")
        checkpoint = open_checkpoint(
            request.source, template=request.template, reading=request.reading, generation=request.generation,
            on_decrypted=job.progress(DECRYPT),
        )  # fmt: skip
        graph = build_graph(checkpoint)
        source = _model(job, checkpoint, graph)
        job.format.check_model(source)
        integers = integer_plan(graph, job.recipe if job.format.integers else UNQUANTIZED, request.methods)
        job = replace(job, recipe=integers.recipe) if job.format.integers else job
        plan = plan_of(job, source)
        digests = checkpoint.digests(lambda file, done, total: job.progress("digest")(done, total))
        calibration, written = _requests(request, checkpoint, digests, folder)

        job.begin("optimize")
        model = replace(source, graph=graph.clone())
        records = run_pipeline(model.graph, plan.passes(_calibration_data(job, calibration, digests, folder)))
        facts = _write(job, model, directory)
        judged = judging.judge(job, directory.path, graph, calibration, folder)
        if request.gate is not None and judged.accuracy is not None:
            if misses := request.gate.misses(judged.accuracy):
                raise judging.missed(judged, misses, kept_words(folder))
        notes = [
            *job.notes,
            *plan.notes,
            *checkpoint.notes,
            *integers.notes,
            *(calibration.notes if calibration else ()),
            *((written.sentence,) if written else ()),
            *facts["notes"],
            *_refusals(records),
        ]
        recipe = job.recipe if job.format.integers else UNQUANTIZED
        words = {**manifest_words(recipe, calibration is not None), **plan.words}
        damage = damage_record(model.graph)
        passes = [*([to_plain(written.record)] if written else []), *records, *([to_plain(damage)] if damage else [])]
        record = _record(job, model, digests, words, passes) | {"notes": notes, "weights": facts["weights"]}
        record["accuracy"] = judged.to_plain(request.gate)
        complete = write_record(directory.path, record)
        directory.commit()
    return complete


def _write(job: ExportJob, model: ExportedModel, directory: AtomicDirectory) -> dict[str, Any]:
    """Write the files of a transformed model; returns what `Format.write` does."""
    job.begin("write")
    directory.check_space(job.format.stored_bytes(model) + _SPARE_BYTES)
    try:
        return job.format.write(model, directory.path, job.progress("write"))
    except OSError as error:
        raise directory.explain(error) from error


def _requests(
    request: ExportRequest, checkpoint: Checkpoint, digests: Mapping[str, str], folder: Path
) -> tuple[Calibration | None, Written | None]:
    """The requests to calibrate with, if any, and what is known of them where the model wrote them."""
    if isinstance(request.calibration, SelfWritten):
        writer = BuildRequest(
            request.source, request.output, template=request.template, reading=request.reading,
            raw_requests=request.raw_requests, on_progress=request.on_progress,
        )  # fmt: skip
        written = write(writer, request.calibration, checkpoint, digests, folder, build)
        return written.calibration, written
    if request.calibration is None:
        return None, None
    return read_calibration(request.calibration, checkpoint, raw=request.raw_requests), None


def _calibration_data(
    job: ExportJob, calibration: Calibration | None, digests: Mapping[str, str], folder: Path
) -> CalibrationData | None:
    if calibration is None:
        return None
    reuse_heap()
    sequences = tuple(sample.tokens for sample in calibration.calibration)
    return CalibrationData.of_files(
        sequences, calibration.digest, digests, job.request.reading.facts, folder, job.progress("calibrate")
    )


def _model(job: ExportJob, checkpoint: Checkpoint, graph: ir.Model) -> ExportedModel:
    return ExportedModel(
        name=checkpoint_name(Path(str(checkpoint.path))),
        family=registry.by_name(checkpoint.family, checkpoint.path),
        graph=graph,
        stated=checkpoint.config,
        float_dtype=_float_dtype(job, checkpoint),
        tokenizer_json=checkpoint.tokenizer_json,
        special=checkpoint.special,
        template=checkpoint.template,
        generation=GenerationDefaults(**checkpoint.generation),
    )


def _float_dtype(job: ExportJob, checkpoint: Checkpoint) -> str:
    """The type of tensors that keep floats: what was asked for, the format's, or 16 bits of the checkpoint's kind."""
    if job.request.dtype != AUTO_DTYPE:
        return job.request.dtype
    stored = {tensor.dtype for tensor in checkpoint.tensors.values() if len(tensor.shape) > 1} & FLOAT_DTYPES
    return job.format.default_dtype or ("bfloat16" if stored == {"bfloat16"} else "float16")


def _export_engine(job: ExportJob) -> dict[str, Any]:
    """Write the export of an engine's integers; returns its record."""
    request, engine = job.request, Path(job.request.source)
    with output_directory(request.output, force=request.force) as directory:
        job.begin("open")
        source = from_engine.open_engine(engine, job)
        model, manifest = source.model, source.manifest
        facts = _write(job, model, directory)
        digests = {name: file.sha256 for name, file in manifest.files.items()}
        own = {"activations": job.format.activations} if job.format.activations else {}
        words = {key: value for key, value in manifest.quantization.items() if key != "kv_cache"}  # which its runtime chooses
        record = _record(job, model, digests, words | own, to_plain(manifest.passes))
        record |= {
            "notes": [*job.notes, *facts["notes"]],
            "weights": facts["weights"],
            "accuracy": {"how": from_engine.UNMEASURED},
        }
        complete = write_record(directory.path, record)
        directory.commit()
    return complete


def _refusals(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What passes refused to change, apart from the head, which formats keep in floats."""
    return [f"{record['name']}: {reason}" for record in records for reason in record["refusals"] if HEAD not in reason]


def _record(
    job: ExportJob, model: ExportedModel, digests: Mapping[str, str], words: Mapping[str, Any], passes: Sequence[Any]
) -> dict[str, Any]:
    """The record of an export, without notes, weights and accuracy."""
    source = {"family": model.family.name, "name": model.name, "source_digests": dict(digests), "dimensions": model.facts}
    return {
        "format": job.format.name,
        "runtimes": job.format.runtimes,
        "model": source,
        "quantization": dict(words),
        "float_dtype": model.float_dtype,
        "head": "tied to the embedding" if model.tied_head else "of its own",
        "passes": list(passes),
        "made_by": {"belle-compile": __version__},
    }
