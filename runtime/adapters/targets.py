"""Which modules of its base an adapter changes, by the rules of PEFT (`check_target_module_exists`)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from belle_compile.runtime.errors import EngineError

STAGE = "adapter"
T = TypeVar("T")

ALL_LINEAR = "all-linear"  # of target_modules: every linear layer but the head
MOST_SECONDS = 10.0  # for all matches of one pattern; usual ones take milliseconds
_PLAIN = re.compile(r"[\w.-]*")
_LAYER = re.compile(r".*?\.[^.]*\.(?P<layer>\d+)\.")
# Expressions come with the adapter, and some take exponential time: they are matched in a process that can be stopped.
_PROGRAM = "import json, re, sys; p, names = json.load(sys.stdin); print(json.dumps([n for n in names if re.fullmatch(p, n)]))"


@dataclass(frozen=True)
class Targets:
    """What an adapter_config.json says about the modules that get low-rank changes.

    A string is a regular expression for whole names; a sequence holds names or their last parts. `targets` is None where the
    file leaves the choice to the version of PEFT. `layers` are the layers that are changed (None: all), which `patterns` name
    the list of (empty: any).
    """

    targets: str | tuple[str, ...] | None
    excluded: str | tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    patterns: tuple[str, ...] = ()

    def among(self, linears: Collection[str], others: Collection[str], head: str) -> frozenset[str] | None:
        """The modules among the `linears`, the `head` one of them, and `others`, such as the embedding, that are changed; None
        where the file does not say it."""
        if self.targets is None:
            return None
        names = {*linears, *others} - self._excluded([*linears, *others])
        if isinstance(self.targets, str):
            if self.targets.lower() == ALL_LINEAR:
                return frozenset(names & {*linears} - {head})
            return frozenset(matching(self.targets, names))
        changed = {name for name in names if _ends(name, self.targets)}
        if self.layers is None:
            return frozenset(changed)
        return frozenset(name for name in changed if name in self.targets or self._layer_of(name) in self.layers)

    def _excluded(self, names: Sequence[str]) -> set[str]:
        excluded = matching(self.excluded, names) if isinstance(self.excluded, str) else set()
        ends = () if isinstance(self.excluded, str) else self.excluded
        return excluded | {name for name in names if _ends(name, ends) or any(part_of(name, saved) for saved in self.saved)}

    def _layer_of(self, name: str) -> int | None:
        found = _LAYER.match(name)
        for pattern in self.patterns:
            if found := re.match(rf"(?:^|.*?\.){re.escape(pattern)}\.(?P<layer>\d+)\.", name):
                break
        return int(found["layer"]) if found else None


def part_of(name: str, module: str) -> bool:
    """Whether `module`, a name or its last parts, is the module `name` or one that it lies in."""
    return f".{module}." in f".{name}."


def by_module(values: Mapping[str, T], modules: Collection[str]) -> dict[str, T]:
    """The value of each module whose name ends as a key of `values`, a regular expression, says; the first key counts."""
    found: dict[str, T] = {}
    for pattern, value in values.items():
        for module in matching(pattern, modules, ends=True):
            found.setdefault(module, value)
    return found


def matching(pattern: str, names: Iterable[str], *, ends: bool = False) -> set[str]:
    """The names that a regular expression matches whole, or the last parts of (`ends`).

    Raises EngineError for one that is none or takes too long."""
    names, whole = sorted(names), rf"(.*\.)?({pattern})" if ends else pattern
    if _PLAIN.fullmatch(pattern):
        return {name for name in names if re.fullmatch(whole, name)}
    found, remedy = "", "list the modules by their names"
    try:
        re.compile(whole)
        done = subprocess.run(
            [sys.executable, "-I", "-c", _PROGRAM], input=json.dumps([whole, names]), capture_output=True, text=True,
            timeout=MOST_SECONDS, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            return set(json.loads(done.stdout))
        found = (done.stderr.strip().splitlines() or ["no answer"])[-1]
    except (re.error, OverflowError, RecursionError, subprocess.TimeoutExpired) as error:
        slow = isinstance(error, subprocess.TimeoutExpired)
        found = f"one that takes more than {MOST_SECONDS:g} seconds" if slow else str(error)
    expected = "one that matches names of modules"
    raise EngineError(STAGE, f"regular expression {pattern[:100]!r}", found=found, expected=expected, remedy=remedy)


def _ends(name: str, targets: Iterable[str]) -> bool:
    """Whether a name is one of these or ends with one as its last parts."""
    return any(name == target or name.endswith(f".{target}") for target in targets)
