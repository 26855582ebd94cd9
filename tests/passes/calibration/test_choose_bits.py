"""Which linears get more bits within a budget."""

from __future__ import annotations

from belle_compile.passes.calibration.choose_bits import Step, bits_within, steps_of
from belle_compile.passes.calibration.stream_noise import UnitNoise
from belle_compile.passes.quantization.scheme import MoreBits


def test_the_order_of_steps() -> None:
    """Of a unit, 6 bits come before 8; 8 bits come early where noise is more than 15 times that of others."""
    units = [UnitNoise(("a",), 10, 2.0), UnitNoise(("b", "c"), 20, 20.0), UnitNoise(("d",), 10, 0.1)]
    order = [(step.linears[0], step.bits) for step in steps_of(units)]
    assert order == [("b", 6), ("a", 6), ("b", 8), ("a", 8), ("d", 6), ("d", 8)]


def test_the_most_that_fit() -> None:
    steps = (Step(("a",), 6), Step(("b", "c"), 6), Step(("a",), 8))

    def weight_bytes(chosen: MoreBits) -> int:
        return 10 + 5 * len(chosen.int6) + 8 * len(chosen.int8)

    expected = {14: MoreBits(), 15: MoreBits(("a",)), 24: MoreBits(("a",)), 25: MoreBits(("a", "b", "c")),
                28: MoreBits(("b", "c"), ("a",)), 99: MoreBits(("b", "c"), ("a",))}  # fmt: skip
    for budget, chosen in expected.items():
        assert bits_within(budget, steps, weight_bytes) == chosen
