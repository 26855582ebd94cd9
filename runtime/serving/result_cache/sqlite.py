"""A store of the result cache in one SQLite file, which several processes of a host share and which outlives them."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.result_cache.store import Counters

T = TypeVar("T")

APPLICATION_ID = 0x62656C52  # "belR", in the header of the file
SCHEMA_VERSION = 1
ROW_OVERHEAD = 200  # bytes of a row and its places in the indexes, beside key and value
_BUSY_S = 1.0  # how long a call waits for another process that writes
_MOST_TOUCHED = 256  # uses that are remembered before they are written

_SCHEMA = f"""
CREATE TABLE entries (
  key TEXT PRIMARY KEY, value BLOB NOT NULL, size INTEGER NOT NULL, stored REAL NOT NULL, used INTEGER NOT NULL
);
CREATE INDEX entries_used ON entries (used);
CREATE INDEX entries_stored ON entries (stored);
CREATE TABLE total (bytes INTEGER NOT NULL);
INSERT INTO total VALUES (0);
CREATE TRIGGER entry_added AFTER INSERT ON entries BEGIN UPDATE total SET bytes = bytes + new.size; END;
CREATE TRIGGER entry_removed AFTER DELETE ON entries BEGIN UPDATE total SET bytes = bytes - old.size; END;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""
_TABLES = "SELECT count(*) FROM sqlite_master"
_NEXT_USE = "(SELECT coalesce(max(used), 0) + 1 FROM entries)"

_log = logging.getLogger(__name__)


