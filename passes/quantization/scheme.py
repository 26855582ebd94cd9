"""How weights are stored: a preset chooses a scheme once, and passes carry it out."""

from __future__ import annotations

from dataclasses import dataclass, replace

from belle_compile.compiler.ir.constants import GROUP


@dataclass(frozen=True)
class WeightScheme:
    """How the weights of a model's linear layers are stored.

    A weight has `bits`: 32 for float32, fewer for integers with scales. `group` neighbouring inputs of an output share a
    scale; None stands for all inputs, so that each output channel has one scale. With `zero_points`, each scale comes with the
    integer that stands for 0; without, that is 0. Where layers have integers, embedding and head are INT8 per output channel.
    """

    bits: int
    group: int | None = None
    zero_points: bool = False

    @property
    def is_grouped_int4(self) -> bool:
        """Whether weights are INT4 in groups of inputs without zero points, which is what passes make."""
        return self.group is not None and self == replace(INT4, group=self.group)

    @property
    def unusual(self) -> dict[str, int]:
        """The entry on the size of groups in the record of a pass; empty for the default size."""
        return {"group": self.group} if self.group and self.group != INT4.group else {}

    @property
    def quantizes(self) -> bool:
        """Whether weights become integers."""
        return self.bits < FLOAT32.bits

    def __str__(self) -> str:
        """The manifest's words, e.g. "int8 per output channel"."""
        if not self.quantizes:
            return "float32"
        zeros = " with zero points" if self.zero_points else ""
        if self.group is None:
            return f"int{self.bits} per output channel{zeros}"
        tables = ", int8 embedding and head" if self.bits < INT8.bits else ""
        return f"int{self.bits} in groups of {self.group} inputs{zeros}{tables}"


@dataclass(frozen=True)
class MoreBits:
    """The names of the linears that get more bits than the INT4 weights of the others: `int6` in the same groups of inputs, and
    `int8` with a scale for each output."""

    int6: tuple[str, ...] = ()
    int8: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.int6 or self.int8)


ONE_SIZE = MoreBits()  # all linears have the same bits
BLOCK = 32  # inputs of llama.cpp's Q8_0 that share a scale
FLOAT32 = WeightScheme(32)
INT8 = WeightScheme(8)
INT8_BLOCKS = WeightScheme(8, BLOCK)
INT4 = WeightScheme(4, GROUP)
