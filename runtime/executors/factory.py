"""The base class of executor factories, which check whether a host can run an engine and load its executor."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from belle_compile.runtime import host
from belle_compile.runtime.artifact import STAGE, Manifest, TargetInfo
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.base import Executor
from belle_compile.runtime.executors.kv_memory import KvMemory

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from belle_compile.runtime.distributed.collectives import Collectives


@dataclass(frozen=True)
class LoadRequest:
    """One rank to load: its `directory` (`ENGINE/rank0`), and the options of `Engine.load`; None leaves one to the executor.

    `kv_memory` is the size of this rank's KV cache. `collectives` connect it to the other ranks of an engine that has several.
    An engine that takes adapters gets `adapter_slots` for them. `beside` is another executor of this process, which never runs
    at the same time: threads can be shared with it.
    """

    directory: Path
    manifest: Manifest
    threads: int | None = None
    isa: str | None = None
    kv_memory: KvMemory = field(default_factory=KvMemory)
    collectives: Collectives | None = None
    adapter_slots: int = 0
    beside: Executor | None = None

    @property
    def local_rank(self) -> int:
        """This rank's number among those of its host."""
        return self.collectives.rank_here if self.collectives else 0


class ExecutorFactory(ABC):
    """Makes the executors of one backend's engines. Importing it is cheap: kernels and drivers are loaded by `load`.

    `isas` are the names of instruction sets that a manifest may use; None allows any.
    """

    isas: Sequence[str] | None = None

    def check_host(self, target: TargetInfo, ranks_here: int = 1, held_bytes: int = 0) -> None:
        """Raise `EngineError` where this host cannot run `ranks_here` ranks of an engine: by default, by machine and memory,
        of which another engine of this process holds `held_bytes`."""
        check_machine(target)
        check_memory(target, ranks_here, held_bytes)

    def usable_isas(self, target: TargetInfo) -> Sequence[str]:
        """The instruction sets of an engine that this host can run, best first."""
        return target.isas

    def try_host(self, target: TargetInfo) -> str:
        """Check this host like `check_host`, and open the device that would run a rank, which takes longer; returns the
        instruction set that would be used. Raises `EngineError` where the host cannot run the engine."""
        self.check_host(target)
        return next(iter(self.usable_isas(target)), "")

    def kernels(self, directory: Path) -> dict[str, Any]:
        """Facts about the kernels in a rank's directory, by name, for reports; empty by default."""
        return {}

    def layers(self, directory: Path) -> dict[str, dict[str, int]]:
        """The numbers of kernels of each kind in a rank's directory, by what is run, for reports; empty by default."""
        return {}

    @abstractmethod
    def load(self, request: LoadRequest) -> Executor:
        """Load one rank, whose host and files have been checked."""


def cannot_run(target: TargetInfo, found: str, expected: str, remedy: str) -> EngineError:
    """The error of a host that cannot run an engine."""
    what = f"this host cannot run the engine built for {target.name}"
    return EngineError(STAGE, what, found=found, expected=expected, remedy=remedy)


def check_machine(target: TargetInfo) -> None:
    """Raise `EngineError` on another system than Linux, or another kind of machine than the engine requires."""
    arch = target.requires.arch
    system, machine = host.host_arch()
    if system != "Linux" or arch not in ("", machine):
        raise cannot_run(target, f"{system} {machine}", f"Linux {arch}".strip(), "run it on such a host")


def check_memory(target: TargetInfo, ranks_here: int, held_bytes: int = 0) -> None:
    """Raise `EngineError` where the host's memory is too small for `ranks_here` ranks beside what is held already.

    Where it is too small for mapped weights alone, that is a warning, unless something is held: an engine that is being served
    is not made to read its own weights from the disk.
    """
    memory, requires = host.memory_bytes(), target.requires
    whole = ranks_here * requires.memory_bytes
    needed = whole if held_bytes else ranks_here * requires.resident_bytes
    if memory - held_bytes < needed:
        expected = f"{_gib(needed)}" + (f" for {ranks_here} ranks" if ranks_here > 1 else "")
        expected += f", and {_gib(whole - needed)} more for mapped weights" if whole > needed else ""
        remedy = "run it on a larger host or raise the container's memory limit"
        found = f"{_gib(memory)} of memory"
        if held_bytes:
            found += f", of which {held_bytes / 2**30:.1f} are for another engine and the KV caches"
            remedy = "load with less memory for the KV cache (--kv-cache-memory), or on a larger host"
        raise cannot_run(target, found, expected, remedy)
    if memory < whole:
        text = "of %s of memory, %s are left to the %s of mapped weights: every step reads weights from the disk, which is slow"
        _log.warning(text, _gib(memory), _gib(memory - needed), _gib(whole - needed))


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
