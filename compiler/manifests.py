"""Parts of an engine's manifest that builds and repartitions share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from belle_compile import __version__
from belle_compile.compiler.backends import Backend, Payload
from belle_compile.compiler.devices import Target
from belle_compile.compiler.footprint import required_memory
from belle_compile.runtime.artifact import PassRecord, Requirements, TargetInfo


def target_info(target: Target, backend: Backend, payloads: Sequence[Payload]) -> TargetInfo:
    """The manifest's description of the target, of the backend and of what a host must have for one rank."""
    need = required_memory([payload.footprint for payload in payloads])
    requires = Requirements(target.device.arch, target.isas, need.total, need.mapped)
    return TargetInfo(target.name, backend.name, target.isas, requires, target.ranks)


def pass_records(records: Sequence[Mapping[str, Any]]) -> tuple[PassRecord, ...]:
    """The records of a pipeline in the manifest's form."""
    return tuple(PassRecord(r["name"], r["options"], int(r["changes"]), tuple(r["refusals"])) for r in records)


def toolchain(payload: Payload) -> dict[str, str]:
    """The version of each package and tool that made an engine."""
    packages = {"belle-compile": __version__} | {name: _version(name) for name in ("numpy", "onnx-ir")}
    return packages | dict(payload.toolchain)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
