"""The process that builds one plan: `python worker.py REQUEST`, in the folder of the model.

TensorRT for RTX orders parts of a plan by addresses in memory. So only the first build of a process is the same each time.
Every plan gets a process of its own, which imports nothing else, has a small environment, and addresses that are not random.

REQUEST is a JSON file: the library's Python module `module`, the model's file `model`, the file `plan` to write, and
`profiles`, each with the shapes of inputs by name. With a compute capability `arch` ("SM80"), the plan is built for it, else
for the GPU of this host, as far as the level `compatibility` of TensorRT's HardwareCompatibilityLevel says. `flags` are names
of BuilderFlag; `timing_cache` is a file with the times of kernels, which is read where it is there, and written; and TensorRT's
inspector writes the file `layers`, both unless they are empty. A reason why there is no plan is written to the file `refused`.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

_QUERY, _NO_RANDOM_ADDRESSES = 0xFFFFFFFF, 0x0040000  # of personality(2)


class Refused(Exception):
    """TensorRT makes no plan; the message is its reason."""


def start_again_without_random_addresses() -> None:
    """Replace this process by one whose addresses are the same each time, where Linux allows that and it is not the case."""
    libc = ctypes.CDLL(None)
    persona = libc.personality(_QUERY)
    if not persona & _NO_RANDOM_ADDRESSES and libc.personality(persona | _NO_RANDOM_ADDRESSES) >= 0:
        if libc.personality(_QUERY) & _NO_RANDOM_ADDRESSES:
            os.execv(sys.executable, [sys.executable, *sys.argv])


def main() -> int:
    request = json.loads(Path(sys.argv[1]).read_text())
    trt = importlib.import_module(request["module"])
    logger = _logger(trt)
    try:
        plan = _build(trt, request, logger)
        with open(request["plan"], "wb") as file:
            file.write(plan)
        if request["layers"]:
            Path(request["layers"]).write_text(_layers(trt, plan, logger))
    except Refused as refused:
        Path(request["refused"]).write_text(str(refused))
        return 1
    return 0


def _build(trt: Any, request: dict[str, Any], logger: Any) -> Any:
    try:
        builder = trt.Builder(logger)
    except TypeError:  # the builder is a null pointer where the library needs a GPU and finds none
        raise _reason(logger) from None
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["model"]):
        raise Refused(next((parser.get_error(index).desc() for index in range(parser.num_errors)), "no reason given"))
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        # Attention may be computed by several kernels where TensorRT has none of its own: for float32, and for some sizes of
        # heads.
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings return the base class
            layer.attention.decomposable = True
    config = _config(trt, request, builder)
    cache = _timing_cache(request, config, logger) if request["timing_cache"] else None
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _reason(logger)
    if cache is not None:
        Path(request["timing_cache"]).write_bytes(cache.serialize())
    return plan


def _config(trt: Any, request: dict[str, Any], builder: Any) -> Any:
    config = builder.create_builder_config()
    if request["arch"]:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, request["arch"]), 0)
    if request["compatibility"]:
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, request["compatibility"])
    config.clear_flag(trt.BuilderFlag.TF32)
    for flag in request["flags"]:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the kernels are described in the plan
    for shapes in request["profiles"]:
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, shape, shape, shape)
        config.add_optimization_profile(profile)
    return config


def _timing_cache(request: dict[str, Any], config: Any, logger: Any) -> Any:
    path = Path(request["timing_cache"])
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise Refused(f"{path}, a timing cache that does not fit: {_reason(logger)}")
    return cache


def _layers(trt: Any, plan: Any, logger: Any) -> str:
    """What the inspector tells of the plan, as JSON."""
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = True  # that of the lean runtime, which was put into the plan just now
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise _reason(logger)
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def _logger(trt: Any) -> Any:
    """A logger that keeps the errors in `errors`."""

    class CollectingLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)

    return CollectingLogger()


def _reason(logger: Any) -> Refused:
    return Refused(next(iter(logger.errors), "no reason given"))


if __name__ == "__main__":
    start_again_without_random_addresses()
    sys.exit(main())
