"""Pointers of Git LFS, which stand in place of files that were not downloaded."""

from __future__ import annotations

import re

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.places import CHECKPOINT_STAGE as STAGE
from belle_compile.compiler.stored_path import StoredPath
from belle_compile.compiler.untrusted import explained, require_regular

_FIRST_LINE = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024  # pointers are shorter (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md)


def refuse_pointer(file: StoredPath) -> None:
    """Raise CompileError if a clone without Git LFS left a pointer in place of this file, or if it is no regular file."""
    require_regular(STAGE, file)
    with explained(STAGE, f"file {file}", expected="a file that can be read", remedy="check its permissions"):
        with file.open("rb") as f:
            start = f.read(_POINTER_BYTES)
    if not start.startswith(_FIRST_LINE):
        return
    size = re.search(rb"^size (\d+)$", start, re.MULTILINE)
    raise CompileError(
        STAGE,
        f"file {file}",
        found="a Git LFS pointer",
        expected=f"the file itself, of {int(size[1])} bytes" if size else "the file itself",
        remedy=f"run `git lfs pull` in {file.parent}",
    )
