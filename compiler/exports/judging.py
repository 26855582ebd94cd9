"""Judge an export on held-out requests beside the unquantized model, in its own runtime where that is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from belle_compile.compiler.accuracy import Accuracy, Comparison, Sample
from belle_compile.compiler.calibration import Calibration
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.exports.base import Simulation
from belle_compile.compiler.exports.request import ExportJob
from belle_compile.compiler.exports.runtimes import ForeignRuntime, RunningRuntime
from belle_compile.compiler.gate import FEW_REQUESTS, Gate
from belle_compile.compiler.ir.stream import ActivationStream

Logits = Callable[[int], torch.Tensor]  # the logits of the sequence with this number


@dataclass(frozen=True)
class Judgement:
    """The accuracy of an export, None where it was not measured, and `how` it was measured, or why not, in words."""

    accuracy: Accuracy | None
    how: str

    def to_plain(self, gate: Gate | None) -> dict[str, Any]:
        """The entry in the record of an export."""
        if self.accuracy is None or gate is None:
            return {"how": self.how}
        measured = self.accuracy.to_plain()
        del measured["greedy_prefix"]  # no answers are continued
        return measured | {"how": self.how, "limits": gate.to_plain()}


def judge(job: ExportJob, exported: Path, graph: ir.Model, calibration: Calibration | None, folder: Path) -> Judgement:
    """Compare the export in the folder `exported` with the float32 `graph` of its checkpoint on held-out requests.

    It runs in the format's runtime. Where that is not installed, another one takes its place, or the arithmetic is simulated on
    the files' weights, as the format allows.
    Raises CompileError if the runtime cannot run it.
    """
    runtime, request = job.format.runtime(), job.request
    if runtime is None:
        return Judgement(None, "not measured: nothing is quantized")
    if request.gate is None:
        return Judgement(None, f"not measured, and not run in {runtime.title}: --no-gate")
    if calibration is None:
        return Judgement(None, f"not measured, and not run in {runtime.title}, since that needs requests")
    job.begin("gate")
    samples = calibration.holdout
    sequences = [sample.tokens for sample in samples]

    def run(runtime: ForeignRuntime, python: Path | None, how: str) -> Judgement:
        with runtime.start(exported, max(map(len, sequences)), python) as running:
            return Judgement(_compared(graph, samples, _logits_of(running, sequences), folder, job), how)

    if version := runtime.version(request.runtime_python):
        return run(runtime, request.runtime_python, f"run in {runtime.title} {version}")
    absent = f"not run in {runtime.title}, which is not installed here"
    if (stand_in := job.format.stand_in()) is not None and (version := stand_in.version(None)):
        return run(stand_in, None, f"{absent}; run in {stand_in.title} {version}")
    if (simulation := job.format.simulation(exported)) is None:
        return Judgement(None, f"not measured, since it was {absent}")
    simulated = simulate(simulation, sequences, folder / "simulated")
    how = f"{absent}; its arithmetic was simulated on the files' weights"
    return Judgement(_compared(graph, samples, simulated, folder, job), how)


def _logits_of(running: RunningRuntime, sequences: Sequence[Sequence[int]]) -> Logits:
    return lambda number: torch.from_numpy(running.logits(sequences[number]).copy())


def missed(judged: Judgement, misses: Sequence[tuple[str, str]], kept: str) -> CompileError:
    """The error of an export that misses limits; `kept` says in words what stays of it."""
    assert judged.accuracy is not None, "only what was measured misses"
    few = ", which are few" if judged.accuracy.requests < FEW_REQUESTS else ""
    remedy = (
        "give more requests to calibrate with, keep the methods of the preset, set other limits with --max-ppl-ratio, "
        "--min-top1 or --min-accuracy-kept, or build an engine"
    )
    requests = f"{judged.accuracy.requests} held-out requests{few}"
    return CompileError(
        "gate",
        f"the export is too far from the unquantized model over {requests} ({judged.how})",
        found=", ".join(found for found, _ in misses),
        expected=", ".join(expected for _, expected in misses),
        remedy="; ".join(filter(None, [remedy, kept])),
    )


def simulate(simulation: Simulation, sequences: Sequence[Sequence[int]], folder: Path) -> Logits:
    """Run sequences through a float graph up to its last segment, with inputs of linears as the runtime rounds them; returns a
    function that computes the logits of one sequence."""
    stream, on_linear = ActivationStream(simulation.graph, sequences, folder), simulation.on_linear
    last = len(stream.segments) - 1
    for number in range(last):
        stream.forward(number, stream.load(number), on_linear=on_linear)
        stream.drop(number)
    weights = stream.load(last)
    return lambda sequence: stream.logits(sequence, weights, on_linear)


def _compared(graph: ir.Model, samples: Sequence[Sample], other: Logits, folder: Path, job: ExportJob) -> Accuracy:
    """The accuracy of the logits `other` over the samples, with the float32 graph run segment by segment."""
    stream = ActivationStream(graph, [sample.tokens for sample in samples], folder / "gate")
    comparison = Comparison()

    def compare(number: int, logits: torch.Tensor) -> None:
        sample = samples[number]
        comparison.add(logits, other(number), sample.tokens, len(sample.answer))

    for number in range(len(stream.segments)):
        job.progress("gate")(number, len(stream.segments))
        stream.forward(number, stream.load(number), on_logits=compare)
        stream.drop(number)
    job.progress("gate")(len(stream.segments), len(stream.segments))
    return comparison.result(len(samples), sum(bool(sample.answer) for sample in samples))
