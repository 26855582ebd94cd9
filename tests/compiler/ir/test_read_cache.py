"""The read cache: its bound, what it holds and how long, and threads."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from belle_compile.compiler.ir.read_cache import Arrays, Kind, ReadCache


def of_bytes(count: int, log: list[int] | None = None) -> Callable[[], Arrays]:
    def compute() -> Arrays:
        if log is not None:
            log.append(count)
        return (np.zeros(count, np.uint8),)

    return compute


def test_nothing_is_held_outside_of_keeping_but_the_latest_result() -> None:
    cache, log = ReadCache(1000), []
    for kind in (Kind.TENSOR, Kind.WHOLE):
        (array,) = cache.read(kind, "a", of_bytes(10, log))
        cache.read(kind, "a", of_bytes(10, log))
        assert array.flags.writeable and cache.held == 0
    assert log == [10] * 4
    cache.read(Kind.RESULT, "a", of_bytes(300, log))
    (array,) = cache.read(Kind.RESULT, "a", of_bytes(300, log))
    assert log[4:] == [300] and cache.held == 300 and not array.flags.writeable
    cache.read(Kind.RESULT, "b", of_bytes(200, log))
    assert cache.held == 200


def test_an_old_result_goes_before_the_new_one_is_computed() -> None:
    cache = ReadCache(1000)
    cache.read(Kind.RESULT, "a", of_bytes(300))

    def compute() -> Arrays:
        assert cache.held == 0
        return of_bytes(200)()

    cache.read(Kind.RESULT, "b", compute)
    assert cache.held == 200


def test_blocks_end_and_nest() -> None:
    cache = ReadCache(1000)
    with cache.keeping(Kind.TENSOR, 100), cache.keeping(Kind.WHOLE):
        cache.read(Kind.TENSOR, "a", of_bytes(60))
        cache.read(Kind.WHOLE, "w", of_bytes(500))
        with cache.keeping(Kind.TENSOR, 50):
            cache.read(Kind.TENSOR, "b", of_bytes(40))
            cache.read(Kind.TENSOR, "c", of_bytes(40))
            assert cache.held == 600  # c in the place of b
        assert cache.held == 560
        cache.read(Kind.TENSOR, "large", of_bytes(101))
        assert cache.held == 560
    assert cache.held == 0


def test_the_bound_holds_across_kinds() -> None:
    cache = ReadCache(100)
    with cache.keeping(Kind.TENSOR), cache.keeping(Kind.WHOLE):
        cache.read(Kind.TENSOR, "a", of_bytes(60))
        cache.read(Kind.WHOLE, "b", of_bytes(50))
        assert cache.held == 50
        cache.read(Kind.RESULT, "c", of_bytes(101))
        assert cache.held == 50


def test_a_result_that_fails_is_computed_again() -> None:
    cache = ReadCache(100)

    def fail() -> Arrays:
        raise ValueError("once")

    with pytest.raises(ValueError, match="once"):
        cache.read(Kind.RESULT, "a", fail)
    assert cache.read(Kind.RESULT, "a", of_bytes(3))[0].size == 3


def values(key: int) -> Arrays:
    """100 to 1000 bytes that tell keys apart, and that depend on a smaller key's."""
    return (np.random.default_rng(key).integers(0, 255, 100 * (1 + key % 10), np.uint8),)


def test_many_threads_read_the_same_bytes_within_the_bound() -> None:
    cache, most = ReadCache(5000), []

    def nested(key: int) -> Arrays:
        (array,) = values(key)
        if key >= 10:
            array = array + cache.read(Kind.TENSOR, key // 2, lambda: nested(key // 2))[0][:1]
        return (array,)

    expected = {}
    for key in range(40):
        expected[key] = nested(key)[0]
    barrier = threading.Barrier(8)

    def work(seed: int) -> None:
        barrier.wait()
        for key in np.random.default_rng(seed).integers(0, 40, 400).tolist():
            kind = (Kind.TENSOR, Kind.WHOLE, Kind.RESULT)[key % 3]
            (array,) = cache.read(kind, key, lambda key=key: nested(key))
            np.testing.assert_array_equal(array, expected[key])
            most.append(cache.held)

    with cache.keeping(Kind.TENSOR, 3000), cache.keeping(Kind.WHOLE, 3000), ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, seed) for seed in range(8)]:
            future.result()
    assert 2000 < max(most) <= 5000
    cache.read(Kind.RESULT, "last", of_bytes(7))
    assert cache.held == 7


def test_threads_that_want_the_same_value_compute_it_once() -> None:
    cache, computed, start = ReadCache(1 << 20), Counter[str](), threading.Barrier(4)

    def compute() -> Arrays:
        computed["a"] += 1
        threading.Event().wait(0.05)
        return (np.ones(10),)

    def work() -> Arrays:
        start.wait()
        return cache.read(Kind.RESULT, "a", compute)

    with ThreadPoolExecutor(4) as pool:
        results = [future.result() for future in [pool.submit(work) for _ in range(4)]]
    assert computed["a"] == 1 and all(result[0] is results[0][0] for result in results)


def test_a_block_left_while_a_value_is_computed_holds_nothing() -> None:
    cache, computing, go_on = ReadCache(1000), threading.Event(), threading.Event()

    def compute() -> Arrays:
        computing.set()
        assert go_on.wait(5)
        return of_bytes(10)()

    with ThreadPoolExecutor(1) as pool:
        with cache.keeping(Kind.TENSOR):
            read = pool.submit(cache.read, Kind.TENSOR, "a", compute)
            assert computing.wait(5)
        go_on.set()
        assert read.result()[0].size == 10
    assert cache.held == 0
