"""Parts of an engine's manifest that builds and repartitions share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from belle_compile import __version__
from belle_compile.compiler.backends import Backend, Payload
from belle_compile.compiler.devices import Target
from belle_compile.compiler.footprint import required_bytes
from belle_compile.runtime.artifact import PassRecord, Requirements, TargetInfo


def target_info(target: Target, backend: Backend, payloads: Sequence[Payload]) -> TargetInfo:
    """The target, the backend whose executor runs the engine, and what a host must have for a rank."""
    memory = required_bytes([payload.footprint for payload in payloads])
    return TargetInfo(
        target.name, backend.name, target.isas, Requirements(target.device.arch, target.isas, memory), target.ranks
    )


def pass_records(records: Sequence[Mapping[str, Any]]) -> tuple[PassRecord, ...]:
    """The records of a pipeline as the manifest has them."""
    return tuple(PassRecord(r["name"], r["options"], int(r["changes"]), tuple(r["refusals"])) for r in records)


def toolchain(payload: Payload) -> dict[str, str]:
    """The versions of what made an engine."""
    own = {"belle-compile": __version__} | {name: _version(name) for name in ("numpy", "onnx-ir")}
    return own | dict(payload.toolchain)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
