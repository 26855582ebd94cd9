"""Builds plans from ONNX models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from belle_compile.compiler.backends.onnx.graph import OnnxModel
from belle_compile.compiler.backends.tensorrt.installed import Builder
from belle_compile.compiler.backends.weights_header import weights_header
from belle_compile.compiler.errors import CompileError
from belle_compile.runtime.executors.tensorrt_library import STAGE
from belle_compile.runtime.executors.tensorrt_plan import Profile
from belle_compile.runtime.program import WEIGHTS_NAME

_MODEL, _PLAN, _REQUEST, _REFUSED, _LAYERS = "model.onnx", "engine.plan", "request.json", "refused.txt", "layers.json"
# The addresses in the process depend on the size of its environment, and on the arena of memory that a thread gets; see
# worker.py.
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}
_KEPT = ("LD_LIBRARY_PATH", "PYTHONPATH")
_WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class BuiltPlan:
    """A plan, and what the library's inspector tells of its layers, as JSON; empty for a library that builds without a GPU,
    which the inspector needs."""

    content: memoryview
    inspected: str


def build_plan(model: OnnxModel, arch: str, profiles: Sequence[Profile], builder: Builder) -> BuiltPlan:
    """The plan of a model for one architecture ("sm_80"), with an optimization profile of one shape for each of `profiles`.

    The same model and version of TensorRT for RTX give the same bytes; those of TensorRT need the same timing cache as well.
    Another process builds the plan from temporary files, with all weights in its memory; here, one tensor is in memory at a
    time. Raises CompileError for a graph that TensorRT does not take.
    """
    with tempfile.TemporaryDirectory(prefix="plan-") as name:
        folder = Path(name)
        write_model(model, folder)
        return plan_of(folder, model, arch, profiles, builder)


def plan_of(folder: Path, model: OnnxModel, arch: str, profiles: Sequence[Profile], builder: Builder) -> BuiltPlan:
    """The plan of a model that `write_model` has written to a folder; arguments and errors are those of `build_plan`."""
    library, choice = builder.library, builder.choice
    request = {
        "module": library.package.module,
        "model": _MODEL,
        "plan": _PLAN,
        "refused": _REFUSED,
        "layers": "" if library.ahead_of_time else _LAYERS,
        "arch": arch.replace("sm_", "SM") if library.ahead_of_time else "",
        "compatibility": "" if library.ahead_of_time else "SAME_COMPUTE_CAPABILITY",
        "flags": ["VERSION_COMPATIBLE"] if choice.version_compatible else [],
        "timing_cache": str(choice.timing_cache.absolute()) if choice.timing_cache else "",
        "profiles": [_shapes(model, profile) for profile in profiles],
    }
    (folder / _REQUEST).write_text(json.dumps(request))
    for name in (_PLAN, _REFUSED, _LAYERS):
        (folder / name).unlink(missing_ok=True)
    command = [sys.executable, str(_WORKER), _REQUEST]
    environment = _ENVIRONMENT | {name: os.environ[name] for name in _KEPT if name in os.environ}
    done = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise _refused(folder, done.returncode, done.stderr)
    inspected = (folder / _LAYERS).read_text() if request["layers"] else ""
    return BuiltPlan(memoryview(np.memmap(folder / _PLAN, np.uint8, "r")), inspected)  # type: ignore[arg-type]


def write_model(model: OnnxModel, folder: Path) -> None:
    """Write the ONNX file and, beside it, the file of its weights; raises CompileError for weights that are not finite."""
    (folder / _MODEL).write_bytes(model.content)
    with open(folder / WEIGHTS_NAME, "wb") as file:
        file.write(weights_header(model.weights))
        for tensor in model.weights:
            with np.errstate(over="ignore"):  # what float16 does not hold becomes infinity
                array = np.ascontiguousarray(tensor.pack())
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                found = f"NaN, infinity or what {array.dtype.name} does not hold"
                remedy = "use --kv-cache float32, with which all floats are float32"
                raise CompileError(STAGE, f"tensor {tensor.name}", found=found, expected="finite weights", remedy=remedy)
            file.write(array.view(np.uint8).data)


def _shapes(model: OnnxModel, profile: Profile) -> dict[str, list[int]]:
    """The shape of each input that has no fixed one: its dimensions are sequences, tokens and rows."""
    sizes = {"B": profile.sequences, "S": profile.tokens, "R": profile.rows}
    return {
        name: [dim if isinstance(dim, int) else sizes[dim] for dim in dims]
        for name, dims in model.inputs.items()
        if not all(isinstance(dim, int) for dim in dims)
    }


def _refused(folder: Path, status: int, stderr: str) -> CompileError:
    if (folder / _REFUSED).exists():
        found = " ".join((folder / _REFUSED).read_text().split()).rstrip(".")
        return CompileError(STAGE, "TensorRT refuses the graph", found=found)
    if status < 0:
        remedy = "build on a host with more memory: it needs about four times the plan's size"
        return CompileError(STAGE, "the process that builds the plan was ended", found=f"signal {-status}", remedy=remedy)
    last = stderr.strip().splitlines()[-1:] or ["no reason given"]
    return CompileError(STAGE, "the process that builds the plan failed", found=last[0].rstrip("."))
