"""The size of the KV cache: what users may write, and what fits."""

from __future__ import annotations

from typing import Any

import pytest

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.kv_memory import KvMemory


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (4096, KvMemory(size=4096)), ("4096", KvMemory(size=4096)), ("4GiB", KvMemory(size=4 << 30)),
        ("500MB", KvMemory(size=500_000_000)), (" 1.5 gib ", KvMemory(size=3 << 29)), ("0.1KB", KvMemory(size=100)),
        ("2tib", KvMemory(size=2 << 40)), ("64 B", KvMemory(size=64)),
        (0.5, KvMemory(share=0.5)), (1.0, KvMemory(share=1.0)), ("50%", KvMemory(share=0.5)), ("0.25", KvMemory(share=0.25)),
        ("100 %", KvMemory(share=1.0)), (".5", KvMemory(share=0.5)), (None, KvMemory()),
    ],
)  # fmt: skip
def test_bytes_and_shares(value: Any, expected: KvMemory) -> None:
    assert KvMemory.parse(None, value) == expected


@pytest.mark.parametrize(
    "value",
    [0, -1, 0.0, -0.5, 1.5, float("nan"), float("inf"), True, "", "0", "0%", "101%", "1.5", "4G", "GiB", "-4GiB", "4 4GiB",
     "1e9", "4GiB%", "half", "\u0664GiB", b"4GiB", [1], "9" * 5000, -(10**5000)],
    ids=lambda value: str(type(value).__name__),
)  # fmt: skip
def test_nonsense_is_refused(value: Any) -> None:
    with pytest.raises(EngineError, match=r'kv_cache_memory: found .*, expected bytes such as 4294967296, "4GiB" or'):
        KvMemory.parse(None, value)


@pytest.mark.parametrize("tokens", [0, -16, True, 1.5, "64"])
def test_tokens_are_counted(tokens: Any) -> None:
    with pytest.raises(EngineError, match=r"kv_tokens: found .*, expected a whole number of tokens, 1 or more"):
        KvMemory.parse(tokens)


def test_one_of_two_ways() -> None:
    assert KvMemory.parse(99) == KvMemory(tokens=99)
    with pytest.raises(EngineError, match="the KV cache: found kv_tokens and kv_cache_memory, expected one of them"):
        KvMemory.parse(64, "50%")


@pytest.mark.parametrize(
    ("asked", "blocks"),
    [(KvMemory(), None), (KvMemory(33), 3), (KvMemory(size=1023), 1), (KvMemory(size=4096), 8), (KvMemory(share=0.5), 4),
     (KvMemory(share=1.0), 8), (KvMemory(128), 8)],
)  # fmt: skip
def test_blocks(asked: KvMemory, blocks: int | None) -> None:
    assert asked.blocks("cpu", 4100, "the weights", 512) == blocks


@pytest.mark.parametrize(
    ("asked", "free", "message"),
    [
        (KvMemory(129), 4100, "cpu: kv_tokens: found 129 tokens, 4608 bytes, expected 512 bytes for 16 tokens, up to the 4100 "
                              "bytes that are free beside the weights; ask for another size, or load on a larger host"),
        (KvMemory(size=511), 4100, "kv_cache_memory: found 511 bytes"),
        (KvMemory(size=5 << 30), 4 << 30, r"kv_cache_memory: found 5\.00 GiB, expected 512 bytes .* up to the 4\.00 GiB"),
        (KvMemory(share=0.1), 4100, r"kv_cache_memory: found a share of 0\.1, 410 bytes"),
        (KvMemory(share=1.0), -5, r"kv_cache_memory: found a share of 1, 0 bytes, .* up to the 0 bytes"),
        (KvMemory(1), -5, "kv_tokens: found 1 tokens"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(asked: KvMemory, free: int, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        asked.blocks("cpu", free, "the weights", 512)
