"""A build from checkpoint to engine directory: every step is one call here."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from belle_compile import __version__
from belle_compile.compiler import layers, targets
from belle_compile.compiler.backends import Lowered, compile_graphs, count_kernel_calls, plan_graph
from belle_compile.compiler.calibration import Calibration, prompt_template, read_calibration, special_tokens
from belle_compile.compiler.checkpoint import Checkpoint, open_checkpoint
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import build_graph
from belle_compile.compiler.footprint import FIXED_BYTES, SERVED_TOKENS, check_memory, file_bytes, required_bytes
from belle_compile.compiler.gate import DEFAULT_GATE, Gate
from belle_compile.compiler.ir.text import to_onnx
from belle_compile.compiler.report import (
    REPORT_NAME,
    Effects,
    Report,
    coverage_of,
    coverage_of_set,
    memory_of,
    pass_effects,
    render,
)
from belle_compile.compiler.writer import GRAPH_NAME, EngineWriter, write_ranks
from belle_compile.passes.calibration.data import CalibrationData
from belle_compile.passes.calibration.sensitivity import LayerDamage
from belle_compile.passes.pipeline import CALIBRATED, METHODS, Recipe, at_fusion, passes_of, run_for
from belle_compile.runtime.artifact import (
    GenerationDefaults,
    KernelCalls,
    Manifest,
    ModelInfo,
    PassRecord,
    Requirements,
    TargetInfo,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from belle_compile.passes.base import Pass, PassResult
    from belle_compile.passes.pipeline import OnPass

_METHODS = {  # what the manifest says of each
    "smooth": ("smoothing", "outliers of activations moved into weights, channel by channel"),
    "rotate": ("rotations", "residual stream and values, folded into the weights"),
    "rotate-online": ("online rotations", "feed-forward activations, while running"),
    "gptq": ("rounding", "by calibration requests (GPTQ)"),
    "static": ("clipping", "of activations, by calibration requests"),
}
TUNING = "tune-kernels"  # its record is only in engines built with `tune`
KV_CACHES: Mapping[str, str] = {  # type asked for -> what the manifest says; "auto" becomes one of the others
    "auto": "",
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "int8": "int8 per token and head",
}
_WORST = 5  # layers to look at where an engine misses a limit


@dataclass(frozen=True)
class BuildRequest:
    """What to compile, for what, and where to. `quantization` names a preset of passes; `kv_cache` is the type of the KV cache
    (auto: float32 with quantization none, else float16); `isas` keeps some of the target's instruction sets (all by default);
    `on_progress(stage, done, total)` hears how far the build is, with total 0 for a stage whose length is unknown. `tune`
    measures on this host which variants of its best kernels suit this model's shapes, which takes minutes and may differ from
    one build to the next.

    `methods` replace the preset's own (of passes.pipeline.METHODS). `calibration` is a file of requests, or a set that
    calibrate-set made: weights are rounded by it, and the engine must pass `gate` (None: it is not tried) on the requests held
    out. `raw_requests` takes their texts without the prompt template. With a `size_budget` above 1, linears that INT8 hurts
    most stay float32, until the INT8 weights have grown by that factor. `drift` says whether the report tells how far each pass
    moves the logits (None: for small models, where it takes seconds).
    """

    checkpoint: str | Path
    output: Path
    target: str = "cpu"
    quantization: str = "int8"
    methods: tuple[str, ...] | None = None
    kv_cache: str = "auto"
    isas: tuple[str, ...] = ()
    template: str | None = None
    dump_ir: Path | None = None
    force: bool = False
    tune: bool = False
    calibration: Path | None = None
    raw_requests: bool = False
    size_budget: float = 1.0
    gate: Gate | None = DEFAULT_GATE
    drift: bool | None = None
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None


def build(request: BuildRequest) -> Path:
    """Compiles a checkpoint to an engine directory, whole or not at all; returns its path.

    Raises CompileError when the checkpoint, the target or the output does not fit. The same request, checkpoint and toolchain
    give the same bytes, but for what `tune` measures, and where calibration ran or the report's drift was measured on another
    kind of processor. Peak memory is a few tensors, whatever the checkpoint's size.
    """
    target, recipe = targets.parse(request.target).carrying(request.isas), _recipe(request)
    _check_kv_cache(request.kv_cache)
    say = request.on_progress
    with EngineWriter(request.output, force=request.force) as writer, work_folder(request.output) as folder:
        say("open", 0, 0)
        checkpoint = open_checkpoint(request.checkpoint, template=request.template)
        writer.check_space(_estimated_bytes(checkpoint, request.quantization))
        calibration = None
        if request.calibration is not None:
            calibration = read_calibration(request.calibration, checkpoint, raw=request.raw_requests)
        graph = build_graph(checkpoint)
        calls_before_fusion = _count_without_fusion(graph, passes_of(recipe, ranks=target.ranks), target.ranks)
        check_memory(target, partial(_planned, graph, passes_of(recipe, ranks=target.ranks), target, request.kv_cache))
        digests = checkpoint.digests(lambda file, done, total: say("digest", done, total))
        model = _model_info(request, checkpoint, graph, digests)

        say("optimize", 0, 0)
        data = None
        if calibration is not None:
            data = _data(calibration, digests, folder, lambda done, total: say("calibrate", done, total))
        keep: tuple[str, ...] = ()
        if request.size_budget > 1:
            keep = layers.kept(build_graph(checkpoint), recipe, request.size_budget, calibration, folder / "layers", say)
        passes = passes_of(recipe, data, keep, target.ranks)
        observer = pass_effects(checkpoint.tokenizer_json, model.parameters, request.drift)
        hears = _BeforeFusion(observer.observe, at_fusion(passes)[0][-1])
        graphs, records = run_for(graph, passes, target.ranks, request.dump_ir, hears)
        effects = observer.result(lambda done, total: say("drift", done, total))

        say("compile", 0, 0)
        tune = (lambda done, total: say("tune", done, total)) if request.tune else None
        lowered = compile_graphs(graphs, target, calls_before_fusion=calls_before_fusion, kv_cache=request.kv_cache, tune=tune)

        writer.check_space(sum(map(file_bytes, lowered)))
        writer.write("tokenizer.json", checkpoint.tokenizer_json.encode())
        writer.write(GRAPH_NAME, hears.graph)
        write_ranks(writer, lowered, lambda done, total: say("weights", done, total))

        manifest = _manifest(request, target, checkpoint, model, recipe, records, lowered)
        damage = layers.errors(build_graph(checkpoint), passes, calibration, folder / "layers") if calibration else []
        if calibration and request.gate:
            accuracy = request.gate.judge(
                writer.draft(manifest), target.ranks, build_graph(checkpoint), calibration.holdout, folder / "gate",
                worst=[layer.name for layer in damage[:_WORST]],
                on_progress=lambda done, total: say("gate", done, total),
            )  # fmt: skip
            manifest = replace(manifest, accuracy=accuracy.to_plain() | {"limits": request.gate.to_plain()})
        writer.write(REPORT_NAME, render(_report(request, manifest, writer, effects, lowered, damage, calibration)).encode())
        return writer.finish(manifest)


@contextmanager
def work_folder(output: Path) -> Iterator[Path]:
    """Where a build of `output` keeps what calibration found: removed in the end, but not after Ctrl-C or a kill, so that the
    next build of it goes on from there."""
    folder = output.parent / f".{output.name}.calibration"
    try:
        yield folder
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _data(
    calibration: Calibration, digests: Mapping[str, str], folder: Path, on_progress: Callable[[int, int], None]
) -> CalibrationData:
    source = hashlib.sha256(json.dumps(dict(sorted(digests.items()))).encode()).hexdigest()
    sequences = tuple(sample.tokens for sample in calibration.calibration)
    return CalibrationData(sequences, calibration.digest, source, folder, on_progress)


def _recipe(request: BuildRequest) -> Recipe:
    """The preset, with the methods that were asked for; raises CompileError where they do not fit."""
    recipe, methods = layers.preset(request.quantization), request.methods
    if methods is None:
        return recipe
    expected = ", ".join(METHODS)
    if unknown := [name for name in methods if name not in METHODS]:
        raise CompileError("quantization", "unknown method", found=", ".join(unknown), expected=f"some of {expected}")
    if not recipe.bits and methods:
        raise CompileError(
            "quantization", "methods", found=", ".join(methods), expected=f"none with --quant {request.quantization}"
        )
    needing = [name for name in methods if name in CALIBRATED]
    if needing and request.calibration is None:
        remedy = "give some with --calibration"
        raise CompileError("quantization", f"method {', '.join(needing)}", found="no requests to calibrate with", remedy=remedy)
    return replace(recipe, methods=tuple(name for name in METHODS if name in methods))


def _report(
    request: BuildRequest,
    manifest: Manifest,
    writer: EngineWriter,
    effects: Effects,
    lowered: Sequence[Lowered],
    damage: Sequence[LayerDamage],
    calibration: Calibration | None,
) -> Report:
    ranks = [memory_of(rank, required_bytes(rank), SERVED_TOKENS) for rank in lowered]
    most = max(ranks, key=lambda rank: rank.required)
    coverage = None
    if calibration and request.calibration:
        used, held_out = ([one.tokens for one in samples] for samples in (calibration.calibration, calibration.holdout))
        coverage = {"digest": calibration.digest} | coverage_of(used, held_out, lowered[0].program.vocab_size)
        coverage |= coverage_of_set(request.calibration)
    several = ranks if len(ranks) > 1 else ()
    return Report(manifest, dict(writer.files), effects, most, damage, coverage, several)


def _check_kv_cache(dtype: str) -> None:
    if dtype not in KV_CACHES:
        raise CompileError("kv cache", "unknown type", found=repr(dtype), expected=" or ".join(KV_CACHES))


def _count_without_fusion(graph: ir.Model, preset: Sequence[Pass], ranks: int) -> int:
    """Kernel calls that a step of a rank would take with every pass but the fusions; `preset` is without those that calibrate.
    A model that cannot be divided among so many ranks is refused here, before anything takes long."""
    return count_kernel_calls(run_for(graph.clone(), at_fusion(preset)[0], ranks)[0][0])


def _planned(graph: ir.Model, preset: Sequence[Pass], target: targets.Target, kv_cache: str, ranks: int) -> list[Lowered]:
    """The memory that so many ranks take, by passes that do not calibrate."""
    whole = graph.clone()
    return [plan_graph(model, target.is_gpu, kv_cache) for model in run_for(whole, preset, ranks)[0]]


@dataclass
class _BeforeFusion:
    """Hears of the passes beside another observer, and keeps the graph before it is divided and fused, as ONNX."""

    on_pass: OnPass
    last: Pass
    graph: bytes = b""

    def __call__(self, step: Pass | None, model: ir.Model, result: PassResult | None) -> None:
        self.on_pass(step, model, result)
        if step is self.last:
            self.graph = to_onnx(model)


def _estimated_bytes(checkpoint: Checkpoint, quantization: str) -> int:
    values = sum(prod(tensor.shape) for tensor in checkpoint.tensors.values())
    return values * (4 if quantization == "none" else 1) + FIXED_BYTES


def _model_info(request: BuildRequest, checkpoint: Checkpoint, graph: ir.Model, digests: dict[str, str]) -> ModelInfo:
    """`graph` is as the frontend made it: tensors that are tied are counted once."""
    path = Path(request.checkpoint)
    return ModelInfo(
        family=checkpoint.family,
        name=(path.stem if path.suffix == ".gguf" else path.name) or path.resolve().name,
        parameters=sum(prod(t.shape) for name, t in checkpoint.tensors.items() if name in graph.graph.initializers),
        dimensions={name: int(value) for name, value in sorted(graph.metadata_props.items()) if value.isdecimal()},
        source_digests=digests,
    )


def _manifest(
    request: BuildRequest,
    target: targets.Target,
    checkpoint: Checkpoint,
    model: ModelInfo,
    recipe: Recipe,
    records: Sequence[Mapping[str, Any]],
    lowered: Sequence[Lowered],
) -> Manifest:
    first, memory = lowered[0], max(map(required_bytes, lowered))
    program = first.program
    applied = [PassRecord(r["name"], r["options"], int(r["changes"]), tuple(r["refusals"])) for r in records]
    opened = PassRecord("open-checkpoint", {"template": checkpoint.template.name}, 0, tuple(checkpoint.notes))
    return Manifest(
        model=model,
        target=TargetInfo(
            target.name,
            "triton" if target.is_gpu else "tvm",
            target.isas,
            Requirements(target.arch, target.isas, memory),
            target.ranks,
        ),
        passes=(opened, *applied, *_tuning_record(first)),
        quantization=_quantization(recipe, request.calibration is not None) | {"kv_cache": KV_CACHES[program.kv.dtype]},
        kernel_calls=KernelCalls(program.kernel_calls.before_fusion, program.kernel_calls.after_fusion),
        prompt_template=prompt_template(checkpoint),
        special_tokens=special_tokens(checkpoint),
        generation=GenerationDefaults(**checkpoint.generation),
        toolchain={"belle-compile": __version__}
        | {name: _version(name) for name in ("numpy", "onnx-ir")}
        | dict(first.toolchain),
        files={},
    )


def _quantization(recipe: Recipe, calibrated: bool) -> dict[str, Any]:
    """What the manifest says of weights and activations, beside the passes' own records."""
    if not recipe.bits:
        return {"scheme": "none", "weights": "float32", "activations": "float32"}
    used = [name for name in recipe.methods if calibrated or name not in CALIBRATED]
    integers = "16 bits as two int8 planes" if recipe.bits == 16 else "int8"
    activations = f"{integers}, one scale {'for all tokens' if 'static' in used else 'a token, found while running'}"
    name = f"w{recipe.weights.bits}a{recipe.bits}"
    scheme = {"scheme": name, "weights": str(recipe.weights), "activations": activations}
    return scheme | dict(_METHODS[name] for name in used)


def _tuning_record(lowered: Lowered) -> list[PassRecord]:
    """What was measured for this build, as a pass that changed so many shapes; nothing for a build that measured nothing."""
    if lowered.tuned is None:
        return []
    measured = lowered.tuned.to_plain()
    refusals = () if lowered.tuned.entries else ("the model has no int8 linear layer to tune",)
    return [PassRecord(TUNING, measured, len(lowered.tuned.entries), refusals)]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
