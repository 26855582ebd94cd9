"""The adapters that are loaded: their names, and the slots of the executor that they are stored in."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from belle_compile.runtime.adapters.basis import EngineBasis
from belle_compile.runtime.adapters.factors import AdapterSlots
from belle_compile.runtime.adapters.peft import read_adapter
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors import AdaptableExecutor, Executor
from belle_compile.runtime.serving.step_loop import StepLoop
from belle_compile.runtime.serving.telemetry import AdapterStats

LONGEST_NAME = 256  # characters
MORE_SLOTS = 4  # beside those of the adapters at the start, where others may be loaded later
_STAGE = "adapter"


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter under a name. `digest` identifies its files and scale, `rank` is the largest of its changes, which are
    multiplied by `scale`."""

    name: str
    directory: Path
    digest: str
    rank: int
    scale: float
    slot: int = field(repr=False)


class UnknownAdapter(EngineError):
    """No adapter of a name is loaded."""


class AdapterBusy(EngineError):
    """An adapter cannot be unloaded, because requests under way use it."""


class Adapters:
    """Loads and unloads adapters while an engine runs. May be used by several threads."""

    def __init__(self, memory: AdapterSlots, basis: EngineBasis, loop: StepLoop) -> None:
        self._memory, self._basis, self._loop = memory, basis, loop
        self._lock = threading.Lock()  # held while one is loaded or unloaded
        self._loaded: Mapping[str, LoadedAdapter] = {}  # replaced as a whole

    @property
    def loaded(self) -> Mapping[str, LoadedAdapter]:
        """The adapters by name, in the order in which they were loaded."""
        return self._loaded

    def names(self, digests: Collection[str]) -> tuple[str, ...]:
        """The names of the loaded adapters with one of these digests; files that are loaded twice have two."""
        return tuple(name for name, adapter in self._loaded.items() if adapter.digest in digests)

    def stats(self) -> AdapterStats:
        """The adapters that requests use. May be called on any thread."""
        running, waiting = self._loop.adapters_in_use()
        return AdapterStats(self._memory.count, self.names(running), self.names(waiting))

    def find(self, name: str) -> LoadedAdapter:
        """The adapter of a name; raises `UnknownAdapter`."""
        adapter = self._loaded.get(name)
        if adapter is None:
            expected = ", ".join(self._loaded) or "none, since no adapter is loaded"
            raise UnknownAdapter(_STAGE, "no adapter of this name is loaded", found=repr(name)[:100], expected=expected)
        return adapter

    def load(self, name: str, directory: str | Path, scale: float = 1.0) -> LoadedAdapter:
        """Load the adapter in a directory under a new name. Requests with other adapters go on meanwhile."""
        if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
            expected = f"1 to {LONGEST_NAME} printable characters"
            raise EngineError(_STAGE, "name of an adapter", found=repr(name)[:100], expected=expected)
        with self._lock:
            if name in self._loaded:
                found = f"one from {self._loaded[name].directory}"
                raise EngineError(_STAGE, f"an adapter {name} is loaded already", found=found, remedy="unload it first")
            adapter = read_adapter(Path(directory), self._basis, self._memory.layout.rank, scale)
            known = next((each for each in self._loaded.values() if each.digest == adapter.digest), None)
            slot = self._free_slot() if known is None else known.slot
            if known is None:
                self._memory.write(slot, adapter.changes, self._loop.call)
                self._loop.call(partial(self._loop.scheduler.adapters.__setitem__, adapter.digest, slot))
            loaded = LoadedAdapter(name, adapter.directory, adapter.digest, adapter.rank, scale, slot)
            self._loaded = {**self._loaded, name: loaded}
        return loaded

    def unload(self, name: str) -> None:
        """Forget an adapter; raises `AdapterBusy` where requests under way use it."""
        with self._lock:
            adapter = self.find(name)
            others = {key: each for key, each in self._loaded.items() if key != name}
            if all(each.digest != adapter.digest for each in others.values()):
                if users := self._loop.call(partial(self._loop.release_adapter, adapter.digest)):
                    remedy = "try again when they have ended"
                    raise AdapterBusy(_STAGE, f"adapter {name} is in use", found=f"{users} requests", remedy=remedy)
            self._loaded = others

    def _free_slot(self) -> int:
        taken = {adapter.slot for adapter in self._loaded.values()}
        free = next((slot for slot in range(self._memory.count) if slot not in taken), None)
        if free is None:
            remedy = "unload one, or load the engine with more room for adapters (max_loras)"
            raise EngineError(_STAGE, "too many adapters", found=f"{len(taken)} loaded", remedy=remedy)
        return free


def open_adapters(directory: Path, executor: Executor, loop: StepLoop) -> Adapters | None:
    """The adapters of an engine that was loaded with room for some; None without."""
    memory = executor.adapters if isinstance(executor, AdaptableExecutor) else None
    return Adapters(memory, EngineBasis.read(directory), loop) if memory else None


def parse_named(texts: Iterable[str]) -> dict[str, Path]:
    """The directories of adapters by name, from texts NAME=DIR; raises `EngineError`."""
    named: dict[str, Path] = {}
    for text in texts:
        name, equals, place = text.partition("=")
        if not (name and equals and place) or name in named:
            found = f"a second {name}" if name in named else repr(text)[:100]
            raise EngineError(_STAGE, "option lora", found=found, expected="NAME=DIR, each name once")
        named[name] = Path(place)
    return named
