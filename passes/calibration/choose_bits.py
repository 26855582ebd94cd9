"""Which linears of a model with INT4 weights get more bits, within a number of bytes: those where more bits help most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from belle_compile.passes.calibration.stream_noise import UnitNoise
from belle_compile.passes.quantization.scheme import MoreBits

_LEFT = 1 / 16  # of the noise of weights, with two more bits


@dataclass(frozen=True)
class Step:
    """More bits for linears that stay together: 6 in place of 4, or 8 in place of 6."""

    linears: tuple[str, ...]
    bits: int


def steps_of(units: Sequence[UnitNoise]) -> tuple[Step, ...]:
    """The steps in the order in which they should be taken: those that remove most noise for each weight first.

    Two more bits divide the noise of weights by 16, so that the first step of a unit removes 15 of 16 parts of its noise and
    the second one part; either takes two bits for each weight.
    """
    parts = ((6, 1 - _LEFT), (8, _LEFT))
    ranked = [(part * unit.noise / unit.weights, Step(unit.linears, bits)) for unit in units for bits, part in parts]
    return tuple(step for _, step in sorted(ranked, key=lambda each: (-each[0], each[1].linears, each[1].bits)))


def bits_within(budget: int, steps: Sequence[Step], weight_bytes: Callable[[MoreBits], int]) -> MoreBits:
    """The linears that get more bits: by the most of `steps`, from the first on, that fit the budget.

    `weight_bytes(more_bits)` are the bytes of an engine in which these linears have more bits and the others INT4 weights."""
    fitting, too_many = 0, len(steps) + 1
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        if weight_bytes(_taken(steps[:middle])) <= budget:
            fitting = middle
        else:
            too_many = middle
    return _taken(steps[:fitting])


def _taken(steps: Sequence[Step]) -> MoreBits:
    bits: dict[str, int] = {}
    for step in steps:
        bits.update(dict.fromkeys(step.linears, step.bits))
    int6, int8 = (tuple(sorted(name for name, own in bits.items() if own == wanted)) for wanted in (6, 8))
    return MoreBits(int6, int8)
