"""Temporary files of a build: in a folder of its own, on a file system with room for them, and none of them stays.

Compilers and linkers put files where the environment's TMPDIR or Python's `tempfile` says, and some of them end the whole
process where there is no room.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from belle_compile.compiler.errors import CompileError

NEEDED_BYTES = 64 << 20  # of the object files of one engine's kernels, with room to spare


class TemporaryFiles:
    """Directs temporary files of this process and of those it starts to a folder of its own, and removes it at the end.

    The folder is below TMPDIR where the user set it, else at `beside`, which is near the output and must not exist.
    """

    def __init__(self, beside: Path) -> None:
        chosen = os.environ.get("TMPDIR")
        self.folder = Path(chosen) / f"belle-build-{os.getpid()}" if chosen else beside
        self._before = chosen, tempfile.tempdir
        self._made = False

    def open(self) -> None:
        """Make the folder; raises CompileError where it cannot be made, or where the space is too small."""
        parent = self.folder.parent
        try:
            free = shutil.disk_usage(parent).free
            if free < NEEDED_BYTES:
                found, expected = f"{free} bytes free", f"{NEEDED_BYTES} bytes needed"
                remedy = "free some space, or set TMPDIR to a folder with more"
                raise CompileError(
                    "output", f"not enough free space for temporary files ({parent})", found=found, expected=expected,
                    remedy=remedy,
                )  # fmt: skip
            shutil.rmtree(self.folder, ignore_errors=True)  # of a process with the same number that was killed
            self.folder.mkdir(mode=0o700)
        except OSError as error:
            what = f"temporary files cannot be written to {parent}"
            found, remedy = error.strerror or str(error), "set TMPDIR to a folder that can be written to"
            raise CompileError("output", what, found=found, remedy=remedy) from None
        self._made = True
        os.environ["TMPDIR"] = tempfile.tempdir = str(self.folder)

    def close(self) -> None:
        """Remove the folder with all files, and put temporary files where they were before."""
        if not self._made:
            return
        self._made = False
        chosen, tempfile.tempdir = self._before
        if chosen is None:
            os.environ.pop("TMPDIR", None)
        else:
            os.environ["TMPDIR"] = chosen
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> TemporaryFiles:
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
