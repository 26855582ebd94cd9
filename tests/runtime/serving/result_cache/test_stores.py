"""Stores in memory and in SQLite: least recently used entries go first, bytes and ages are bounded."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from belle_compile.runtime.serving.result_cache.memory import ENTRY_OVERHEAD, MemoryStore
from belle_compile.runtime.serving.result_cache.sqlite import ROW_OVERHEAD, SqliteStore
from belle_compile.runtime.serving.result_cache.store import Store

Make = Callable[..., Store]
VALUE = b"v" * 100


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["memory", "sqlite"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    opened: list[Store] = []

    def open_store(max_bytes: int = 1 << 20, ttl_s: float | None = None, clock: Clock | None = None) -> Store:
        clock = clock or Clock()
        if request.param == "memory":
            opened.append(MemoryStore(max_bytes, ttl_s, clock))
        else:
            opened.append(SqliteStore(tmp_path / f"{len(opened)}.db", max_bytes, ttl_s, clock))
        return opened[-1]

    yield open_store
    for store in opened:
        store.close()


def entry_bytes(store: Store, key: str) -> int:
    """Bytes that an entry with VALUE counts for."""
    return len(key) + len(VALUE) + (ENTRY_OVERHEAD if isinstance(store, MemoryStore) else ROW_OVERHEAD)


def key_of(number: int) -> str:
    return f"{number:064x}"


def test_values_are_kept_replaced_and_removed(make: Make) -> None:
    store = make()
    assert store.get("k") is None
    store.put("k", b"\0one")
    store.put("k", b"two")
    assert store.get("k") == b"two"
    store.delete("k")
    store.delete("k")
    assert store.get("k") is None and store.stored_bytes() == 0


@pytest.mark.parametrize("capacity", [1, 20, 100])
def test_hits_of_a_zipf_trace_are_those_of_an_ideal_lru(make: Make, capacity: int) -> None:
    probe = make()
    store = make(max_bytes=capacity * entry_bytes(probe, key_of(0)))
    ideal: OrderedDict[str, None] = OrderedDict()
    hits = evictions = 0
    for number in np.minimum(np.random.default_rng(3).zipf(1.3, 1500), 400).tolist():
        key = key_of(number)
        assert (store.get(key) is not None) == (key in ideal)
        if key in ideal:
            ideal.move_to_end(key)
            hits += 1
            continue
        store.put(key, VALUE)
        ideal[key] = None
        if len(ideal) > capacity:
            ideal.popitem(last=False)
            evictions += 1
    assert hits > 100 and store.counters.stats(0).evictions == evictions


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 900)), max_size=60))
def test_bytes_are_bounded_and_counted(operations: list[tuple[int, int]]) -> None:
    store = MemoryStore(4000)
    for number, size in operations:
        store.put(key_of(number), b"x" * size)
        assert store.stored_bytes() <= 4000
    expected = [store.get(key_of(number)) for number in range(10)]
    assert store.stored_bytes() == sum(64 + len(value) + ENTRY_OVERHEAD for value in expected if value is not None)


def test_bytes_of_a_file_are_bounded(tmp_path: Path) -> None:
    limit = 400_000
    store = SqliteStore(tmp_path / "cache.db", limit)
    random = np.random.default_rng(5)
    for number in range(600):
        store.put(key_of(number), random.bytes(int(random.integers(1, 9000))))
        assert store.stored_bytes() <= limit
    store.close()
    assert (tmp_path / "cache.db").stat().st_size < 1.5 * limit


def test_what_is_larger_than_the_store_is_not_kept(make: Make) -> None:
    store = make(max_bytes=500)
    store.put("small", b"x")
    store.put("large", b"x" * 500)
    assert store.get("large") is None and store.get("small") == b"x"


def test_entries_expire(make: Make) -> None:
    clock = Clock()
    store = make(ttl_s=10, clock=clock)
    store.put("a", VALUE)
    clock.now += 9
    assert store.get("a") == VALUE
    store.put("b", VALUE)
    clock.now += 1
    assert store.get("a") is None and store.get("b") == VALUE
    store.put("c", VALUE)
    assert store.counters.stats(0).expirations == 1 and store.stored_bytes() == 2 * entry_bytes(store, "b")
    store.put("b", b"new")
    clock.now += 9
    assert store.get("b") == b"new", "its time begins anew"


def test_threads_share_a_store(make: Make) -> None:
    store, wrong = make(max_bytes=5000), []

    def use(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, 30, 150).tolist():
            store.put(key_of(number), str(number).encode())
            if store.get(key_of(number)) not in (None, str(number).encode()):
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and 0 < store.stored_bytes() <= 5000
