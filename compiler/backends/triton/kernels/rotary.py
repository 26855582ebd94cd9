"""Rotary position embedding: the table of cosines and sines of a step."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.program.kernel import View
from belle_compile.compiler.backends.triton.kernels.base import Kernel, Start, power_of_two
from belle_compile.compiler.backends.triton.kernels.device import begin

_TOKENS = tl.constexpr(128)  # tokens that are compared at once to determine the length of a sequence


@triton.jit
def rotary_rows(rows_ptr, positions_ptr, sequences_ptr, inv_freq_ptr, cos_sin_ptr, SHAPE: tl.constexpr, OVERLAP: tl.constexpr):
    rows = begin(rows_ptr, OVERLAP)
    row = tl.program_id(0)
    half: tl.constexpr = SHAPE.head_dim // 2
    factor: tl.constexpr = SHAPE.dynamic_factor
    if row < rows:
        pairs = tl.arange(0, SHAPE.padded)
        inside = pairs < half
        frequencies = tl.load(inv_freq_ptr + pairs, mask=inside, other=0.0)
        position = tl.load(positions_ptr + row)
        if factor != 0.0:
            sequence = tl.load(sequences_ptr + row)
            last = position
            for start in range(0, rows, _TOKENS):
                tokens = start + tl.arange(0, _TOKENS)
                same = tl.load(sequences_ptr + tokens, mask=tokens < rows, other=-1) == sequence
                last = tl.maximum(last, tl.max(tl.load(positions_ptr + tokens, mask=same, other=0), axis=0))
            length = last + 1
            if length > SHAPE.original_max:
                stretch = tl.div_rn(factor * length.to(tl.float32), SHAPE.original_max * 1.0) - (factor - 1.0)
                grown = SHAPE.base * tl.exp2(tl.log2(stretch) * (2 * half / (2 * half - 2)))
                frequencies = tl.exp2(-tl.log2(grown) * (pairs.to(tl.float32) / half))
        angles = position.to(tl.float32) * frequencies
        out = cos_sin_ptr + row.to(tl.int64) * SHAPE.stride + pairs
        tl.store(out, tl.cos(angles) * SHAPE.attention_scaling, mask=inside)
        tl.store(out + half, tl.sin(angles) * SHAPE.attention_scaling, mask=inside)


@dataclass(frozen=True)
class RotaryTable(Kernel, kernels.RotaryTable):
    """Each warp computes one token."""

    function = rotary_rows

    @property
    def padded(self) -> int:
        """Pairs that a program holds, a power of two."""
        return power_of_two(self.head_dim // 2)

    @property
    def stride(self) -> int:
        """The distance in elements from one token of the table to the next."""
        return View.of_width(self.head_dim).stride

    def stack(self) -> int:
        return 32  # for cosines of large angles, whose reduction multiplies many words

    def start(self) -> Start:
        return Start((1, 1, 1), 1, 1)
