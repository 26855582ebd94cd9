"""The bytes that a user gives to the weights of an engine, and whether 4 bits for each are within them."""

from __future__ import annotations

import re
from decimal import Decimal

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.units import size
from belle_compile.runtime.executors.kv_memory import UNITS

_STAGE = "quantization"
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([A-Z]{1,3})?")


def parse_size(text: str) -> int:
    """Bytes from text such as "3.6GB", "104 MB" or "2GiB"; raises CompileError for other text."""
    match = _SIZE.fullmatch(text.strip().upper())
    count = int(Decimal(match[1]) * UNITS.get(match[2] or "B", 0)) if match else 0
    if not count:
        raise CompileError(_STAGE, "a weight budget", found=repr(text), expected="bytes, such as 3.6GB, 104MB or 2GiB")
    return count


def check_least(budget: int, least: int) -> None:
    """Raise CompileError for a budget below `least`, the bytes of an engine all of whose layers have INT4 weights."""
    if budget < least:
        raise CompileError(
            _STAGE, "a weight budget below what 4 bits need", found=size(budget), expected=f"at least {size(least)}",
            remedy="give a larger --weight-budget, or leave it out",
        )  # fmt: skip
