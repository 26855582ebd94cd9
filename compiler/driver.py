"""A build from checkpoint to engine directory: every step is one call here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler import targets
from compiler.backends.tvm import Lowered, compile_graph, count_kernel_calls
from compiler.checkpoint import Checkpoint, open_checkpoint
from compiler.errors import CompileError
from compiler.frontends import build_graph
from compiler.version import __version__
from compiler.writer import EngineWriter, tensor_bytes
from passes.pipeline import PRESETS, run_pipeline
from runtime.artifact import (
    GenerationDefaults,
    KernelCalls,
    Manifest,
    ModelInfo,
    PassRecord,
    PromptTemplate,
    Requirements,
    SpecialTokens,
    TargetInfo,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from passes.base import Pass

_W8A8 = {"scheme": "w8a8", "weights": "int8 per output channel", "activations": "int8 per token, dynamic"}
_FOLDED = "residual stream and values, folded into the weights"
_ROTATED = {"rotations": _FOLDED}
_ROTATED_ONLINE = {"rotations": f"{_FOLDED}; feed-forward activations, while running"}
# What the manifest says of each preset, beside the passes' own records.
QUANTIZATION: Mapping[str, dict[str, Any]] = {
    "int8": _W8A8 | _ROTATED_ONLINE,
    "int8-a16": _W8A8 | _ROTATED | {"scheme": "w8a16", "activations": "16 bits per token, dynamic, as two int8 planes"},
    "int8-plain": _W8A8,
    "none": {"scheme": "none", "weights": "float32", "activations": "float32"},
}
TUNING = "tune-kernels"  # its record is only in engines built with `tune`
KV_CACHES: Mapping[str, str] = {  # type asked for -> what the manifest says; "auto" becomes one of the others
    "auto": "",
    "float32": "float32",
    "float16": "float16",
    "int8": "int8 per token and head",
}
_FIXED_BYTES = 32 << 20  # kernels, runtime library, tokenizer, program
_PROCESS_BYTES = 256 << 20  # a host needs for Python and the tokenizer
_SERVED_TOKENS = 2048  # of KV cache a host must have room for at least


@dataclass(frozen=True)
class BuildRequest:
    """What to compile, for what, and where to. `quantization` names a preset of passes; `kv_cache` is the type of the KV cache
    (auto: float32 with quantization none, else float16); `isas` keeps some of the target's instruction sets (all by default);
    `on_progress(stage, done, total)` hears how far the build is, with total 0 for a stage whose length is unknown. `tune`
    measures on this host which variants of its best kernels suit this model's shapes, which takes minutes and may differ from
    one build to the next."""

    checkpoint: str | Path
    output: Path
    target: str = "cpu"
    quantization: str = "int8"
    kv_cache: str = "auto"
    isas: tuple[str, ...] = ()
    template: str | None = None
    dump_ir: Path | None = None
    force: bool = False
    tune: bool = False
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None


def build(request: BuildRequest) -> Path:
    """Compiles a checkpoint to an engine directory, whole or not at all; returns its path.

    Raises CompileError when the checkpoint, the target or the output does not fit. The same request, checkpoint and toolchain
    give the same bytes, but for what `tune` measures. Peak memory is a few tensors, whatever the checkpoint's size.
    """
    target, preset = targets.parse(request.target).carrying(request.isas), _preset(request.quantization)
    _check_kv_cache(request.kv_cache)
    say = request.on_progress
    with EngineWriter(request.output, force=request.force) as writer:
        say("open", 0, 0)
        checkpoint = open_checkpoint(request.checkpoint, template=request.template)
        writer.check_space(_estimated_bytes(checkpoint, request.quantization))
        digests = checkpoint.digests(lambda file, done, total: say("digest", done, total))

        say("optimize", 0, 0)
        graph = build_graph(checkpoint)
        model = _model_info(request, checkpoint, graph, digests)
        calls_before_fusion = _count_without_fusion(graph, preset)
        records = run_pipeline(graph, preset, dump_dir=request.dump_ir)

        say("compile", 0, 0)
        tune = (lambda done, total: say("tune", done, total)) if request.tune else None
        lowered = compile_graph(
            graph, isas=target.isas, calls_before_fusion=calls_before_fusion, kv_cache=request.kv_cache, tune=tune
        )

        writer.check_space(_exact_bytes(lowered))
        writer.write("tokenizer.json", checkpoint.tokenizer_json.encode())
        writer.write("rank0/program.json", lowered.program.to_json().encode())
        for name, content in sorted(lowered.kernels.items()):
            writer.write(f"rank0/{name}", content)
        writer.write_tensors("rank0/weights.safetensors", lowered.weights, lambda done, total: say("weights", done, total))

        return writer.finish(_manifest(request, target, checkpoint, model, records, lowered))


def _preset(name: str) -> Sequence[Pass]:
    if name not in PRESETS:
        raise CompileError("quantization", "unknown preset", found=repr(name), expected=" or ".join(PRESETS))
    return PRESETS[name]


def _check_kv_cache(dtype: str) -> None:
    if dtype not in KV_CACHES:
        raise CompileError("kv cache", "unknown type", found=repr(dtype), expected=" or ".join(KV_CACHES))


def _count_without_fusion(graph: ir.Model, preset: Sequence[Pass]) -> int:
    """Kernel calls a step would take with every pass but the fusions."""
    unfused = graph.clone()
    run_pipeline(unfused, [step for step in preset if not type(step).__module__.startswith("passes.fusion")])
    return count_kernel_calls(unfused)


def _estimated_bytes(checkpoint: Checkpoint, quantization: str) -> int:
    values = sum(prod(tensor.shape) for tensor in checkpoint.tensors.values())
    return values * (4 if quantization == "none" else 1) + _FIXED_BYTES


def _exact_bytes(lowered: Lowered) -> int:
    weights = sum(tensor_bytes(weight) for weight in lowered.weights)
    return weights + sum(map(len, lowered.kernels.values())) + _FIXED_BYTES


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
    records: Sequence[Mapping[str, Any]],
    lowered: Lowered,
) -> Manifest:
    program, special = lowered.program, checkpoint.special
    kv_blocks = -(-min(_SERVED_TOKENS, program.max_context) // program.block_size)
    memory = _exact_bytes(lowered) + program.arena_bytes + kv_blocks * program.kv.block_bytes + _PROCESS_BYTES
    applied = [PassRecord(r["name"], r["options"], int(r["changes"]), tuple(r["refusals"])) for r in records]
    opened = PassRecord("open-checkpoint", {"template": checkpoint.template.name}, 0, tuple(checkpoint.notes))
    return Manifest(
        model=model,
        target=TargetInfo(target.name, target.isas, Requirements(target.arch, target.isas, memory)),
        passes=(opened, *applied, *_tuning_record(lowered)),
        quantization=QUANTIZATION[request.quantization] | {"kv_cache": KV_CACHES[program.kv.dtype]},
        kernel_calls=KernelCalls(program.kernel_calls.before_fusion, program.kernel_calls.after_fusion),
        prompt_template=PromptTemplate(
            checkpoint.template.name, checkpoint.template.jinja, special["bos_token"], special["eos_token"]
        ),
        special_tokens=SpecialTokens(
            special["bos_token_id"], tuple(special["eos_token_ids"]), special["pad_token_id"], special["add_bos"]
        ),
        generation=GenerationDefaults(**checkpoint.generation),
        toolchain={"belle-compile": __version__}
        | {name: _version(name) for name in ("apache-tvm", "apache-tvm-ffi", "numpy", "onnx-ir")}
        | {"C compiler": lowered.c_compiler, "kernel tilings": "; ".join(lowered.tilings)},
        files={},
    )


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
