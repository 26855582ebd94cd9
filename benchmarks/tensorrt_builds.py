"""Time, size, layers and reproducibility of plans that TensorRT for RTX builds on this host, which needs no GPU.

    python -m benchmarks.tensorrt_builds tests/fixtures/tiny-bloom-trained CHECKPOINT -o benchmarks/results/tensorrt.json

Each plan is built twice, and the two are compared byte for byte; the time is that of the process that builds. Scales of
activations come from random tokens: they decide about answers, and not about what is measured here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import onnx_ir as ir

from belle_compile.compiler import backends
from belle_compile.compiler.backends.base import LibraryChoice
from belle_compile.compiler.backends.onnx.graph import OnnxModel
from belle_compile.compiler.backends.tensorrt.build import plan_of, write_model
from belle_compile.compiler.backends.tensorrt.installed import Builder, builder_for
from belle_compile.compiler.backends.tensorrt.layers import layer_reports
from belle_compile.compiler.backends.tensorrt.rules import translate
from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.families import build_graph
from belle_compile.passes.base import Phase
from belle_compile.passes.calibration.data import CalibrationData
from belle_compile.passes.pipeline import passes_of, run_pipeline
from belle_compile.passes.presets import recipe_of
from belle_compile.runtime.executors.tensorrt_plan import PROFILES, capacity_for, max_context
from belle_compile.runtime.schema import to_plain
from benchmarks import machine

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_120")
SEQUENCES, TOKENS = 2, 24  # of the calibration
RECIPES = {"int8": ("rotate", "rotate-online", "static"), "int8-accurate": ("rotate",)}
FLOATS = "float16"


def prepared(checkpoint: Path, preset: str, methods: Sequence[str], folder: Path) -> ir.Model:
    """The graph that the backend gets from a build with a preset and methods."""
    opened = open_checkpoint(str(checkpoint))
    model = build_graph(opened)
    tokens = np.random.default_rng(0).integers(0, int(model.metadata_props["vocab_size"]), (SEQUENCES, TOKENS))
    sequences = tuple(tuple(row) for row in tokens.tolist())
    recipe = recipe_of(preset, methods, calibrated=True)
    carried = backends.get("tensorrt").passes(recipe)
    passes = passes_of(recipe, CalibrationData(sequences, "random tokens", checkpoint.name, folder))
    run_pipeline(model, [step for step in passes if step.phase is not Phase.FUSION or carried.carries_fusion(step.name)])
    return model


def built(folder: Path, model: OnnxModel, arch: str, builder: Builder) -> tuple[float, memoryview]:
    """Build a plan of the model in a folder; returns the seconds and the plan."""
    start = time.perf_counter()
    plan = plan_of(folder, model, arch, PROFILES, builder)
    return round(time.perf_counter() - start, 1), plan.content


def named_layers(plan: memoryview) -> dict[str, Any] | None:
    """The numbers of kernels by kind, for both profiles."""
    layers = layer_reports(plan, len(PROFILES))
    return dict(zip(("answers", "prompts"), map(to_plain, layers), strict=True)) if layers else None


def _differences(one: memoryview, other: memoryview) -> dict[str, int]:
    """The number of bytes in which two plans differ, with the first and the last place; empty if they are the same."""
    length = min(one.nbytes, other.nbytes)
    places = np.flatnonzero(np.frombuffer(one[:length], np.uint8) != np.frombuffer(other[:length], np.uint8))
    if not len(places) and one.nbytes == other.nbytes:
        return {}
    first, last = (int(places[0]), int(places[-1])) if len(places) else (length, length)
    return {"bytes": len(places), "first": first, "last": last}


class Results:
    """The results file, which is written again after each build; plans that it has from earlier runs are kept."""

    def __init__(self, path: Path, version: str) -> None:
        self._path, self._version = path, version
        kept = json.loads(path.read_text())["plans"] if path.exists() else []
        self._plans: dict[tuple[str, ...], dict[str, Any]] = {_key(plan): plan for plan in kept}

    def add(self, plan: dict[str, Any]) -> None:
        """Add a plan, or replace the one of the same model, preset and architecture."""
        self._plans[_key(plan)] = plan
        click.echo(json.dumps(plan))
        document = machine.describe() | {"tensorrt_rtx": self._version, "plans": list(self._plans.values())}
        self._path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _key(plan: dict[str, Any]) -> tuple[str, ...]:
    return plan["model"], plan["preset"], " ".join(plan["methods"]), plan["arch"]


@click.command()
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--preset", "presets", multiple=True, type=click.Choice(list(RECIPES)), default=list(RECIPES), show_default=True)
@click.option("--method", "methods", multiple=True, help="Methods in place of a preset's own.")
@click.option("--arch", "archs", multiple=True, default=ARCHS, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The JSON file.")
def main(
    checkpoints: Sequence[Path], presets: Sequence[str], methods: Sequence[str], archs: Sequence[str], output: Path
) -> None:
    """Build plans of CHECKPOINTS: each once, and then all of them again."""
    builders = {arch: builder_for(arch, LibraryChoice("tensorrt-rtx")) for arch in archs}
    results = Results(output, builders[archs[0]].version)
    for checkpoint, preset in product(checkpoints, presets):
        used = tuple(methods) or RECIPES[preset]
        with TemporaryDirectory() as name:
            folder = Path(name)
            graph = prepared(checkpoint, preset, used, folder)
            model = translate(graph, FLOATS, capacity_for(max_context(int(graph.metadata_props["max_position"]))))
            write_model(model, folder)
            facts = {"model": checkpoint.name, "preset": preset, "methods": list(used)}
            first: dict[str, tuple[dict[str, Any], memoryview]] = {}
            for arch in archs:
                seconds, plan = built(folder, model, arch, builders[arch])
                weights = sum(tensor.data_bytes for tensor in model.weights)
                sizes = {"weight_bytes": weights, "plan_bytes": plan.nbytes, "layers": named_layers(plan)}
                first[arch] = facts | {"arch": arch, "seconds": [seconds]} | sizes, plan
                results.add(first[arch][0])
            for arch, (result, plan) in first.items():
                seconds, again = built(folder, model, arch, builders[arch])
                results.add(result | {"seconds": [*result["seconds"], seconds], "differences": _differences(plan, again)})


if __name__ == "__main__":
    main()
