"""The size of the KV cache: a number of tokens or of bytes, or a share of the memory that is free beside the weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.program import BLOCK_SIZE, SERVED_TOKENS
from belle_compile.runtime.serving.kv_blocks import blocks_for

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30,
         "TIB": 1 << 40}  # fmt: skip
_EXPECTED = 'bytes such as 4294967296, "4GiB" or "500MB", or a share of what is free such as 0.5 or "50%"'
_WHOLE = re.compile(r"[0-9]{1,18}")
_NUMBER = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?|\.[0-9]{1,18})\s*([A-Z]{1,3}|%)?")


@dataclass(frozen=True)
class KvMemory:
    """The size of each rank's KV cache that a user asks for: `tokens`, `size` in bytes, or `share`, in (0, 1], of the memory
    that is free beside the weights. At most one is not None; with none of them the executor chooses."""

    tokens: int | None = None
    size: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, kv_tokens: int | None = None, kv_cache_memory: str | float | None = None) -> KvMemory:
        """Read the arguments of `Engine.load`; raises `EngineError` for what is no size, and where both are given."""
        if kv_tokens is not None and kv_cache_memory is not None:
            found, expected = "kv_tokens and kv_cache_memory", "one of them"
            raise EngineError("engine", "the size of the KV cache", found=found, expected=expected)
        if kv_cache_memory is not None:
            return _parse(kv_cache_memory)
        if kv_tokens is not None and (isinstance(kv_tokens, bool) or not isinstance(kv_tokens, Integral) or kv_tokens < 1):
            raise EngineError("engine", "kv_tokens", found=_shown(kv_tokens), expected="a whole number of tokens, 1 or more")
        return cls(tokens=None if kv_tokens is None else int(kv_tokens))

    def blocks(self, stage: str, free: int, beside: str, block_bytes: int) -> int | None:
        """The number of blocks of `block_bytes` bytes each, or None where the executor chooses.

        `free` is the number of bytes left beside what `beside` names. Raises `EngineError` where they do not hold what was
        asked for, or where that is less than one block.
        """
        if self.tokens is not None:
            option, asked, blocks = "kv_tokens", f"{self.tokens} tokens", blocks_for(self.tokens)
            asked += f", {_amount(blocks * block_bytes)}"
        elif self.size is not None:
            option, asked, blocks = "kv_cache_memory", _amount(self.size), self.size // block_bytes
        elif self.share is not None:
            size = int(self.share * max(free, 0))
            option, asked, blocks = "kv_cache_memory", f"a share of {self.share:g}, {_amount(size)}", size // block_bytes
        else:
            return None
        if not 1 <= blocks <= free // block_bytes:
            least, most = _amount(block_bytes), _amount(max(free, 0))
            expected = f"{least} for {BLOCK_SIZE} tokens, up to the {most} that are free beside {beside}"
            remedy = "ask for another size, or load on a larger host"
            raise EngineError(stage, option, found=asked, expected=expected, remedy=remedy)
        return blocks

    def blocks_beside_weights(
        self, stage: str, memory: int, weight_bytes: int, block_bytes: int, *, context: int, most: int
    ) -> int:
        """The number of blocks in `memory` bytes that hold weights and cache, by default what half of the rest holds, and no
        more than `most`.

        What one sequence needs (`SERVED_TOKENS`, or the longest `context` where that is shorter) is free on every host that
        passed the checks, since mapped weights give way to it. Raises `EngineError` where the cache does not fit.
        """
        fewest = blocks_for(min(SERVED_TOKENS, context))
        free = max(memory - weight_bytes, fewest * block_bytes)
        blocks = self.blocks(stage, free, f"the weights ({weight_bytes / 2**30:.2f} GiB)", block_bytes)
        return max(fewest, min(free // 2 // block_bytes, most)) if blocks is None else blocks


def _parse(value: Any) -> KvMemory:
    size, share = None, None
    if isinstance(value, str):
        size, share = _parse_text(value.strip().upper())
    elif isinstance(value, Integral) and not isinstance(value, bool):
        size = int(value)
    elif isinstance(value, Real) and not isinstance(value, bool):
        share = float(value)
    if size is not None and size >= 1:
        return KvMemory(size=size)
    if share is not None and 0 < share <= 1:
        return KvMemory(share=share)
    raise EngineError("engine", "kv_cache_memory", found=_shown(value), expected=_EXPECTED)


def _parse_text(text: str) -> tuple[int | None, float | None]:
    """The number of bytes or the share that a text names, or neither."""
    if _WHOLE.fullmatch(text):
        return int(text), None
    if match := _NUMBER.fullmatch(text):
        number, unit = Decimal(match[1]), match[2]
        if unit in UNITS:
            return int(number * UNITS[unit]), None
        if unit in (None, "%"):
            return None, float(number / 100 if unit else number)
    return None, None


def _shown(value: object) -> str:
    """A value for an error message, at most 80 characters of it."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _amount(size: int) -> str:
    if size < 1 << 20:
        return f"{size} bytes"
    return f"{size / 2**30:.2f} GiB" if size >= 1 << 27 else f"{size / 2**20:.2f} MiB"
