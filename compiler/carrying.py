"""One listing of which presets and methods each backend and each export format carries, from the records beside them."""

from __future__ import annotations

from typing import Any

from belle_compile.compiler import backends, exports
from belle_compile.compiler.backends.base import registered
from belle_compile.compiler.devices import DEVICES, Target
from belle_compile.passes.presets import DEFAULT_PRESET, METHODS, PRESETS


def listing() -> dict[str, list[dict[str, Any]]]:
    """`backends` and `formats`, each with its name and, for every preset and method, the reason why it is not carried (empty:
    it is). A preset that is carried without one of its methods is listed as carried; the method is not."""
    return {"backends": [_backend(backend) for backend in registered()], "formats": exports.listing()}


def _backend(backend: backends.Backend) -> dict[str, Any]:
    device = next(device for device in DEVICES.values() if backend.isas(device))
    target = Target(device.name, backend.isas(device), 1, device)
    passes = backend.passes(PRESETS[DEFAULT_PRESET].recipe)
    return {
        "name": backend.name,
        "runtimes": f"belle-run on {', '.join(device.name for device in DEVICES.values() if backend.isas(device))}",
        "presets": {preset.name: backend.refusal(target, preset.recipe) for preset in PRESETS.values()},
        "methods": {name: "" if passes.carries_method(name) else f"no support for the method {name}" for name in METHODS},
    }
