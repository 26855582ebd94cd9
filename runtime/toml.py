"""Reads files of options and of keys."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from belle_compile.runtime.errors import EngineError


def read_table(path: Path, stage: str) -> dict[str, Any]:
    """Return the content of a TOML file, or of a JSON file where its name ends in .json; raises `EngineError` of `stage`."""
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        text = path.read_text(encoding="utf-8")
        table = json.loads(text) if path.suffix == ".json" else toml.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError(stage, f"cannot read {path}", found=str(error).partition("\n")[0].rstrip(".")) from None
    if not isinstance(table, dict):
        raise EngineError(stage, f"the content of {path}", found=type(table).__name__, expected="a table")
    return table
