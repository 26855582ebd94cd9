"""Engine directories as outputs: what is one, and whether a new one may be written somewhere."""

from __future__ import annotations

from pathlib import Path

from belle_compile.compiler.directory import AtomicDirectory
from belle_compile.runtime.artifact import MANIFEST_NAME
from belle_compile.runtime.schema import parse_json


def is_engine(path: Path) -> bool:
    """Whether `path` is a directory with the manifest of an engine, of this or of another format.

    Other programs have files of that name too.
    """
    try:
        plain = parse_json((path / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    known = {"format_version": int, "digest": str, "model": dict, "target": dict, "files": dict}
    return isinstance(plain, dict) and all(type(plain.get(name)) is kind for name, kind in known.items())


def output_directory(output: str | Path, *, force: bool = False, needed: int = 0) -> AtomicDirectory:
    """The directory under construction for an engine at `output`; with `force`, an engine there is replaced."""
    return AtomicDirectory(Path(output), replace=force, replaceable=is_engine, needed=needed)


def check_output(output: str | Path, *, force: bool = False) -> None:
    """Raise CompileError where no engine may be written to `output`."""
    output_directory(output, force=force).check_output()
