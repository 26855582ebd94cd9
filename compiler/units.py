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
