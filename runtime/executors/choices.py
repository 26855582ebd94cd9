"""Which of the kernels that compute the same a GPU runs fastest: measured at the first load, kept beside the engine."""

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

_CALLS = 16  # of a kernel that are measured together: with weights of their own, which no cache keeps
_TRIES = 3
ANY = "any"  # in place of a bound


class Choices:
    """For kernels by name and the largest number of rows they are run for, what is run instead."""

    def __init__(self, directory: Path, device: Device) -> None:
        """Read what was measured for this program on this kind of device, if it was."""
        slug = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
        self._path = directory / f"choices-{slug}.json"
        program = hashlib.sha256((directory / PROGRAM_NAME).read_bytes()).hexdigest()
        self._facts = {"program": program, "device": device.name}
        self.found: dict[str, str] | None = None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or not such a file
            plain: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
            if plain.pop("choices_format", None) == 1 and self._facts.items() <= plain.items():
                self.found = dict(plain["choices"])

    def known(self, program: Program) -> bool:
        """Whether there is nothing to be measured: what was found is one of the choices for every kernel that has some."""
        found = self.found or {}
        return all(
            found.get(key(name, None if bound == ANY else int(bound))) in (name, *others)
            for name, by_bound in program.alternatives.items()
            for bound, others in by_bound.items()
        )

    def best(self, name: str, bound: int | None) -> str:
        """What to run in place of a kernel."""
        return (self.found or {}).get(key(name, bound), name)

    def keep(self, found: dict[str, str], seconds: Mapping[str, Mapping[str, float]] | None = None) -> None:
        """Take these, and write them for the next load where the engine's directory can be written to, with what was measured
        for whoever wants to know."""
        self.found = found
        whole = {"choices_format": 1, **self._facts, "choices": found, "seconds": seconds or {}}
        text = json.dumps(whole, indent=1, sort_keys=True) + "\n"
        partial = self._path.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):
            partial.write_text(text, encoding="utf-8")
            partial.replace(self._path)


def key(name: str, bound: int | None) -> str:
    """Of a kernel and the largest number of rows it is run for."""
    return f"{name} {ANY if bound is None else bound}"


def measure(
    choices: Choices,
    program: Program,
    device: Device,
    loaded: Collection[str],
    launch: Callable[[Call, str, int], None],
    pretend: Callable[[When, int], None],
) -> None:
    """Find the fastest of the alternatives of every kernel among those `loaded`, unless that is known. `launch(call, kernel,
    rows)` starts one; `pretend(when, rows)` makes a step of so many rows, for calls of that sort."""
    if choices.known(program):
        return
    found: dict[str, str] = {}
    seconds: dict[str, dict[str, float]] = {}
    for name, by_bound in sorted(program.alternatives.items()):
        for text, others in sorted(by_bound.items()):
            bound = None if text == ANY else int(text)
            calls = [call for call in program.calls if (bound, name) in call.kernels()][:_CALLS]
            most = max(program.max_tokens if call.rows == "T" else program.max_rows for call in calls)
            rows = min(most, bound or most, program.max_sequences if calls[0].when == "alone" else most)
            pretend(calls[0].when, rows)
            there = [one for one in (name, *others) if one in loaded]
            times = {one: _seconds(device, calls, one, rows, launch) / len(calls) for one in there}
            seconds[key(name, bound)] = times
            found[key(name, bound)] = min(times, key=lambda one: times[one])
    choices.keep(found, seconds)


def _seconds(device: Device, calls: list[Call], name: str, rows: int, launch: Callable[[Call, str, int], None]) -> float:
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
