"""The kernel of adapters against its NumPy meaning: every row with the adapter of its sequence, and its bits its own."""

from __future__ import annotations

import numpy as np
import pytest

from belle_compile.compiler.backends.program.kernel import View
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.low_rank import LowRank
from belle_compile.compiler.ir import meanings
from belle_compile.runtime.adapters.factors import AdapterMemory, Factors
from belle_compile.runtime.program import AdapterLayout
from tests.compiler.backends.tvm.harness import Array, Library, aligned, aligned_copy, ints, place

RANK, SLOTS = 6, 3
SIZES = {"first": (37, 20), "second": (64, 100)}  # inputs and outputs
LAYOUT = AdapterLayout.of(RANK, SIZES)
RANKS = (6, 0, 3)  # of the adapters in the slots; 0: none for this linear
ADAPTERS = (1, 0, -1, 2)  # the slot of each sequence's adapter
SEQUENCES = (0, 1, 1, 3, 2, 3, 1)


def kernel(target: str, planes: int) -> LowRank:
    inputs, outputs = SIZES[target]
    x = View(planes * 128) if planes else View(192, 7)
    return LowRank(outputs, inputs, RANK, LAYOUT.slot_bytes // 4, x, View(256, 19), planes)


KERNELS = [kernel(target, planes) for target in SIZES for planes in (0, 1, 2)]


@pytest.fixture(scope="module")
def library(isa: Isa) -> Library:
    return Library(KERNELS, isa)


def factors(target: str, slot: int) -> Factors | None:
    inputs, outputs = SIZES[target]
    random, rank = np.random.default_rng([slot, inputs]), RANKS[slot]
    arrays = [random.standard_normal(shape).astype(np.float32) for shape in ((rank, inputs), rank, (outputs, rank))]
    return Factors(*arrays) if rank else None


class Loaded:
    def factors(self, sequence: int, target: str) -> Factors | None:
        slot = ADAPTERS[sequence]
        return factors(target, slot) if slot >= 0 else None


def run(library: Library, target: str, planes: int, rows: list[int], memory: Array) -> tuple[Array, Array]:
    """The result for some of the rows, and what it should be."""
    (inputs, outputs), count = SIZES[target], len(SEQUENCES)
    random = np.random.default_rng(5)
    limit = 127 if planes == 1 else 32_639
    xq, xs = random.integers(-limit, limit, (count, inputs)), random.random(count).astype(np.float32) / limit
    x, y = (random.standard_normal((count, width)).astype(np.float32) for width in (inputs, outputs))
    called, sequences = kernel(target, planes), np.array(SEQUENCES, np.int32)
    if planes:
        high = (xq + 128) >> 8 if planes == 2 else xq
        parts = np.zeros((count, planes, 128), np.uint8)
        parts[:, 0, :inputs] = high + 128
        parts[:, 1:, :inputs] = (xq - 256 * high + 128)[:, None]
        given = [aligned_copy(parts.reshape(count, -1)[rows]), aligned_copy(xs[rows])]
        expected = meanings.quantized_low_rank(
            y, xq.astype(np.int16), xs, sequences, target=target, rank=RANK, adapters=Loaded()
        )
    else:
        given = [place(x[rows], called.x)]
        expected = meanings.low_rank(y, x, sequences, target=target, rank=RANK, adapters=Loaded())
    out = place(y[rows], called.out)
    region = memory[LAYOUT.regions[target].offset :]
    slots = np.array(ADAPTERS)[sequences[rows]]
    adapted = [int(row) for row in np.argsort(slots, kind="stable") if slots[row] >= 0]
    where = ints(len(adapted), *adapted), ints(*sequences[rows]), ints(*ADAPTERS)
    library.call(called, ints(len(rows)), *given, *where, region, out)
    before, width = called.out.offset, outputs
    assert np.isnan(out[:, :before]).all() and np.isnan(out[:, before + width :]).all(), "nothing else is written"
    return out[:, before : before + width], expected[rows]


@pytest.mark.parametrize("planes", [0, 1, 2])
@pytest.mark.parametrize("target", sorted(SIZES))
def test_rows_with_adapters(library: Library, target: str, planes: int) -> None:
    memory = aligned(SLOTS * LAYOUT.slot_bytes, np.uint8)
    slots = AdapterMemory(LAYOUT, memory)
    assert slots.count == SLOTS
    for slot in range(SLOTS):
        slots.write(slot, {name: Factors(*(9 * each for each in found)) for name in SIZES if (found := factors(name, 0))})
        slots.write(slot, {name: found for name in SIZES if (found := factors(name, slot))})  # nothing is left of the first
    every = list(range(len(SEQUENCES)))
    found, expected = run(library, target, planes, every, memory)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    for row in every:
        alone, _ = run(library, target, planes, [row], memory)
        np.testing.assert_array_equal(alone[0], found[row], err_msg="bits depend on the other rows")


def test_targets_of_slots() -> None:
    slots = AdapterMemory(LAYOUT, aligned(SLOTS * LAYOUT.slot_bytes, np.uint8))
    first, second = factors("first", 0), factors("second", 2)
    assert first and second
    slots.write(0, {"first": first})
    slots.write(2, {"second": second})
    assert slots.targets(frozenset({0})) == {"first"} and slots.targets(frozenset({0, 2})) == {"first", "second"}
    slots.write(0, {"second": second})
    assert slots.targets(frozenset({0, 1})) == {"second"}
