"""Attention kernels beside their NumPy meaning, interpreted: ragged steps, split contexts, all caches."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

pytest.importorskip("triton")

from belle_compile.compiler.backends.program.kernel import View
from belle_compile.compiler.backends.triton.kernels import attention
from belle_compile.compiler.backends.triton.kernels.attention import AttendAlone, AttendRuns
from belle_compile.compiler.backends.triton.kernels.cache import AppendKV
from belle_compile.compiler.ir import meanings
from belle_compile.compiler.ir.cache import BLOCK_SIZE, PagedCache
from belle_compile.runtime.program import KV, KVLayout
from tests.compiler.backends.triton.harness import Array, call, floats, garbage, place, taken

MAX_BLOCKS, BLOCKS, LAYERS, LAYER = 12, 40, 2, 1
TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "int8": 2e-3}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs them one after the other."""
    monkeypatch.setattr(attention, "_PROGRAMS", 16)


@dataclass
class Model:
    """One layer's attention, with the cache of the meaning and that of the kernels."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    rotary: bool
    window: int | None = None
    reference: PagedCache = field(init=False)
    memory: Array = field(init=False)

    def __post_init__(self) -> None:
        self.reference = PagedCache(LAYERS, self.kv_heads, self.head_dim, BLOCKS, self.dtype)
        self.layout = KVLayout(LAYERS, self.kv_heads, self.head_dim, self.dtype, transposed_keys=False)
        self.memory = np.full(BLOCKS * self.layout.block_bytes, 0xFF, np.uint8)  # NaN
        self.slopes = None if self.rotary else np.abs(floats(self.heads)) / 10
        self.table = np.random.default_rng(3).permutation(BLOCKS)[: 3 * MAX_BLOCKS].reshape(3, MAX_BLOCKS).astype(np.int32)
        self.scale = float(self.head_dim**-0.5)

    def part(self, part: str) -> Array:
        """The cache from the layer's keys or values on."""
        start = self.layout.part_offset(KV(LAYER, "k" if part == "k" else "v"))
        return self.memory[start:]

    def step(self, positions: list[int], sequences: list[int]) -> None:
        """A step of tokens on both, compared."""
        tokens, width, kv_width = len(positions), self.heads * self.head_dim, self.kv_heads * self.head_dim
        q, k, v = floats(tokens, width), floats(tokens, kv_width), floats(tokens, kv_width)
        where = np.array(positions, np.int32), np.array(sequences, np.int32)
        beyond = tuple(np.concatenate([array, np.full(3, -7, np.int32)]) for array in where)
        half = np.arange(0, self.head_dim, 2) / self.head_dim
        angles = where[0][:, None] * 10000.0**-half
        cos_sin = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32) if self.rotary else None
        expected = meanings.attention(
            q, k, v, *where, self.table, cos_sin, self.slopes, cache=self.reference, layer=LAYER, num_heads=self.heads,
            num_kv_heads=self.kv_heads, head_dim=self.head_dim, scale=self.scale,
            window=self.window or 0,
        )  # fmt: skip
        together = View(-(-(width + 2 * kv_width) // 64) * 64)
        buffer = place(np.concatenate([q, k, v], axis=1), together)
        tables = [] if cos_sin is None else [place(cos_sin, View.of_width(self.head_dim))]
        biases = [] if self.slopes is None else [self.slopes]
        views = View(together.stride, width), View(together.stride, width + kv_width)
        append = AppendKV(LAYERS, self.kv_heads, self.head_dim, *views, MAX_BLOCKS, self.dtype, self.rotary)
        alone = [sequences.count(sequence) == 1 for sequence in sequences]
        if not all(alone):
            cache = self.part("k"), self.part("v")
            call(append, tokens, buffer, buffer, *beyond, self.table, *tables, *cache, launched=tokens + 3)
        options = (
            LAYERS, self.heads, self.kv_heads, self.head_dim, self.scale, together, View(256, 5), MAX_BLOCKS, self.dtype,
            self.rotary, not self.rotary,
        )  # fmt: skip
        out = garbage((tokens + 3, 256))
        arrays = (*beyond, self.table, *tables, *biases, self.part("k"), self.part("v"), out)
        variants = AttendAlone(*options, *views, window=self.window).variants()
        attend = next(kernel for bound, kernel in variants if not bound or bound >= tokens)
        call(attend, tokens, buffer, buffer, buffer, *arrays, launched=tokens + 3)
        np.testing.assert_array_equal(np.isnan(out[:tokens, 5]), np.logical_not(alone))
        call(AttendRuns(*options, window=self.window), tokens, buffer, *arrays, launched=tokens + 3)
        np.testing.assert_allclose(
            taken(out, View(256, 5), tokens, width), expected, rtol=TOLERANCE[self.dtype], atol=TOLERANCE[self.dtype]
        )
        assert np.isnan(out[tokens:]).all()


@pytest.mark.parametrize("rotary", [True, False], ids=["rope", "alibi"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)], ids=str)
def test_prompts_then_decoding_then_both(heads: tuple[int, int], dtype: str, rotary: bool) -> None:
    model = Model(*heads, 16, dtype, rotary)
    model.step([*range(37), *range(5)], [0] * 37 + [2] * 5)
    model.step([37, 5], [0, 2])
    model.step([38, *range(21), 6], [0, *[1] * 21, 2])
    model.step([21], [1])


def test_a_long_context_is_split_and_put_together() -> None:
    """More tiles than parts, fewer, and a head dimension that is no power of two."""
    model = Model(4, 4, 24, "float16", True)
    for start in range(0, 180, 60):
        model.step(list(range(start, start + 60)), [1] * 60)
    kernel = AttendAlone(LAYERS, 4, 4, 24, 0.2, View(256), View(256), MAX_BLOCKS, "float16", True, False, View(256), View(256))
    assert 180 > kernel.tokens * 2 and MAX_BLOCKS * BLOCK_SIZE > 180
    model.step([180], [1])
    model.step([0, 181], [0, 1])


@pytest.mark.parametrize("window", [1, 20, 64, 130])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)], ids=str)
def test_tokens_before_the_window_are_not_seen(heads: tuple[int, int], window: int) -> None:
    model = Model(*heads, 16, "float16", True, window)
    for start in range(0, 180, 60):
        model.step([*range(start, start + 60), start // 60], [1] * 60 + [2])
    model.step([180, *range(3, 40)], [1, *[2] * 37])
    model.step([181, 182, 40], [1, 1, 2])
    model.step([183, 0], [1, 0])
