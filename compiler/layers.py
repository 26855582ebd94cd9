"""Which linear layers INT8 hurts most: for the command `sensitivity`, for size budgets, and for the report and the gate."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from belle_compile.compiler.calibration import Calibration, read_calibration
from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import build_graph
from belle_compile.compiler.integers import integer_plan
from belle_compile.compiler.reading import DECRYPT, PLAIN, Reading
from belle_compile.passes.calibration.data import CalibrationData
from belle_compile.passes.calibration.sensitivity import LayerDamage, output_errors
from belle_compile.passes.calibration.sensitivity import alone as damage_alone
from belle_compile.passes.calibration.stream_noise import UnitNoise, stream_noise
from belle_compile.passes.calibration.work import Work
from belle_compile.passes.pipeline import passes_of, run_pipeline
from belle_compile.passes.presets import DEFAULT_PRESET, find_preset
from belle_compile.passes.quantization.quantize_groups import QuantizeGroups
from belle_compile.passes.quantization.quantize_linears import QuantizeLinears
from belle_compile.passes.quantization.scheme import INT8, WeightScheme
from belle_compile.runtime.memory import reuse_heap

if TYPE_CHECKING:
    import onnx_ir as ir

    from belle_compile.passes.base import Pass

Progress = Callable[[str, int, int], None]

_TRIED_PARAMETERS = 500_000_000  # in models of up to this size, layers are tried one by one
_RANKED_TOKENS = 1024  # tokens of requests by which layers are ranked for a size budget
_JUDGED_REQUESTS = 16  # held-out requests on which the errors of layers are measured for the report


def rank(
    checkpoint: str | Path,
    calibration: Path,
    *,
    quantization: str = DEFAULT_PRESET,
    raw_requests: bool = False,
    template: str | None = None,
    tokens: int = 2048,
    alone: bool = True,
    reading: Reading = PLAIN,
    on_progress: Progress = lambda stage, done, total: None,
) -> list[LayerDamage]:
    """Rank the linears of a checkpoint by the damage of quantizing them as a preset does, the most damaging first.

    With `alone`, the damage of a linear is the KL divergence of the predictions on up to `tokens` tokens of requests when it
    alone is quantized; without, it is the error of the linear's outputs."""
    on_progress("open", 0, 0)
    opened = open_checkpoint(checkpoint, template=template, reading=reading, on_decrypted=partial(on_progress, DECRYPT))
    recipe = find_preset(quantization).recipe
    requests = read_calibration(calibration, opened, raw=raw_requests)
    sequences = _first_tokens(requests, tokens)
    graph = build_graph(opened)
    on_progress("optimize", 0, 0)
    reuse_heap()
    linears = before_linears(passes_of(integer_plan(graph, recipe, None).recipe))
    run_pipeline(graph, linears.before)
    with tempfile.TemporaryDirectory(prefix="belle-sensitivity-") as name:
        measure = damage_alone if alone else output_errors
        return measure(
            graph, sequences, Path(name), bits=linears.bits, scheme=linears.scheme, on_progress=partial(on_progress, "layers")
        )


def _first_tokens(calibration: Calibration, tokens: int) -> list[tuple[int, ...]]:
    """The first `tokens` tokens of the requests, held-out requests first; the last sequence is cut to fit."""
    sequences: list[tuple[int, ...]] = []
    for sample in (*calibration.holdout, *calibration.calibration):
        if tokens > 1:
            sequences.append(sample.tokens[:tokens])
            tokens -= len(sequences[-1])
    return sequences


class Linears(NamedTuple):
    """How a pipeline quantizes linears: the passes `before` that, the bits of activations and the scheme of weights."""

    before: Sequence[Pass]
    bits: int
    scheme: WeightScheme


def before_linears(passes: Sequence[Pass]) -> Linears:
    """Find where `passes` begin to quantize linears, and how they do it; raises CompileError if they quantize none."""
    at = next((i for i, step in enumerate(passes) if isinstance(step, (QuantizeGroups, QuantizeLinears))), None)
    step = next((step for step in passes if isinstance(step, QuantizeLinears)), None)
    if at is None or step is None:
        raise CompileError("sensitivity", "the preset", found="one that quantizes nothing", expected="an INT8 preset")
    scheme = next((step.weights for step in passes if isinstance(step, QuantizeGroups)), INT8)
    return Linears(passes[:at], step.activation_bits, scheme)


