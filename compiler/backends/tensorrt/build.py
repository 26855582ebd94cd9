"""Builds plans from ONNX models, for GPUs that the host need not have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from belle_compile.compiler.backends.onnx.graph import OnnxModel
from belle_compile.compiler.backends.tensorrt.installed import require_tensorrt
from belle_compile.compiler.backends.weights_header import weights_header
from belle_compile.compiler.errors import CompileError
from belle_compile.runtime.executors.tensorrt_plan import STAGE, Profile
from belle_compile.runtime.program import WEIGHTS_NAME

_MODEL, _PLAN, _REQUEST, _REFUSED = "model.onnx", "engine.plan", "request.json", "refused.txt"
# The addresses in the process depend on the size of its environment, and on the arena of memory that a thread gets; see
# worker.py.
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}
_KEPT = ("LD_LIBRARY_PATH", "PYTHONPATH")
_WORKER = Path(__file__).with_name("worker.py")


def build_plan(model: OnnxModel, arch: str, profiles: Sequence[Profile]) -> memoryview:
    """The plan of a model for one architecture ("sm_80"), with an optimization profile of one shape for each of `profiles`.

    The same model and version of TensorRT give the same bytes. Another process builds the plan from temporary files, with all
    weights in its memory; here, one tensor is in memory at a time. Raises CompileError for a graph that TensorRT does not take.
    """
    require_tensorrt()
    with tempfile.TemporaryDirectory(prefix="plan-") as name:
        folder = Path(name)
        write_model(model, folder)
        return plan_of(folder, model, arch, profiles)


def plan_of(folder: Path, model: OnnxModel, arch: str, profiles: Sequence[Profile]) -> memoryview:
    """The plan of a model that `write_model` has written to a folder; arguments and errors are those of `build_plan`."""
    shapes = [_shapes(model, profile) for profile in profiles]
    request = {"model": _MODEL, "plan": _PLAN, "refused": _REFUSED, "arch": arch.replace("sm_", "SM"), "profiles": shapes}
    (folder / _REQUEST).write_text(json.dumps(request))
    for name in (_PLAN, _REFUSED):
        (folder / name).unlink(missing_ok=True)
    command = [sys.executable, str(_WORKER), _REQUEST]
    environment = _ENVIRONMENT | {name: os.environ[name] for name in _KEPT if name in os.environ}
    done = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise _refused(folder, done.returncode, done.stderr)
    return memoryview(np.memmap(folder / _PLAN, np.uint8, "r"))  # type: ignore[arg-type]


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
