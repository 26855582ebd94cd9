"""Reading the JSON files of a checkpoint."""

from __future__ import annotations

from typing import Any

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.lfs import refuse_pointer
from belle_compile.compiler.places import CHECKPOINT_STAGE as STAGE
from belle_compile.compiler.stored_path import StoredPath
from belle_compile.compiler.untrusted import parse_bounded, read_bounded

MOST_BYTES = 64 << 20  # of a file; the largest tokenizer.json of a public language model has half of that


def read_json(file: StoredPath) -> dict[str, Any]:
    """The JSON object in a file; raises CompileError if the file is too large, cannot be read or holds anything else."""
    refuse_pointer(file)
    text = read_bounded(STAGE, file, MOST_BYTES)
    try:
        value = parse_bounded(text)
    except UnicodeDecodeError as e:
        raise _no_object(file, f"text that is not UTF-8 at byte {e.start}") from e
    except ValueError as e:
        raise _no_object(file, f"text that is not JSON ({e})") from e
    if not isinstance(value, dict):
        raise _no_object(file, f"a JSON {type(value).__name__}")
    return value


def _no_object(file: StoredPath, found: str) -> CompileError:
    return CompileError(STAGE, f"file {file}", found=found, expected="a JSON object", remedy="download the file again")
