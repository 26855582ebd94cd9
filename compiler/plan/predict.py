"""The time of a step, from the bytes it reads, its operations and its messages, and from the rates of a device."""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot, log2

from belle_compile.compiler.plan.work import RankWork

_CHANNEL_BYTES = 4  # bytes of one channel in a sum over ranks: float32
_SEVERAL = 8  # the least number of rows for which `Rates.several` holds in full


@dataclass(frozen=True)
class Rates:
    """The rates that kernels reach on one rank.

    `read` is in bytes a second from memory, and `several` the share of it that products of 8 rows and more reach; `integer` and
    `floating` are in operations a second; `call_s` is the fixed cost of a kernel call in seconds; `latency_s` (seconds) and
    `link` (bytes a second) are those of a message between two ranks.
    """

    read: float
    several: float
    integer: float
    floating: float
    call_s: float
    latency_s: float
    link: float


@dataclass(frozen=True)
class Step:
    """The seconds of one step: products and attention, each under what limits it (memory or arithmetic), the fixed costs of
    kernel calls, and sums over ranks."""

    memory_s: float
    arithmetic_s: float
    calls_s: float
    sums_s: float

    @property
    def seconds(self) -> float:
        return self.memory_s + self.arithmetic_s + self.calls_s + self.sums_s


def predict(work: RankWork, rates: Rates, ranks: int, *, sequences: int, tokens: int, context: int) -> Step:
    """The time of a step of `tokens` new tokens for each of `sequences` sequences, which have `context` earlier tokens on
    average; logits are computed for the last token of each sequence."""
    memory = arithmetic = 0.0

    def add(read: float, compute: float) -> None:
        """Add a part of the step to what limits it. `hypot` models that reading and computing overlap less the closer their
        times are."""
        nonlocal memory, arithmetic
        if read >= compute:
            memory += hypot(read, compute)
        else:
            arithmetic += hypot(read, compute)

    for product in work.products:
        rows = sequences * (tokens if product.of_tokens else 1)
        rate = rates.integer if product.integer else rates.floating
        add(product.weight_bytes / (rates.read * _share(rows, rates.several)), rows * product.operations / rate)
    for layer in work.attention:
        seen = layer.seen(context)
        read = sequences * work.kv.bytes(seen) / len(work.attention) / rates.read
        add(read, sequences * tokens * seen * layer.operations / rates.floating)
    sums = sum(sum_seconds(sequences * tokens * width * _CHANNEL_BYTES, rates, ranks) for width in work.sums)
    return Step(memory, arithmetic, work.calls * rates.call_s, sums)


def _share(rows: int, several: float) -> float:
    """The share of the read rate that products of `rows` rows reach."""
    return float(several ** min(log2(rows) / log2(_SEVERAL), 1.0))


def sum_seconds(size: int, rates: Rates, ranks: int) -> float:
    """The time of an all-reduce of `size` bytes: two passes round a ring of all ranks or, where that is faster, a message to
    each other rank at once."""
    if ranks == 1:
        return 0.0
    ring = 2 * (ranks - 1) * (rates.latency_s + size / ranks / rates.link)
    direct = rates.latency_s + (ranks - 1) * size / rates.link
    return min(ring, direct)
