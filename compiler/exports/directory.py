"""Directories of exports as outputs: the record by which one is recognized, and whether a new one may be written somewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from belle_compile.compiler.directory import AtomicDirectory
from belle_compile.runtime.schema import canonical_json, parse_json

STAGE = "export"  # of errors
RECORD_NAME = "export.json"
FORMAT_VERSION = 1
_KNOWN = {"export_version": int, "format": str, "model": dict, "quantization": dict, "files": dict}
_BLOCK = 1 << 20


def is_export(path: Path) -> bool:
    """Whether `path` is a directory with the record of an export. Other programs have files of that name too."""
    try:
        plain = parse_json((path / RECORD_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(plain, dict) and all(type(plain.get(name)) is kind for name, kind in _KNOWN.items())


def output_directory(output: str | Path, *, force: bool = False) -> AtomicDirectory:
    """The directory under construction for an export at `output`; with `force`, an export there is replaced."""
    return AtomicDirectory(Path(output), replace=force, replaceable=is_export, kind="export", marker=RECORD_NAME)


def write_record(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Write the record of a complete directory, with the digest and size of each of its files; returns the whole record."""
    files = {
        path.name: {"sha256": _digest(path), "bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    complete = {"export_version": FORMAT_VERSION, **record, "files": files}
    (folder / RECORD_NAME).write_text(canonical_json(complete), encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)
    return complete


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
