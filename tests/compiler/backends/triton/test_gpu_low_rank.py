"""The kernels of adapters beside their NumPy meaning, interpreted: many sizes, ranks and mixtures, and the bits of each row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

pytest.importorskip("triton")

from belle_compile.compiler.backends.program.kernel import View
from belle_compile.compiler.backends.program.kernels import Columns
from belle_compile.compiler.backends.triton.kernels import low_rank
from belle_compile.compiler.backends.triton.kernels.low_rank import Shrink
from belle_compile.compiler.ir import meanings
from belle_compile.runtime.adapters.blocks import adapter_blocks
from belle_compile.runtime.adapters.factors import AdapterMemory, Factors
from belle_compile.runtime.program import AdapterLayout
from tests.compiler.backends.triton.harness import Array, call, garbage, place, taken

SLOTS = 3
PARTS = ("first", "second", "third")
# The largest rank, inputs, and outputs of the linears of one call, with columns between them that no adapter changes
SIZES: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "small": (1, 37, (20,)),
    "one": (16, 64, (192,)),
    "several chunks": (8, 600, (130,)),
    "more ranks than a program has": (40, 80, (64,)),
    "three linears": (20, 100, (128, 64, 7)),
}
BETWEEN = 6
ADAPTERS = (1, 0, -1, 2, 1)  # the slot of each sequence's adapter
MIXTURES: dict[str, tuple[int, ...]] = {  # the sequences of rows
    "every adapter and none": (0, 1, 1, 3, 2, 3, 1, 1, 1, 4, 2),
    "one": (1, 1, 1, 1, 1, 1, 1),
    "another one in each row": (0, 1, 3, 2),
    "no adapter": (2, 2, 2),
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that each goes through several blocks, and the interpreter has little to do."""
    monkeypatch.setattr(low_rank, "_BLOCKS", 2)


