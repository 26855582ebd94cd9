"""What an engine is built for: a device, the instruction sets it carries kernels for, its ranks."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from belle_compile.compiler.devices import ALIASES, DEVICES, GB, GIB, Device, architecture, known_as
from belle_compile.compiler.errors import CompileError
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.host import GPU_ARCHS
from belle_compile.runtime.schema import from_plain


@dataclass(frozen=True)
class Target:
    """A kind of host and how many ranks of it serve one engine.

    `name` is what the user typed in its shortest form ("cpu", "cpux2"), `arch` the machine of the serving host as `uname -m`
    prints it (empty: any), `isas` the instruction sets the fat engine carries kernels for, best first (of a GPU its
    architecture, "sm_80"), and `ranks` the processes that share one model, each on a device of its own.
    """

    name: str
    arch: str
    isas: tuple[str, ...]
    ranks: int
    device: Device

    @property
    def is_gpu(self) -> bool:
        """Whether its devices are GPUs, each of a host of any kind; else they are the host's processor."""
        return bool(self.device.compute_capability)

    def carrying(self, isas: Sequence[str]) -> Target:
        """The same target with only some of its instruction sets; all of them for none named."""
        if unknown := [isa for isa in isas if isa not in self.isas]:
            what, known = f"instruction set of {self.name}", ", ".join(self.isas)
            raise CompileError("target", what, found=", ".join(unknown), expected=known)
        return replace(self, isas=tuple(isa for isa in self.isas if not isas or isa in isas))

    def with_ranks(self, ranks: int) -> Target:
        """The same kind of host for so many ranks: "cpux2" for two of "cpu"."""
        name, most = self.device.name, self.device.max_ranks
        if not 1 <= ranks <= most:
            raise CompileError("target", f"ranks of {name}", found=str(ranks), expected=f"1 to {most}")
        return self if ranks == self.ranks else replace(self, name=name if ranks == 1 else f"{name}x{ranks}", ranks=ranks)


CPU = Target(name="cpu", arch="x86_64", isas=("amx", "avx512vnni", "avx2"), ranks=1, device=DEVICES["cpu"])

_GPUS = tuple(
    Target(name=device.name, arch="", isas=(architecture(device),), ranks=1, device=device)
    for device in DEVICES.values()
    if architecture(device) in GPU_ARCHS
)
SUPPORTED = (CPU, *_GPUS)

_NAME = re.compile(r"(?P<device>[a-z][a-z0-9-]*?)(?:x(?P<ranks>[1-9][0-9]*))?")
_SUFFIX = ".toml"
_REMEDY = "see `belle-compile targets`"


@dataclass(frozen=True)
class _TargetFile:
    """The keys of a file with a target: the device, and what of it is otherwise. Memory in GiB and bandwidths in GB/s are those
    of one rank, latency is in microseconds, INT8 operations in trillions a second; all but the device may be left out."""

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
    """The target called `text`: a device, with `xN` behind it for N ranks ("cpu", "a100x4"), upper or lower case; or the one
    that a file NAME.toml describes.

    Raises CompileError for a device or a number of ranks this release does not build for.
    """
    device, ranks, isas = resolve(text)
    for target in SUPPORTED:
        if device.name == target.device.name:
            return replace(target, device=device).carrying(isas).with_ranks(ranks)
    names = ", ".join(target.name for target in SUPPORTED)
    raise CompileError(
        "target",
        f"{known_as(device.name)} is known but this release does not build for it yet",
        found=repr(text),
        expected=names,
        remedy=f"use --target {names}",
    )


def resolve(text: str) -> tuple[Device, int, tuple[str, ...]]:
    """The device, the ranks and the instruction sets (none: all) that a target's name or file means, built for or not; raises
    CompileError for what is unknown."""
    if text.strip().endswith(_SUFFIX):
        return _read(Path(text.strip()))
    name = text.strip().lower()
    if name in DEVICES:  # such as rtx4090, which is not 4090 of something
        return DEVICES[name], 1, ()
    match = _NAME.fullmatch(name)
    return _device(match["device"] if match else "", text), int(match["ranks"] or 1) if match else 1, ()


def _device(name: str, text: str) -> Device:
    device = DEVICES.get(ALIASES.get(name, name))
    if device is not None:
        return device
    names = ", ".join(target.name for target in SUPPORTED)
    if known := known_as(name):
        what, remedy = f"{known} is known but this release does not build for it yet", f"use --target {names}"
        raise CompileError("target", what, found=repr(text), expected=names, remedy=remedy)
    raise CompileError("target", "unknown target", found=repr(text), expected=names, remedy=_REMEDY)


def _read(path: Path) -> tuple[Device, int, tuple[str, ...]]:
    """What a file describes."""
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
        found: dict[str, Any] = toml.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, toml.TOMLDecodeError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise CompileError("target", f"file {path}", found=said, expected="a TOML file", remedy=_REMEDY) from None
    return found
