"""The softmax over a part of a context as it is saved and added up, in an order that depends on the context alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from belle_compile.compiler.backends.program.kernel import round_up
from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.kernels.rowwise import each
from belle_compile.compiler.backends.tvm.tir import LANES, Buffer, Expr, T

LOWEST = -1.0e30  # stands for minus infinity; unlike those of infinities, its differences are numbers


@dataclass(frozen=True)
class PartSums:
    """The layout of one query's softmax over a part of its context, in floats: sums of weighted values, 16 partial sums of the
    weights, and 16 copies of the maximum that both are relative to. `power` is e**x or 2**x of a difference of scores."""

    dim: int
    power: Callable[[Expr], Expr] = tir.exp

    @property
    def weights(self) -> int:
        """The index at which the weights begin."""
        return round_up(self.dim, LANES)

    @property
    def maximum(self) -> int:
        """The index at which the maximum begins."""
        return self.weights + LANES

    @property
    def size(self) -> int:
        """The number of floats of one query."""
        return self.maximum + LANES

    def clear(self, total: Buffer, at: Expr) -> None:
        """Set to the softmax over no token."""
        tir.for_range(self.maximum // LANES, lambda v: tir.store(total, at + v * LANES, tir.splat(0.0)))
        tir.store(total, at + self.maximum, tir.splat(LOWEST))

    def add(self, total: Buffer, at: Expr, sums: Callable[[Expr], Expr], weights: Expr, maximum: Expr) -> None:
        """Add one part to `total`; `sums(v)` is its v-th vector of sums."""
        weights, maximum = tir.bind(weights), tir.bind(maximum)
        old = tir.bind(tir.load(total, at + self.maximum))
        highest = tir.bind(T.max(old, maximum))
        power = tir.bind(self.power(T.min(old, maximum) - highest))
        keep = tir.bind(T.Select(old < maximum, power, tir.splat(1.0)))
        share = tir.bind(T.Select(old < maximum, tir.splat(1.0), power))

        def take(offset: Expr, value: Expr) -> None:
            tir.store(total, at + offset, tir.fma(share, value, keep * tir.load(total, at + offset)))

        tir.for_range(self.weights // LANES, lambda v: take(v * LANES, sums(v)))
        take(self.weights, weights)
        tir.store(total, at + self.maximum, highest)

    def add_saved(self, total: Buffer, at: Expr, parts: Buffer, start: Expr) -> None:
        """Add the part that was saved at `start` of `parts`."""
        self.add(total, at, lambda v: tir.load(parts, start + v * LANES), tir.load(parts, start + self.weights),
                 tir.load(parts, start + self.maximum))  # fmt: skip

    def write_mean(self, total: Buffer, at: Expr, out: Buffer, target: Expr) -> None:
        """out[target:] = sums / weights"""
        inverse = tir.bind(T.float32(1.0) / tir.sum_lanes(tir.load(total, at + self.weights)))
        each(self.dim, lambda c, lanes: tir.store(
            out, target + c, tir.load(total, at + c, lanes) * tir.splat(inverse, lanes), lanes))  # fmt: skip