class Case:
    """Kernels for some sizes, with adapters of several ranks in memory and rows to add to."""

    def __init__(self, size: str, planes: int, rows: int = 11) -> None:
        random = np.random.default_rng([*size.encode(), planes])
        self.rank, inputs, outputs = SIZES[size]
        self.planes, factors = planes, "float16" if planes else "float32"
        names = PARTS[: len(outputs)]
        self.layout = AdapterLayout.of(self.rank, {name: (inputs, n, factors) for name, n in zip(names, outputs, strict=True)})
        ends = np.cumsum([count + BETWEEN for count in outputs])
        self.starts = [int(end) - count - BETWEEN for end, count in zip(ends, outputs, strict=True)]
        self.targets = ",".join(f"{name}," for name in names)[:-1] + ","
        self.widths = np.array([width for count in outputs for width in (count, BETWEEN)])
        stride = -(-inputs // 64) * 64
        x = View(planes * stride) if planes else View(stride + 64, 7)
        parts, slot = Columns(tuple(zip(self.starts, outputs, strict=True))), self.layout.slot_bytes
        self.kernel = Shrink(parts, inputs, self.rank, slot, factors, x, View(512, 19), planes)
        self.memory = np.zeros(SLOTS * slot, np.uint8)
        self.changes = [self._changes(random, slot) for slot in range(SLOTS)]
        slots = AdapterMemory(self.layout, self.memory)
        for number, changes in enumerate(self.changes):
            slots.write(number, {name: Factors(*(9 * each for each in change)) for name, change in self.changes[0].items()})
            slots.write(number, changes)  # nothing is left of the others
        limit = 127 if planes == 1 else 32_639
        self.xq, self.xs = random.integers(-limit, limit + 1, (rows, inputs)), random.random(rows).astype(np.float32) / limit
        self.x, self.y = (random.standard_normal((rows, count)).astype(np.float32) for count in (inputs, sum(self.widths)))

    def _changes(self, random: np.random.Generator, slot: int) -> dict[str, Factors]:
        """Factors of float16 values, whose magnitudes differ from rank to rank; the first slot has no change of the first
        linear, and the last one has the largest rank."""
        changes = {}
        for number, (name, region) in enumerate(self.layout.regions.items()):
            rank = self.rank if slot == SLOTS - 1 else min(self.rank, (slot + number) * 5)
            shapes = (rank, region.inputs), (rank,), (region.outputs, rank)
            a, addend, b = (random.standard_normal(shape).astype(np.float16).astype(np.float32) for shape in shapes)
            larger = np.float32(2) ** random.integers(-20, 20, rank).astype(np.float32)
            if rank:
                changes[name] = Factors(a * larger[:, None], addend * larger, b / larger)
        return changes

    def factors(self, sequence: int, target: str) -> Factors | None:
        slot = ADAPTERS[sequence]
        return self.changes[slot].get(target) if slot >= 0 else None

    def expected(self, sequences: Sequence[int], rows: Sequence[int]) -> Array:
        given = np.array(sequences, np.int32), self.widths
        keywords = {"targets": self.targets, "rank": self.rank, "adapters": self}
        x, y = self.x[rows], self.y[rows]
        if not self.planes:
            return meanings.low_rank(y, x, *given, **keywords)
        return meanings.quantized_low_rank(y, self.xq[rows].astype(np.int16), self.xs[rows], *given, **keywords)

    def run(self, sequences: Sequence[int], rows: Sequence[int], threads: int = 1) -> Array:
        """The rows after both kernels, in blocks as for so many threads."""
        inputs, kernel = self.kernel.inputs, self.kernel
        if self.planes:
            high = (self.xq[rows] + 128) >> 8 if self.planes == 2 else self.xq[rows]
            buffer = garbage((len(rows), kernel.x.stride), np.int8)
            for plane, part in enumerate((high, self.xq[rows] - 256 * high)[: self.planes]):
                start = plane * kernel.x.stride // self.planes
                buffer[:, start : start + inputs] = part
            given = [buffer, self.xs[rows]]
        else:
            given = [place(self.x[rows], kernel.x)]
        blocks = adapter_blocks(np.array(ADAPTERS, np.int32)[list(sequences)], threads)
        where = [np.array([len(blocks), *blocks.reshape(-1)], np.int32), np.array(sequences, np.int32)]
        where.append(np.array(ADAPTERS, np.int32))
        regions = [self.memory[region.offset :].view(np.float32) for region in self.layout.regions.values()]
        sums, out = garbage((len(rows), kernel.sums.stride)), place(self.y[rows], kernel.out)
        call(kernel, len(rows), *given, *where, *regions, sums)
        call(kernel.expand(), len(rows), *where, *regions, sums, out)
        found = taken(out, kernel.out, len(rows), self.y.shape[1]).copy()
        out[:, kernel.out.offset : kernel.out.offset + self.y.shape[1]] = np.nan
        assert np.isnan(out).all(), "something else was written"
        return found


@pytest.mark.parametrize("planes", [0, 1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_rows_are_changed_by_the_adapters_of_their_sequences(size: str, planes: int) -> None:
    case = Case(size, planes)
    for name, sequences in MIXTURES.items():
        rows = list(range(len(sequences)))
        found, expected = case.run(sequences, rows), case.expected(sequences, rows)
        scale = np.abs(expected - case.y[rows]).max() + 1
        np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=2e-6, err_msg=name)
        unchanged = [row for row in rows if ADAPTERS[sequences[row]] < 0]
        np.testing.assert_array_equal(found[unchanged], case.y[unchanged])


@pytest.mark.parametrize("planes", [0, 1])
@pytest.mark.parametrize("size", ["several chunks", "three linears"])
def test_bits_of_a_row_do_not_depend_on_other_rows(size: str, planes: int) -> None:
    case, sequences = Case(size, planes), MIXTURES["every adapter and none"]
    rows = list(range(len(sequences)))
    together = case.run(sequences, rows)
    np.testing.assert_array_equal(case.run(sequences, rows, threads=8), together, err_msg="other blocks")
    for row in (0, 2, 4, 9):
        np.testing.assert_array_equal(case.run(sequences[row : row + 1], [row])[0], together[row])
    backwards = case.run(sequences[::-1], rows[::-1])
    np.testing.assert_array_equal(backwards[::-1], together)
