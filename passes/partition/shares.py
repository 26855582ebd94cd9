"""Which heads, channels and tokens a rank has: a range of whole units; the first ranks have one more if units are left over."""

from __future__ import annotations

from math import gcd

from belle_compile.compiler.errors import CompileError

Range = tuple[int, int]  # (start, stop), without stop

CHANNELS = 16  # channels of a feed-forward part that stay together: a panel of the kernels
TOKENS = 16  # tokens of the vocabulary that stay together


def share(total: int, unit: int, rank: int, ranks: int, what: str, remedy: str = "") -> Range:
    """The rank's part of `total`, which is divided in units of `unit`; the last unit may be shorter.

    Raises CompileError where a rank would have no unit; its remedy is fewer ranks, or `remedy`.
    """
    units = -(-total // unit)
    if units < ranks:
        fewer = f"build for {'one rank' if units == 1 else f'at most {units} ranks'}"
        raise CompileError(
            "partition", f"{what} for {ranks} ranks", found=f"{total}, in units of {unit}" if unit > 1 else str(total),
            expected=f"{ranks} units or more", remedy=f"{fewer}, or {remedy}" if remedy else fewer,
        )  # fmt: skip
    least, more = divmod(units, ranks)
    start = rank * least + min(rank, more)
    stop = start + least + (rank < more)
    return start * unit, min(stop * unit, total)


def heads(num_heads: int, num_kv_heads: int, together: int, rank: int, ranks: int) -> tuple[Range, Range]:
    """The query heads and the key/value heads of a rank, whose first query head is a multiple of `together`.

    A key/value head goes with all of its query heads. Where there are fewer key/value heads than ranks, each is on several
    ranks, which divide its query heads. Raises CompileError where the ranks cannot divide the heads in this way.
    """
    group = num_heads // num_kv_heads
    if num_kv_heads >= ranks:
        start, stop = share(num_kv_heads, together // gcd(together, group), rank, ranks, "key/value heads")
        return (start * group, stop * group), (start, stop)
    if ranks % num_kv_heads or (num_kv_heads > 1 and group % together):
        found = f"{num_kv_heads} of {group} query heads each"
        fits = "a divisor of the ranks" if ranks % num_kv_heads else f"query heads in groups of {together}"
        remedy = f"build for {num_kv_heads} {'rank' if num_kv_heads == 1 else 'ranks'}"
        raise CompileError("partition", f"key/value heads for {ranks} ranks", found=found, expected=fits, remedy=remedy)
    copies = ranks // num_kv_heads
    kv_head, member = divmod(rank, copies)
    start, stop = share(group, together, member, copies, "query heads of a key/value head")
    return (kv_head * group + start, kv_head * group + stop), (kv_head, kv_head + 1)
