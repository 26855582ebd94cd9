"""Which of several kernels that compute the same a GPU runs fastest: measured at the first load, stored in the engine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from belle_compile.runtime.executors.device import Device
from belle_compile.runtime.program import PROGRAM_NAME, Call, Program, When

_CALLS = 16  # calls of a kernel measured one after the other: each has its own weights, so that no cache holds them
_TRIES = 3
ANY = "any"  # stands for the bound None


class Choices:
    """The kernel that runs in place of each kernel with alternatives, by its name and the bound of its rows."""

    def __init__(self, directory: Path, device: Device) -> None:
        """Read the choices that an earlier load made for this program on this kind of device, if there are any."""
        slug = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
        self._path = directory / f"choices-{slug}.json"
        program = hashlib.sha256((directory / PROGRAM_NAME).read_bytes()).hexdigest()
        self._facts = {"program": program, "device": device.name}
        self.chosen: dict[str, str] | None = None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # no such file, or a damaged one
            plain: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
            if plain.pop("choices_format", None) == 1 and self._facts.items() <= plain.items():
                self.chosen = dict(plain["choices"])

    def known(self, program: Program) -> bool:
        """Whether nothing needs to be measured: for every kernel with alternatives, itself or one of them is chosen."""
        chosen = self.chosen or {}
        return all(
            chosen.get(key(name, None if bound == ANY else int(bound))) in (name, *others)
            for name, by_bound in program.alternatives.items()
            for bound, others in by_bound.items()
        )

    def best(self, name: str, bound: int | None) -> str:
        """The kernel to run in place of `name`, the kernel of a call for up to `bound` rows (None: any number)."""
        return (self.chosen or {}).get(key(name, bound), name)

    @property
    def digest(self) -> str:
        """SHA-256 in hex of the choices: where it is the same, the same kernels run."""
        return hashlib.sha256(json.dumps(sorted((self.chosen or {}).items())).encode()).hexdigest()

    def keep(self, chosen: dict[str, str], seconds: Mapping[str, Mapping[str, float]] | None = None) -> None:
        """Use these choices, and store them for the next load if the engine's directory can be written to; the `seconds` that
        were measured are stored for people to read."""
        self.chosen = chosen
        whole = {"choices_format": 1, **self._facts, "choices": chosen, "seconds": seconds or {}}
        text = json.dumps(whole, indent=1, sort_keys=True) + "\n"
        partial = self._path.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):
            partial.write_text(text, encoding="utf-8")
            partial.replace(self._path)


def key(name: str, bound: int | None) -> str:
    """The key of a kernel that calls have for up to `bound` rows (None: any number)."""
    return f"{name} {ANY if bound is None else bound}"


def measure(
    choices: Choices,
    program: Program,
    device: Device,
    loaded: Collection[str],
    launch: Callable[[Call, str, int], None],
    pretend: Callable[[When, int], None],
) -> None:
    """Choose the fastest of the alternatives of every kernel among those `loaded`, unless they are chosen already.

    `launch(call, kernel, rows)` enqueues a kernel with a call's arguments; `pretend(when, rows)` fills the inputs of a step
    with `rows` rows in which calls of the sort `when` run.
    """
    if choices.known(program):
        return
    chosen: dict[str, str] = {}
    seconds: dict[str, dict[str, float]] = {}
    for name, by_bound in sorted(program.alternatives.items()):
        for text, others in sorted(by_bound.items()):
            bound = None if text == ANY else int(text)
            calls = [call for call in program.calls if (bound, name) in call.kernels()][:_CALLS]
            most = max(program.max_tokens if call.rows == "T" else program.max_rows for call in calls)
            rows = min(most, bound or most, program.max_sequences if calls[0].when == "alone" else most)
            pretend(calls[0].when, rows)
            candidates = [kernel for kernel in (name, *others) if kernel in loaded]
            times = {kernel: _seconds(device, calls, kernel, rows, launch) / len(calls) for kernel in candidates}
            seconds[key(name, bound)] = times
            chosen[key(name, bound)] = min(times, key=lambda kernel: times[kernel])
    choices.keep(chosen, seconds)


def _seconds(device: Device, calls: list[Call], name: str, rows: int, launch: Callable[[Call, str, int], None]) -> float:
    """The least time of several runs of all `calls` with the kernel `name`."""

    def run() -> None:
        for call in calls:
            launch(call, name, rows)

    recorded = device.record(run)
    device.replay(recorded)

    def timed(mark: Callable[[], None]) -> None:
        for _ in range(_TRIES):
            mark()
            device.replay(recorded)
        mark()

    seconds = min(device.times(timed))
    device.forget(recorded)
    return seconds
