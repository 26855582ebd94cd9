"""The values of --target: names of devices with a number of ranks, and files that describe a device."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from belle_compile.compiler import backends
from belle_compile.compiler.backends import Backend
from belle_compile.compiler.devices import ALIASES, DEVICES, GB, GIB, Device, Target, known_as
from belle_compile.compiler.errors import CompileError
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.schema import from_plain

_NAME = re.compile(r"(?P<device>[a-z][a-z0-9-]*?)(?:x(?P<ranks>[1-9][0-9]*))?")
_SUFFIX = ".toml"
_REMEDY = "see `belle-compile targets`"


@dataclass(frozen=True)
class _TargetFile:
    """The keys of a file that describes a target: a device, and the figures in which it differs from the one of that name.

    Memory in GiB and bandwidths in GB/s are those of one rank, latency is in microseconds, INT8 operations in trillions a
    second; all but the device may be left out."""

    device: str
    ranks: int | None
    isas: tuple[str, ...] | None
    max_ranks: int | None
    memory_gib: float | None
    memory_bandwidth_gb: float | None
    link_bandwidth_gb: float | None
    link_latency_us: float | None
    int8_tops: float | None


def parse(text: str) -> Target:
    """The target called `text`, for its default backend; see `choose`."""
    return choose(text)[0]


def choose(text: str, backend: str | None = None, isas: Sequence[str] = ()) -> tuple[Target, Backend]:
    """The target called `text`, and the backend that builds for it: the one called `backend`, or the device's default.

    A target is a device, with `xN` behind it for N ranks ("cpu", "a100x4"), upper or lower case; or the one that a file
    NAME.toml describes. It has the instruction sets of the backend, restricted to those that the file and `isas` name, if any.

    Raises CompileError for a device, a number of ranks, an instruction set or a backend that this release does not build for.
    """
    device, ranks, file_isas = resolve(text)
    if not backends.serving(device):
        raise _not_yet(known_as(device.name), text)
    chosen = backends.choose(device, backend)
    target = Target(device.name, chosen.isas(device), 1, device)
    return target.carrying(file_isas).carrying(isas).with_ranks(ranks), chosen


def listing() -> list[dict[str, Any]]:
    """Every device with its figures, the names of the backends that serve it (the default first), and whether engines can be
    built for it."""
    devices = []
    for device in DEVICES.values():
        names = [backend.name for backend in backends.serving(device)]
        devices.append(asdict(device) | {"backends": names, "builds": bool(names)})
    return devices


def resolve(text: str) -> tuple[Device, int, tuple[str, ...]]:
    """The device, the number of ranks and the instruction sets (empty: all) of the target called `text`, whether or not engines
    can be built for it; raises CompileError if it is unknown."""
    if text.strip().endswith(_SUFFIX):
        return _read(Path(text.strip()))
    name = text.strip().lower()
    if name in DEVICES:  # first, for names such as rtx4090, which is not 4090 ranks of "rt"
        return DEVICES[name], 1, ()
    match = _NAME.fullmatch(name)
    return _device(match["device"] if match else "", text), int(match["ranks"] or 1) if match else 1, ()


def _device(name: str, text: str) -> Device:
    device = DEVICES.get(ALIASES.get(name, name))
    if device is not None:
        return device
    if known := known_as(name):
        raise _not_yet(known, text)
    raise CompileError("target", "unknown target", found=repr(text), expected=_supported(), remedy=_REMEDY)


def _not_yet(known: str, text: str) -> CompileError:
    what, names = f"{known} is known but this release does not build for it yet", _supported()
    return CompileError("target", what, found=repr(text), expected=names, remedy=f"use --target {names}")


def _supported() -> str:
    return ", ".join(device.name for device in DEVICES.values() if backends.serving(device))


def _read(path: Path) -> tuple[Device, int, tuple[str, ...]]:
    """Read a target's file; returns what `resolve` does."""
    plain = _toml(path)
    absent: dict[str, Any] = {field.name: None for field in fields(_TargetFile) if field.name != "device"}

    def refuse(field: str, found: str, expected: str) -> EngineError:
        return EngineError("target", f"key {field} of {path}", found=found, expected=expected)

    try:
        file = from_plain(_TargetFile, absent | plain, refuse)
        numbers = {name: value for name, value in vars(file).items() if isinstance(value, (int, float))}
        for name, value in numbers.items():
            if not value > 0:
                raise refuse(name, f"{value:g}", "a number above 0")
    except EngineError as error:
        raise CompileError("target", error.what, found=error.found, expected=error.expected, remedy=_REMEDY) from None
    known = _device(file.device.strip().lower(), file.device)
    device = replace(
        known,
        max_ranks=file.max_ranks or known.max_ranks,
        memory=round((file.memory_gib or 0) * GIB) or known.memory,
        memory_bandwidth=(file.memory_bandwidth_gb or 0) * GB or known.memory_bandwidth,
        link_bandwidth=(file.link_bandwidth_gb or 0) * GB or known.link_bandwidth,
        link_latency=(file.link_latency_us or 0) / 1e6 or known.link_latency,
        int8=(file.int8_tops or 0) * 1e12 or known.int8,
    )
    return device, file.ranks or 1, file.isas or ()


def _toml(path: Path) -> dict[str, Any]:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        content: dict[str, Any] = toml.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, toml.TOMLDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CompileError("target", f"file {path}", found=reason, expected="a TOML file", remedy=_REMEDY) from None
    return content
