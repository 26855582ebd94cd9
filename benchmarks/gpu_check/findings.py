"""What a check found, in a file from the moment it is known: what ends later checks takes nothing away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Findings:
    """Named values of one check, in the order in which they were found."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {}

    def note(self, **values: Any) -> None:
        """Add values, or replace them, and write all."""
        self.found |= values
        write(self.path, self.found)

    def note_under(self, name: str, value: Any) -> None:
        """The same for one value, whose name may have spaces."""
        self.note(**{name: value})


def write(path: Path, found: dict[str, Any]) -> None:
    """As JSON; whoever reads the file meanwhile has the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def read(path: Path) -> dict[str, Any]:
    """What was written; nothing where that is nothing yet."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found
