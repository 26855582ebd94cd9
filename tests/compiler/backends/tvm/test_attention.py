"""The paged cache kernels against compiler.ir.meanings.attention, which fills unwritten slots with NaN."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import pytest

from belle_compile.compiler.backends.program.kernel import View
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.append_kv import AppendKV
from belle_compile.compiler.backends.tvm.kernels.attention import Attention
from belle_compile.compiler.backends.tvm.kernels.base import rows_apart
from belle_compile.compiler.backends.tvm.kernels.tile_attention import TileAttention
from belle_compile.compiler.ir import meanings
from belle_compile.compiler.ir.cache import PagedCache
from belle_compile.runtime.program import KV, KV_DTYPES, KVLayout
from tests.compiler.backends.tvm.amx_emulation import AMX_TEST_ISAS
from tests.compiler.backends.tvm.harness import HOST_ISAS, Array, Library, aligned, aligned_copy, garbage, ints, place

MAX_BLOCKS = 40
NUM_BLOCKS = 130
LAYERS, LAYER = 3, 1


@dataclass(frozen=True)
class Case:
    """One shape of attention, with q, k and v side by side in one buffer as a fused projection leaves them."""

    heads: int
    kv_heads: int
    dim: int
    cache: str = "float32"
    rotary: bool = False
    alibi: bool = False
    window: int | None = None

    @property
    def widths(self) -> tuple[int, int, int]:
        return self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.dim

    @property
    def views(self) -> list[View]:
        stride = View.of_width(sum(self.widths)).stride
        return [View(stride, sum(self.widths[:i])) for i in range(3)]

    @property
    def attention(self) -> Attention:
        return Attention(LAYERS, self.heads, self.kv_heads, self.dim, self.dim**-0.5, self.views[0],
                         View.of_width(self.widths[0]), MAX_BLOCKS, self.cache, self.rotary, self.alibi,
                         window=self.window)  # fmt: skip

    @property
    def append(self) -> AppendKV:
        return AppendKV(LAYERS, self.kv_heads, self.dim, self.views[1], self.views[2], MAX_BLOCKS, self.cache, self.rotary)

    def __str__(self) -> str:
        extra = "-rotary" * self.rotary + "-alibi" * self.alibi
        extra += f"-{self.window}" if self.window else ""
        return f"{self.heads}of{self.kv_heads}x{self.dim}-{self.cache}{extra}"


CASES = [
    Case(3, 3, 8, alibi=True),
    Case(9, 3, 40, rotary=True),
    Case(8, 1, 20),
    Case(40, 20, 8, "float16", alibi=True),
    Case(8, 2, 128, "float16", rotary=True),
    Case(40, 20, 8, "bfloat16", alibi=True),
    Case(2, 1, 10, "bfloat16"),
    Case(9, 3, 64, "bfloat16", rotary=True),
    Case(3, 3, 8, "int8", alibi=True),
    Case(2, 1, 10, "int8"),
    Case(9, 3, 64, "int8", rotary=True),
    Case(9, 3, 40, rotary=True, alibi=True, window=100),
    Case(4, 2, 32, "int8", window=260),
]
TILES = [
    Case(3, 3, 32, "bfloat16", alibi=True),
    Case(9, 3, 64, "bfloat16", rotary=True),
    Case(8, 1, 96, "bfloat16", rotary=True),
    Case(8, 2, 128, "bfloat16", rotary=True),
    Case(20, 1, 32, "bfloat16"),
    Case(9, 3, 64, "bfloat16", rotary=True, window=100),
    Case(16, 2, 32, "bfloat16", alibi=True, window=17),
]  # what AMX multiplies in tiles
EVERY = [(isa, case) for isa in HOST_ISAS for case in CASES] + [(isa, case) for isa in AMX_TEST_ISAS for case in TILES]
SAME_BITS = [(isa, case) for isa, case in EVERY if isa.amx or CASES.index(case) in (0, 1, 3, 5, 7, 10, 11, 12)]

# Steps as (sequence, first position, tokens): prompts, mixed steps, decoding across the borders of blocks and chunks.
STEPS: dict[str, list[list[tuple[int, int, int]]]] = {
    "one_token": [[(0, 0, 1)], [(0, 1, 1)]],
    "decode": [[(0, 0, 127)], [(0, 127, 1)], [(0, 128, 1)], [(0, 129, 1)]],
    "long": [[(0, 0, 300)], [(0, 300, 270)], [(0, 570, 1)]],
    "ragged": [
        [(2, 0, 37), (0, 0, 5), (1, 0, 130)],
        [(0, 5, 1), (2, 37, 1), (1, 130, 1)],
        [(1, 131, 3), (3, 0, 50), (0, 6, 1), (2, 38, 17)],
        [(3, 50, 1), (0, 7, 1), (1, 134, 1), (2, 55, 1), (3, 51, 1), (0, 8, 2)],
    ],
}


@cache
def library_of(isa: Isa) -> Library:
    cases = TILES if isa.amx else CASES
    return Library([kernel for case in cases for kernel in (case.append, case.attention)], isa)


def named(value: object) -> str | None:
    return value.name if isinstance(value, Isa) else str(value) if isinstance(value, Case) else None


class Part:
    """Keys or values of one of an engine's layers: the whole cache, and views of what lies there. Unwritten slots are NaN."""

    def __init__(self, case: Case, whole: Array, name: Literal["k", "v"], *shape: int) -> None:
        layout = KVLayout(LAYERS, case.kv_heads, case.dim, case.cache)
        self.start = layout.part_offset(KV(LAYER, name))
        here = whole[:, self.start : self.start + layout.part_block_bytes]
        self.whole, self.memory = whole, here.reshape(NUM_BLOCKS, case.kv_heads, layout.head_block_bytes)
        assert np.shares_memory(self.memory, whole)
        first = layout.scales_bytes
        self.shape, self.dtype, self.slice = (
            shape,
            np.dtype(case.cache),
            slice(first, first + case.dim * 16 * KV_DTYPES[case.cache]),
        )
        self.padding = self.memory[..., self.slice.stop :]
        self.scales = self.memory[..., :first].view(np.float32)

    @property
    def values(self) -> Array:
        """What lies there now, [block, head, *shape]; pairs of bfloat16 are taken apart."""
        values = self.memory[..., self.slice].view(self.dtype)
        if self.dtype == "bfloat16":
            first, second = self.shape
            values = values.reshape(NUM_BLOCKS, -1, first // 2, second, 2).swapaxes(-1, -2)
        return values.reshape(NUM_BLOCKS, -1, *self.shape)

    @property
    def flat(self) -> Array:
        """The memory as a kernel takes it."""
        return self.whole.reshape(-1)[self.start :].view(np.uint16 if self.dtype == "bfloat16" else self.dtype)

    def check(self, values: Array, scales: Array, exact: bool) -> None:
        """Holds what the oracle's cache holds, and nothing where that holds nothing; all arrays [block, head, ...]."""
        if scales.size:
            np.testing.assert_allclose(self.scales, scales, rtol=0 if exact else 1e-6)
            assert (self.padding == 255).all()
            unwritten = np.isnan(scales)[:, :, None, :] if self.values.shape[-1] == 16 else np.isnan(scales)[..., None]
            difference = np.abs(self.values.astype(int) - np.where(unwritten, -1, values))
            assert difference.max() <= (0 if exact else 1)
            assert (difference > 0).mean() < 1e-3
        else:
            tolerance = 0.0 if exact else {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[str(values.dtype)]
            found, expected = (array.astype(np.float32) for array in (self.values, values))
            np.testing.assert_allclose(found, expected, rtol=tolerance, atol=0 if exact else 1e-6)


def parts(case: Case) -> tuple[Part, Part]:
    """Keys and values in a cache of their own."""
    layout = KVLayout(LAYERS, case.kv_heads, case.dim, case.cache)
    whole = aligned((NUM_BLOCKS, layout.block_bytes), np.uint8, 255)
    return Part(case, whole, "k", case.dim, 16), Part(case, whole, "v", 16, case.dim)


class Mirror(PagedCache):
    """What the kernels stored, for the oracle to read."""

    def __init__(self, case: Case, keys: Part, values: Part) -> None:
        super().__init__(1, case.kv_heads, case.dim, NUM_BLOCKS, case.cache)
        self.parts = keys, values

    def read(self, layer: int, blocks: Array, length: int) -> tuple[Array, Array]:
        """What the kernels have left by now."""
        self.k, self.v = (part.values[None] for part in self.parts)
        self.k_scales, self.v_scales = (part.scales[None] for part in self.parts)
        return super().read(layer, blocks, length)

    def write(self, layer: int, blocks: Array, position: int, k: Array, v: Array) -> None:
        """The kernels have done it."""


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize(("isa", "case"), EVERY, ids=named)
def test_attention(isa: Isa, case: Case, steps: list[list[tuple[int, int, int]]]) -> None:
    library, tiles = library_of(isa), TileAttention.takes(case.attention, isa, 1)
    assert tiles == isa.amx
    generator = np.random.default_rng(0)
    scrambled = generator.permutation(NUM_BLOCKS)[: 3 * MAX_BLOCKS].reshape(3, MAX_BLOCKS)
    table = aligned_copy(np.concatenate([scrambled, np.full((1, MAX_BLOCKS), NUM_BLOCKS - 1)]), np.int32)
    table[3, :8] = np.setdiff1d(np.arange(NUM_BLOCKS), scrambled)[:8]
    oracle = PagedCache(1, case.kv_heads, case.dim, NUM_BLOCKS, case.cache)
    keys, values = parts(case)
    stored = Mirror(case, keys, values)
    slopes = aligned_copy(0.5 ** (1 + np.arange(48) % 16), np.float32)
    for step in steps:
        positions = ints(*[p for _, first, n in step for p in range(first, first + n)])
        sequences = ints(*[s for s, _, n in step for _ in range(n)])
        rows = len(positions)
        q, k, v = (generator.standard_normal((rows, width), np.float32) for width in case.widths)
        angles = positions[:, None] * 0.9 ** np.arange(case.dim // 2)
        cos_sin = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
        qkv = place(np.concatenate([q, k, v], axis=1), View(case.views[0].stride))
        batch = [positions, sequences, table]
        tables = [place(cos_sin, rows_apart(case.dim))] if case.rotary else []
        out = garbage((rows, case.attention.out.stride))
        library.call(case.append, ints(rows), qkv, qkv, *batch, *tables, keys.flat, values.flat)
        slope = [slopes] if case.alibi else []
        library.call(case.attention, ints(rows), qkv, *batch, *tables, *slope, keys.flat, values.flat, out)

        rotation, biases = cos_sin if case.rotary else None, slopes[: case.heads] if case.alibi else None
        if tiles:  # the oracle with queries rounded to bfloat16, in the unit of scores; its own keys are those of the cache
            q = q.reshape(rows, case.heads, case.dim)
            unit = np.float32(case.dim**-0.5 * math.log2(math.e))
            rotated = (meanings.rotate(q, cos_sin) if case.rotary else q) * unit
            q, rotation = rotated.astype(np.dtype("bfloat16")).astype(np.float32).reshape(rows, -1) / unit, None
        expected = meanings.attention(
            q, k, v, positions, sequences, table, rotation, biases, cache=stored, layer=0,
            num_heads=case.heads, num_kv_heads=case.kv_heads, head_dim=case.dim, scale=case.dim**-0.5,
            window=case.window or 0)  # fmt: skip
        tolerance = 4e-5 if case.alibi else 4e-6  # float32 scores of the oracle grow with slope * position
        if tiles:
            tolerance = 1e-2  # weights are rounded to 8 bits
        np.testing.assert_allclose(out[:, : case.widths[0]], expected, rtol=0, atol=tolerance)
        k = k.reshape(rows, case.kv_heads, case.dim)
        k = meanings.rotate(k, cos_sin) if case.rotary else k
        for row, (position, sequence) in enumerate(zip(positions, sequences, strict=True)):
            oracle.write(0, table[sequence], int(position), k[row], v[row].reshape(case.kv_heads, case.dim))
        keys.check(oracle.k[0], oracle.k_scales[0], exact=not case.rotary)
    values.check(oracle.v[0], oracle.v_scales[0], exact=True)
    others = np.ones(keys.whole.shape[1], bool)
    for part in (keys, values):
        others[part.start : part.start + part.memory[0].size] = False
    assert (keys.whole[:, others] == 255).all(), "other layers were written to"


@pytest.mark.parametrize(("isa", "case"), SAME_BITS, ids=named)
def test_a_row_gets_the_same_bits_alone_and_in_company(isa: Isa, case: Case) -> None:
    """A sequence is read whole; or up to 375 tokens, then in threes, eights and one by one, where context 384 adds a chunk."""
    library, generator = library_of(isa), np.random.default_rng(1)
    length, prompt, heads = 415, 375, case.widths[0]
    table = aligned_copy(generator.permutation(NUM_BLOCKS)[:MAX_BLOCKS], np.int32)
    qkv = place(generator.standard_normal((length, sum(case.widths)), np.float32), View(case.views[0].stride))
    angles = np.arange(length)[:, None] * 0.9 ** np.arange(case.dim // 2)
    cos_sin = place(np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32), rows_apart(case.dim))
    slope = [aligned_copy(0.5 ** (1 + np.arange(48) % 16), np.float32)] if case.alibi else []
    expected, memory = np.empty((0, heads)), b""
    for at_once in (length, 8, 3, 1):
        steps = [range(length)] if at_once == length else [range(prompt)]
        steps += [range(first, min(first + at_once, length)) for first in range(len(steps[0]), length, at_once)]
        keys, values = parts(case)
        results = []
        for step in steps:
            rows, here = len(step), slice(step.start, step.stop)
            batch = [ints(*step), ints(*[0] * rows), table]
            tables = [aligned_copy(cos_sin[here])] if case.rotary else []
            some, out = aligned_copy(qkv[here]), garbage((rows, case.attention.out.stride))
            library.call(case.append, ints(rows), some, some, *batch, *tables, keys.flat, values.flat)
            library.call(case.attention, ints(rows), some, *batch, *tables, *slope, keys.flat, values.flat, out)
            results.append(out[:, :heads])
        result = np.concatenate(results)
        if at_once == length:
            expected, memory = result, keys.whole.tobytes()
        np.testing.assert_array_equal(result, expected)
        assert keys.whole.tobytes() == memory
