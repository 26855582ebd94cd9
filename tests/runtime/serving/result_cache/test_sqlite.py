"""The store in a file: processes share it, it survives them, and damage costs entries only."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.result_cache.sqlite import SqliteStore

ROOT = Path(__file__).parents[4]
WRITER = """
import sqlite3, sys
from pathlib import Path
from belle_compile.runtime.serving.result_cache.sqlite import SqliteStore
store, first, count = SqliteStore(Path(sys.argv[1]), 1 << 24), int(sys.argv[2]), int(sys.argv[3])
number, failures = first, 0
while count < 0 or number < first + count:
    try:
        store.put(f"key {number}", b"%d" % number * 50)
    except sqlite3.OperationalError as error:  # on a busy machine, the other writer may keep this one waiting for too long
        failures += 1
        if "locked" not in str(error) or failures > 50:
            raise
        continue
    print(number, flush=True)
    number += 1
"""


def writer(path: Path, first: int, count: int) -> subprocess.Popen[str]:
    """A process that writes `count` entries from number `first` on, or without an end, and prints each one it has written."""
    command = [sys.executable, "-c", WRITER, str(path), str(first), str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_processes_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    processes = [writer(path, first, 60) for first in (0, 1000)]  # both may make the file
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    store = SqliteStore(path, 1 << 24)
    for number in (*range(60), *range(1000, 1060)):
        assert store.get(f"key {number}") == b"%d" % number * 50
    store.close()


def test_a_killed_writer_loses_nothing_that_was_stored(tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    for _ in range(3):
        process = writer(path, 0, -1)
        assert process.stdout is not None
        written = [int(process.stdout.readline()) for _ in range(30)]
        os.kill(process.pid, signal.SIGKILL)
        written += map(int, process.stdout.read().split("\n")[:-1])
        process.wait()
        process.stdout.close()
        store = SqliteStore(path, 1 << 24)
        assert [store.get(f"key {number}") for number in written] == [b"%d" % number * 50 for number in written]
        store.put("after", b"it")
        store.close()
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize("damage", ["no header", "cut", "overwritten"])
def test_a_damaged_file_is_set_aside(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cache.db"
    store = SqliteStore(path, 1 << 24)
    for number in range(200):
        store.put(f"key {number}", b"x" * 500)
    store.close()
    data = path.read_bytes()
    if damage == "no header":
        path.write_bytes(b"not a database at all".ljust(100) + data[100:])
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(data[:4096] + b"\xa5" * (len(data) - 4096))
    with caplog.at_level(logging.WARNING):
        store = SqliteStore(path, 1 << 24)
        for number in range(200):  # what is whole may be read, and the damage is met by then
            assert store.get(f"key {number}") in (None, b"x" * 500)
            store.put(f"key {number}", b"y" * 500)
    (aside,) = [name for name in tmp_path.glob("cache.db.damaged-*") if name.suffix not in ("-wal", "-shm")]
    assert aside.is_file()
    (record,) = caplog.records
    assert "is damaged" in record.getMessage() and str(aside) in record.getMessage()
    assert [store.get(f"key {number}") for number in range(150, 200)] == [b"y" * 500] * 50
    assert store.counters.stats(0).damaged == 1
    store.close()


def test_a_file_that_is_damaged_while_it_is_used_is_set_aside_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cache.db"
    stores = [SqliteStore(path, 1 << 24) for _ in range(2)]
    for number in range(200):
        stores[0].put(f"key {number}", b"x" * 500)
    for store in stores:
        store.close()
    stores = [SqliteStore(path, 1 << 24) for _ in range(2)]
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))
    failed: list[BaseException] = []

    def use(store: SqliteStore) -> None:
        try:
            for number in range(100):
                store.put(f"key {number}", b"y")
                assert store.get(f"key {number}") == b"y"
        except BaseException as error:
            failed.append(error)

    with caplog.at_level(logging.WARNING):
        threads = [threading.Thread(target=use, args=(store,)) for store in stores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed, failed
    assert len(caplog.records) == 1 and stores[0].get("key 7") == stores[1].get("key 7") == b"y"
    for store in stores:
        store.close()


def test_the_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE people (name TEXT)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(EngineError, match=r"result cache: .*other\.db is no result cache of this version; give another path"):
        SqliteStore(path, 1 << 20)
    assert path.read_bytes() == before and [path] == list(tmp_path.iterdir())


def test_a_file_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"result cache: file .*: found .*No such file or directory.*; give a path"):
        SqliteStore(tmp_path / "none" / "cache.db", 1 << 20)


def test_a_locked_file_fails_calls_and_is_not_set_aside(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "cache.db", 1 << 20)
    store.put("k", b"v")
    other = sqlite3.connect(tmp_path / "cache.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert store.get("k") == b"v", "readers do not wait for a writer"
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        store.put("k", b"w")
    other.execute("ROLLBACK")
    other.close()
    store.put("k", b"w")
    assert (tmp_path / "cache.db").stat().st_mode & 0o777 == 0o600
    assert store.get("k") == b"w" and not list(tmp_path.glob("*damaged*"))
    store.close()
