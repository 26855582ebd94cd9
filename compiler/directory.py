"""An output directory that appears whole or not at all, whatever happens to the process that makes it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from belle_compile.compiler.errors import CompileError

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_BEGUN: Counter[Path] = Counter()  # the directories that this process began for each output
_OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class AtomicDirectory:
    """A directory under construction: `with AtomicDirectory(out) as directory:` write below `directory.path`, then
    `directory.commit()`.

    The content grows in the sibling `.NAME.building-<pid>`, with a number behind it where this process has made `out` before;
    `commit` renames it to `out`. Leaving the block without `commit`, by an exception, Ctrl-C, SIGTERM or SIGHUP, removes it. A
    lock on the sibling `.NAME.lock` keeps a second build away from the same output. A build that holds the lock removes every
    `.NAME.building-*`, which only a killed build can have left.

    An existing `out` is refused, unless `replace` is set and `replaceable(out)` is true; it stays in place until `commit`. A
    link to a directory stands for that directory. `needed` is an estimate in bytes, checked against the free space before
    anything is written. Errors call the directory by its `kind`, name `marker` as the file by which an existing one is
    recognized, and `option` as what chooses it.
    """

    def __init__(
        self,
        out: Path,
        *,
        replace: bool = False,
        replaceable: Callable[[Path], bool] = lambda path: False,
        needed: int = 0,
        kind: str = "engine",
        marker: str = "manifest.json",
        option: str = "-o",
    ) -> None:
        self.out = Path(os.path.realpath(out) if os.path.islink(out) else os.path.abspath(out))
        # A path of its own for each: the loader takes a library at a path for the one that it has loaded from there before.
        again = f"-{number}" if (number := _BEGUN[self.out]) else ""
        self.path = self.out.parent / f".{self.out.name}.building-{os.getpid()}{again}"
        self._aside = self.out.parent / f".{self.out.name}.replaced"
        self._lock_path = self.out.parent / f".{self.out.name}.lock"
        self._replace, self._replaceable, self._needed = replace, replaceable, needed
        self._kind, self._marker, self._option = kind, marker, option
        self._lock: int | None = None
        self._handlers: dict[int, Any] = {}
        self._stopped_by: int | None = None
        self._closing = False
        self._made_parents: list[Path] = []

    def __enter__(self) -> AtomicDirectory:
        self._catch_signals()
        try:
            self.check_output()
            self._make_parents()
            self._take_lock()
            self._remove_leftovers()
            self.check_output()
            self.check_space(self._needed)
            _BEGUN[self.out] += 1
            self.path.mkdir(mode=0o755)
            self.path.chmod(0o755)  # the engine's permissions do not depend on the umask
        except BaseException as error:
            self._close()
            if isinstance(error, OSError):
                raise self.explain(error) from error
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()
        if error is None or isinstance(error, Exception):
            self._raise_if_stopped(error)

    def check_space(self, needed: int) -> None:
        """Raise CompileError where fewer than `needed` bytes are free for the output; later messages name the largest need."""
        self._needed = max(self._needed, needed)
        if shutil.disk_usage(self.out.parent).free < needed:
            raise self._disk_full("not enough free space")

    def explain(self, error: OSError) -> CompileError:
        """The CompileError for a write below `path` that failed with `error`."""
        if error.errno in _OUT_OF_SPACE:
            return self._disk_full(f"{error.strerror or 'out of space'} while writing")
        return CompileError(
            "output",
            f"cannot write {self.out}",
            found=f"{error.strerror or error}" + (f" at {error.filename}" if error.filename else ""),
            remedy=f"choose another {self._option} or change the permissions",
        )

    def commit(self) -> None:
        """Move the content to `out`, replacing an existing directory, synced so that it survives a power failure."""
        self._raise_if_stopped()
        self.check_output()
        try:
            for folder, _, _ in os.walk(self.path):
                _sync(Path(folder))
            if self.out.exists():
                self._exchange()  # self.path is the old engine from here on; _close removes it
            else:
                os.rename(self.path, self.out)
            parents, self._made_parents = self._made_parents, []
            for parent in {self.out.parent, *(made.parent for made in parents)}:
                _sync(parent)
        except OSError as error:
            raise self.explain(error) from error

    def check_output(self) -> None:
        """Raise CompileError where `out` exists and may not be replaced."""
        if not os.path.lexists(self.out):
            return
        if not self._replace:
            article = "an" if self._kind[0] in "aeiou" else "a"
            remedy = f"choose another {self._option} or pass --force to replace {article} {self._kind}"
            raise CompileError("output", f"{self.out} exists already", remedy=remedy)
        if not self._replaceable(self.out):
            raise CompileError(
                "output",
                f"--force replaces {self._kind} directories only and {self.out} is none",
                expected=f"a directory with the {self._marker} of one",
                remedy=f"choose another {self._option} or move it away yourself",
            )

    def _make_parents(self) -> None:
        missing = [folder for folder in self.out.parents if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._made_parents.append(folder)

    def _take_lock(self) -> None:
        while True:
            lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise CompileError(
                    "output",
                    f"another build is writing {self.out}",
                    found=f"{self._lock_path.name} locked",
                    remedy=f"wait for it to end or choose another {self._option}",
                ) from None
            except BaseException:
                os.close(lock)
                raise
            # The previous build may have removed the file between our open and our flock: our lock then excludes nobody.
            try:
                if os.path.samestat(os.fstat(lock), os.stat(self._lock_path)):
                    self._lock = lock
                    return
            except FileNotFoundError:
                pass
            os.close(lock)

    def _remove_leftovers(self) -> None:
        if self._aside.exists() and not self.out.exists():
            os.rename(self._aside, self.out)  # a build was killed between the renames of _exchange
        building = re.compile(re.escape(f".{self.out.name}.building-") + r"\d+(-\d+)?")
        for folder in self.out.parent.iterdir():
            if folder == self._aside or building.fullmatch(folder.name):
                _remove(folder)

    def _exchange(self) -> None:
        """Swap `path` and `out` in one step, or in three renames where the file system cannot do that (NFS)."""
        renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        names = _AT_FDCWD, os.fsencode(self.path), _AT_FDCWD, os.fsencode(self.out), _RENAME_EXCHANGE
        if renameat2 is None or renameat2(*names) != 0:
            os.rename(self.out, self._aside)
            os.rename(self.path, self.out)
            os.rename(self._aside, self.path)

    def _close(self) -> None:
        """Clean up. A signal that comes meanwhile is noted, and raised afterwards.

        Masking signals in this thread would not be enough: they are delivered to threads of libraries then, and Python runs
        the handler on this one nevertheless.
        """
        self._closing = True
        try:
            if self._lock is not None:
                _remove(self.path)
                if self._aside.exists() and not self.out.exists():
                    os.rename(self._aside, self.out)
                self._lock_path.unlink(missing_ok=True)
                os.close(self._lock)
                self._lock = None
            for folder in reversed(self._made_parents):
                try:
                    folder.rmdir()
                except OSError:  # another process has put files there since
                    break
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._handlers.clear()
        finally:
            self._closing = False

    def _catch_signals(self) -> None:
        """Turn SIGINT, SIGTERM and SIGHUP into exceptions, which clean up, unless the program has handlers of its own."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                self._handlers[number] = signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped_by = number
        if not self._closing:
            self._raise_if_stopped()

    def _raise_if_stopped(self, error: Exception | None = None) -> None:
        """Raise the exception of a signal again: native code that it passes through may swallow it or replace it, as TVM
        does."""
        if self._stopped_by == signal.SIGINT:
            raise KeyboardInterrupt from error
        if self._stopped_by is not None:
            raise SystemExit(128 + self._stopped_by) from error

    def _disk_full(self, what: str) -> CompileError:
        return CompileError(
            "output",
            f"{what} ({self.out})",
            found=f"{shutil.disk_usage(self.out.parent).free} bytes free",
            expected=f"{self._needed} bytes needed" if self._needed else "",
            remedy=f"free some space or choose another {self._option}",
        )


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