class Unquantized(NamedTuple):
    """The graph before its linears are quantized, and how they will be."""

    graph: ir.Model
    linears: Linears


def kept(
    model: Unquantized, size_budget: float, calibration: Calibration, data: CalibrationData, on_progress: Progress
) -> tuple[str, ...]:
    """The sorted names of the linears that stay float32 within the size budget: those with the greatest damage for each weight.
    The damage is that to the predictions where the model is small enough to try each linear, else the error of its outputs.
    The ranking is stored in the data's folder, so that a build with another budget reads it."""
    layers = _stored_ranking(model, calibration, data, on_progress)
    spare_bytes = (size_budget - 1) * sum(layer.weights for layer in layers)
    names = []
    for layer in sorted(layers, key=lambda layer: -(layer.output_error if layer.kl is None else layer.kl) / layer.weights):
        if 3 * layer.weights <= spare_bytes:  # float32 takes three bytes more than int8
            names.append(layer.name)
            spare_bytes -= 3 * layer.weights
    return tuple(sorted(names))


def noise_of_int4(
    model: Unquantized, calibration: Calibration, data: CalibrationData, on_progress: Progress
) -> list[UnitNoise]:
    """The noise that INT4 weights add to the residual stream, by linears that are fused, the greatest for each weight first. It
    is stored in the data's folder, so that a build with another budget reads it."""
    graph, linears = model
    options = {"scheme": str(linears.scheme), "tokens": _RANKED_TOKENS}
    work = Work(data.folder / "noise", data.key(graph, options))
    file = work.file("units", ".json")
    if not work.done:
        sequences = _first_tokens(calibration, _RANKED_TOKENS)
        units = stream_noise(graph, sequences, data.folder / "layers", linears.scheme, partial(on_progress, "layers"))
        file.write_text(json.dumps([asdict(unit) for unit in units]), encoding="utf-8")
        work.finish(0)
    stored = json.loads(file.read_text(encoding="utf-8"))
    return [UnitNoise(tuple(unit["linears"]), unit["weights"], unit["noise"]) for unit in stored]


def _stored_ranking(
    model: Unquantized, calibration: Calibration, data: CalibrationData, on_progress: Progress
) -> list[LayerDamage]:
    graph, linears = model
    options = {"bits": linears.bits, "scheme": str(linears.scheme), "tokens": _RANKED_TOKENS}
    work = Work(data.folder / "ranking", data.key(graph, options))
    file = work.file("layers", ".json")
    if not work.done:
        layers = _ranking(model, calibration, data.folder / "layers", on_progress)
        file.write_text(json.dumps([asdict(layer) for layer in layers]), encoding="utf-8")
        work.finish(0)
    return [LayerDamage(**layer) for layer in json.loads(file.read_text(encoding="utf-8"))]


def _ranking(model: Unquantized, calibration: Calibration, folder: Path, on_progress: Progress) -> list[LayerDamage]:
    graph, linears = model
    parameters = sum(prod(value.shape.numpy()) for value in graph.graph.initializers.values() if value.shape is not None)
    sequences = _first_tokens(calibration, _RANKED_TOKENS)
    measure = damage_alone if parameters <= _TRIED_PARAMETERS else output_errors
    return measure(
        graph, sequences, folder, bits=linears.bits, scheme=linears.scheme, on_progress=partial(on_progress, "layers")
    )


def errors(
    model: Unquantized,
    calibration: Calibration,
    folder: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[LayerDamage]:
    """The linears sorted by the relative errors of their outputs over a few held-out requests, the largest first."""
    graph, linears = model
    sequences = [sample.tokens for sample in calibration.holdout[:_JUDGED_REQUESTS]]
    return output_errors(graph, sequences, folder, bits=linears.bits, scheme=linears.scheme, on_progress=on_progress)
