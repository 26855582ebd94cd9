"""The process that builds one plan: `python worker.py REQUEST`, in the folder of the model.

TensorRT orders parts of a plan by addresses in memory. So only the first build of a process is the same each time. Every plan
gets a process of its own, which imports nothing else, has a small environment, and addresses that are not random.

REQUEST is a JSON file: the model's file `model`, the file `plan` to write, the compute capability `arch` ("SM80") and
`profiles`, each with the shapes of inputs by name. A reason why there is no plan is written to the file `refused`.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt

_QUERY, _NO_RANDOM_ADDRESSES = 0xFFFFFFFF, 0x0040000  # of personality(2)


class _Logger(trt.ILogger):  # type: ignore[misc]
    """Keeps the errors that TensorRT logs."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.Severity.ERROR:
            self.errors.append(message)


def start_again_without_random_addresses() -> None:
    """Replace this process by one whose addresses are the same each time, where Linux allows that and it is not the case."""
    libc = ctypes.CDLL(None)
    persona = libc.personality(_QUERY)
    if not persona & _NO_RANDOM_ADDRESSES and libc.personality(persona | _NO_RANDOM_ADDRESSES) >= 0:
        if libc.personality(_QUERY) & _NO_RANDOM_ADDRESSES:
            os.execv(sys.executable, [sys.executable, *sys.argv])


def main() -> int:
    request = json.loads(Path(sys.argv[1]).read_text())
    logger = _Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["model"]):
        return _refuse(request, [parser.get_error(index).desc() for index in range(parser.num_errors)])
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        # Attention may be computed by several kernels where TensorRT has none of its own: for float32, and for some sizes of
        # heads.
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings return the base class
            layer.attention.decomposable = True
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, request["arch"]), 0)
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the kernels are described in the plan
    for shapes in request["profiles"]:
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, shape, shape, shape)
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return _refuse(request, logger.errors)
    with open(request["plan"], "wb") as file:
        file.write(plan)
    return 0


def _refuse(request: dict[str, Any], reasons: list[str]) -> int:
    Path(request["refused"]).write_text(reasons[0] if reasons else "no reason given")
    return 1


if __name__ == "__main__":
    start_again_without_random_addresses()
    sys.exit(main())
