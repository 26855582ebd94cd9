"""Numbers as people read them, for error messages, tables and the report."""

from __future__ import annotations


def size(count: int) -> str:
    """Bytes in powers of ten, as disks are sold: "134.5 MB"."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def memory_words(whole: int, mapped: int) -> str:
    """The memory that a host needs, and how much of it is for mapped weights: "9.5 GB of memory, 8.1 GB of it for mapped
    weights"."""
    return f"{size(whole)} of memory" + (f", {size(mapped)} of it for mapped weights" if mapped else "")


def duration(seconds: float) -> str:
    """A time in words: "0.3 s", "75 s", "9 min", "3.2 h"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