class SqliteStore:
    """At most `max_bytes` of entries, the least recently used evicted first, each for at most `ttl_s` seconds (None: for good).

    The journal is a write-ahead log: readers never wait for a writer, and a process may be killed at any moment. A file that is
    damaged is renamed, which is logged once, and a new one takes its place. A value is read on one connection and written on
    another, each under a lock of its own, so that reading does not wait for writing.
    """

    waits = True

    def __init__(self, path: Path, max_bytes: int, ttl_s: float | None = None, clock: Callable[[], float] = time.time) -> None:
        """Open or make the file; raises `EngineError` where it can be neither, or holds something else. `clock` returns seconds
        since 1970: processes that share the file share the clock."""
        self.counters = Counters()
        self._path, self._max_bytes, self._ttl_s, self._clock = path, max_bytes, ttl_s, clock
        # Who needs both takes the one for writing first.
        self._read_lock, self._write_lock, self._touched_lock = threading.Lock(), threading.Lock(), threading.Lock()
        self._touched: dict[str, None] = {}  # keys in the order of their last use
        try:
            self._open()
        except (OSError, sqlite3.OperationalError) as error:
            remedy = "give a path in a directory that this user can write to"
            raise EngineError("result cache", f"file {path}", found=str(error), remedy=remedy) from None

    def get(self, key: str) -> bytes | None:
        """Return a value. That it was used is written with one of the next values."""
        row = self._read("SELECT value, stored FROM entries WHERE key = ?", key)
        if row is None or (self._ttl_s is not None and self._clock() - row[1] >= self._ttl_s):
            return None  # what has expired is removed, and counted, by the next `put`
        with self._touched_lock:
            self._touched.pop(key, None)
            self._touched[key] = None
            if len(self._touched) > _MOST_TOUCHED:
                self._touched.pop(next(iter(self._touched)))
        value: bytes = row[0]
        return value

    def put(self, key: str, value: bytes) -> None:
        """Set a value. One that is larger than the whole store is not kept."""
        size = len(key) + len(value) + ROW_OVERHEAD
        if size > self._max_bytes:
            return
        evicted, expired = self._write(lambda: self._put(key, value, size))
        self.counters.add("evictions", evicted)
        self.counters.add("expirations", expired)

    def delete(self, key: str) -> None:
        """Remove a key, if it is there."""
        self._write(lambda: self._writer.execute("DELETE FROM entries WHERE key = ?", (key,)))

    def stored_bytes(self) -> int:
        """Bytes of keys, values and rows of all processes that share the file."""
        (total,) = self._read("SELECT bytes FROM total") or (0,)
        return int(total)

    def close(self) -> None:
        """Write what was used last, and close the file."""
        with contextlib.suppress(sqlite3.Error):
            self._write(self._write_touched)
        self._close_connections()

    def _put(self, key: str, value: bytes, size: int) -> tuple[int, int]:
        """Write a value and make room for it; returns the numbers of entries evicted and expired."""
        run, now = self._writer.execute, self._clock()
        self._write_touched()
        expired = 0
        if self._ttl_s is not None:
            expired = run("DELETE FROM entries WHERE stored <= ?", (now - self._ttl_s,)).rowcount
        run("DELETE FROM entries WHERE key = ?", (key,))
        run(f"INSERT INTO entries VALUES (?, ?, ?, ?, {_NEXT_USE})", (key, value, size, now))
        evicted = 0
        while run("SELECT bytes FROM total").fetchone()[0] > self._max_bytes:
            run("DELETE FROM entries WHERE key = (SELECT key FROM entries ORDER BY used LIMIT 1)")
            evicted += 1
        return evicted, expired

    def _write_touched(self) -> None:
        with self._touched_lock:
            touched, self._touched = self._touched, {}
        self._writer.executemany(f"UPDATE entries SET used = {_NEXT_USE} WHERE key = ?", [(key,) for key in touched])

    def _read(self, query: str, *values: str) -> tuple[Any, ...] | None:
        """Return the first row of a query."""

        def read() -> tuple[Any, ...] | None:
            with self._read_lock:
                row: tuple[Any, ...] | None = self._reader.execute(query, values).fetchone()
                return row

        return self._guarded(read)

    def _write(self, change: Callable[[], T]) -> T:
        """Run `change` as one transaction."""

        def write() -> T:
            with self._write_lock, self._writer:  # commits, or rolls back
                self._writer.execute("BEGIN IMMEDIATE")
                return change()

        return self._guarded(write)

    def _guarded(self, use: Callable[[], T]) -> T:
        """Run `use`, and once more on a new file if this one is damaged."""
        inode = self._inode
        try:
            return use()
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            self._replace(inode, error)
            return use()

    def _open(self) -> None:
        """Open both connections, of a new file if the present one is damaged."""
        try:
            self._connect()
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            self._replace(self._inode, error)

    def _connect(self) -> None:
        self._writer = self._connection()
        self._inode = os.stat(self._path).st_ino
        run = self._writer.execute
        version, application = (run(f"PRAGMA {name}").fetchone()[0] for name in ("user_version", "application_id"))
        if run(_TABLES).fetchone()[0] and (version, application) != (SCHEMA_VERSION, APPLICATION_ID):
            self._writer.close()
            what = f"{self._path} is no result cache of this version"
            raise EngineError("result cache", what, remedy="give another path, or remove the file")
        _patiently(lambda: run("PRAGMA journal_mode = WAL"))
        run("PRAGMA synchronous = NORMAL")
        with self._writer:
            run("BEGIN IMMEDIATE")
            if not run(_TABLES).fetchone()[0]:  # no other process was faster
                for statement in _statements(_SCHEMA):
                    run(statement)
        self._reader = self._connection()
        self._reader.execute("SELECT bytes FROM total").fetchone()

    def _connection(self) -> sqlite3.Connection:
        with contextlib.suppress(FileExistsError):  # others on this host need not read answers
            os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        return sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)

    def _close_connections(self) -> None:
        for name in ("_reader", "_writer"):
            with contextlib.suppress(AttributeError, sqlite3.Error):
                getattr(self, name).close()

    def _replace(self, inode: int, error: sqlite3.DatabaseError) -> None:
        """Rename the damaged file, unless another thread or process has done so, and open a new one."""
        with self._write_lock, self._read_lock:
            if self._inode != inode:
                return
            self._close_connections()
            aside = _set_aside(self._path, inode)
            if aside:
                _log.warning("The result cache %s is damaged (%s). It is kept as %s, and a new one begins.",
                             self._path, error, aside)  # fmt: skip
            self.counters.add("damaged")
            self._connect()


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Whether an error says that the file is damaged, and not that it is locked, full or read-only."""
    return type(error) is sqlite3.DatabaseError or "no such table" in str(error)


def _set_aside(path: Path, inode: int) -> Path | None:
    """Rename a file and its journal; returns the new name, or None if another process has done so already.

    Processes that find the damage at the same time take turns by a lock of the directory. The file itself must not be opened
    for that: closing it would release the locks that SQLite has on it in this process.
    """
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        if not path.exists() or os.stat(path).st_ino != inode:
            return None
        aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        for suffix in ("-wal", "-shm", ""):
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{path}{suffix}", f"{aside}{suffix}")
        return aside
    finally:
        os.close(directory)


def _statements(script: str) -> list[str]:
    """The statements of a script, with the one that a trigger holds."""
    statements, statement = [], ""
    for line in script.splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            statements.append(statement)
            statement = ""
    return statements


def _patiently(run: Callable[[], object]) -> None:
    """Run what SQLite does not wait for by itself: a change of the journal while another process has the file open."""
    deadline = time.monotonic() + 5 * _BUSY_S
    while True:
        try:
            run()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
