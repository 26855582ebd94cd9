"""Reads typed values of JSON objects that others wrote, with errors that name the key."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from belle_compile.runtime.errors import BelleError

MOST_INTEGER = (1 << 31) - 1  # of sizes, which kernels count in 32 bits


def short(value: object) -> str:
    """A value as Python shows it, cut to 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


@dataclass(frozen=True)
class JsonReader:
    """Reads typed values of a JSON object, which `where` names in errors. A key that is null counts as missing.

    A value may have several names; two that are present with different values are refused. A subclass says of which `stage`
    errors are, and of which class (`failure`).
    """

    stage: ClassVar[str]
    failure: ClassVar[type[BelleError]]
    values: Mapping[str, Any]
    where: str = "config.json"

    def get(self, *names: str) -> Any:
        """The value under any of the names; None if none of them is present."""
        present = {name: self.values[name] for name in names if self.values.get(name) is not None}
        first = next(iter(present.values()), None)
        if any(value != first for value in present.values()):
            contradiction = ", ".join(f"{name} {short(value)}" for name, value in present.items())
            raise self.error(names[0], contradiction, "one value", "remove the wrong key")
        return first

    def integer(self, *names: str, default: int | None = None, least: int = 1, most: int = MOST_INTEGER) -> int:
        """The whole number under any of the names; raises the error if it is missing without a default, below `least` or above
        `most`."""
        value = self._or_default(names, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            large = isinstance(value, int) and value > most
            expected = f"a whole number <= {most}" if large else f"a whole number >= {least}"
            raise self.error(names[0], short(value), expected)
        return value

    def number(self, *names: str, default: float | None = None, above: float = 0.0) -> float:
        """The number under any of the names; raises the error if it is missing without a default or not above `above`."""
        value = self._or_default(names, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value <= sys.float_info.max:
            raise self.error(names[0], short(value), f"a number > {above:g}")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        value = self._or_default((name,), default)
        if not isinstance(value, bool):
            raise self.error(name, short(value), "true or false")
        return value

    def error(self, name: str, found: str, expected: str, remedy: str = "") -> BelleError:
        """The error about one key; the caller raises it."""
        return self.failure(self.stage, f"key {name} of {self.where}", found=found, expected=expected, remedy=remedy)

    def _or_default(self, names: tuple[str, ...], default: float | None) -> Any:
        value = self.get(*names)
        if value is None and default is None:
            raise self.error(names[0], "nothing", "a value", f"{self.where} is incomplete: download it again")
        return default if value is None else value
