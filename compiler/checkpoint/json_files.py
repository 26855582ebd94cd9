"""Reading the JSON files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from belle_compile.compiler.checkpoint.lfs import refuse_pointer
from belle_compile.compiler.checkpoint.tensors import STAGE
from belle_compile.compiler.errors import CompileError


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; raises CompileError if the file cannot be read or holds anything else."""
    try:
        refuse_pointer(file)
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise _no_object(file, f"text that is not JSON ({e})" if isinstance(e, ValueError) else str(e)) from e
    if not isinstance(value, dict):
        raise _no_object(file, f"a JSON {type(value).__name__}")
    return value


def _no_object(file: Path, found: str) -> CompileError:
    return CompileError(STAGE, f"file {file}", found=found, expected="a JSON object", remedy="download the file again")
