"""Rotary position embedding: the table of cosines and sines of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.program.kernel import View
from belle_compile.compiler.backends.triton.kernels.base import Kernel, Start, power_of_two
from belle_compile.compiler.backends.triton.kernels.device import begin

_TOKENS = 128  # looked at together for the length of a sequence


@triton.jit
def rotary_rows(rows_ptr, positions_ptr, sequences_ptr, inv_freq_ptr, cos_sin_ptr, HALF: tl.constexpr, BLOCK: tl.constexpr,
                STRIDE: tl.constexpr, SCALING: tl.constexpr, FACTOR: tl.constexpr, ORIGINAL: tl.constexpr, BASE: tl.constexpr,
                TOKENS: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    rows = begin(rows_ptr, OVERLAP)
    row = tl.program_id(0)
    if row < rows:
        pairs = tl.arange(0, BLOCK)
        inside = pairs < HALF
        frequencies = tl.load(inv_freq_ptr + pairs, mask=inside, other=0.0)
        position = tl.load(positions_ptr + row)
        if FACTOR != 0.0:
            sequence = tl.load(sequences_ptr + row)
            last = position
            for start in range(0, rows, TOKENS):
                tokens = start + tl.arange(0, TOKENS)
                same = tl.load(sequences_ptr + tokens, mask=tokens < rows, other=-1) == sequence
                last = tl.maximum(last, tl.max(tl.load(positions_ptr + tokens, mask=same, other=0), axis=0))
            length = last + 1
            if length > ORIGINAL:
                stretch = tl.div_rn(FACTOR * length.to(tl.float32), ORIGINAL * 1.0) - (FACTOR - 1.0)
                grown = BASE * tl.exp2(tl.log2(stretch) * (2 * HALF / (2 * HALF - 2)))
                frequencies = tl.exp2(-tl.log2(grown) * (pairs.to(tl.float32) / HALF))
        angles = position.to(tl.float32) * frequencies
        out = cos_sin_ptr + row.to(tl.int64) * STRIDE + pairs
        tl.store(out, tl.cos(angles) * SCALING, mask=inside)
        tl.store(out + HALF, tl.sin(angles) * SCALING, mask=inside)


@dataclass(frozen=True)
class RotaryTable(Kernel, kernels.RotaryTable):
    """A warp has a token."""

    function = rotary_rows

    def stack(self) -> int:
        return 32  # cosines of large angles, which are reduced by a product of many words

    def start(self) -> Start:
        return Start((1, 1, 1), 1, 1)

    def constants(self) -> Mapping[str, Any]:
        half = self.head_dim // 2
        return {
            "HALF": half, "BLOCK": power_of_two(half), "STRIDE": View.of_width(self.head_dim).stride,
            "SCALING": float(self.attention_scaling), "FACTOR": float(self.dynamic_factor), "ORIGINAL": self.original_max,
            "BASE": float(self.base), "TOKENS": _TOKENS,
        }  # fmt: skip
