"""The kernel of adapters against its NumPy meaning: every row with the adapter of its sequence, and its bits its own."""

from __future__ import annotations

import numpy as np
import pytest

from belle_compile.compiler.backends.program.kernel import View
from belle_compile.compiler.backends.program.kernels import Columns
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.low_rank import LowRank
from belle_compile.compiler.ir import meanings
from belle_compile.runtime.adapters.blocks import NO_ROW, SIZES, adapter_blocks
from belle_compile.runtime.adapters.factors import AdapterMemory, Factors
from belle_compile.runtime.program import AdapterLayout
from tests.compiler.backends.tvm.harness import Array, Library, aligned, aligned_copy, ints, place

RANK, SLOTS = 6, 3
# Linears side by side in one result, each with its outputs; None for columns that no adapter changes
RESULTS: dict[str, tuple[int, dict[str | None, int]]] = {
    "one": (37, {"first": 20}),
    "several": (64, {"second": 100, None: 5, "third": 64, "fourth": 17}),
}
RANKS = {"first": (6, 0, 3), "second": (6, 0, 3), "third": (2, 5, 0), "fourth": (0, 0, 4)}  # of adapters in the slots; 0: none
ADAPTERS = (1, 0, -1, 2)  # the slot of each sequence's adapter
SEQUENCES = (0, 1, 1, 3, 2, 3, 1, 1, 1, 0, 0)


def layout(dtype: str) -> AdapterLayout:
    sizes = {name: (inputs, outputs) for inputs, parts in RESULTS.values() for name, outputs in parts.items() if name}
    return AdapterLayout.of(RANK, {name: (*size, dtype) for name, size in sizes.items()})


LAYOUTS = {planes: layout("float16" if planes else "float32") for planes in (0, 1, 2)}


def columns(result: str) -> dict[str, slice]:
    _, parts = RESULTS[result]
    return meanings.target_columns(",".join(name or "" for name in parts), np.array([*parts.values()]), sum(parts.values()))


def kernel(result: str, planes: int) -> LowRank:
    parts = Columns(tuple((part.start, part.stop - part.start) for part in columns(result).values()))
    x = View(planes * 128) if planes else View(192, 7)
    factors = "float16" if planes else "float32"
    return LowRank(parts, RESULTS[result][0], RANK, LAYOUTS[planes].slot_bytes, factors, x, View(256, 19), planes)


KERNELS = [kernel(result, planes) for result in RESULTS for planes in (0, 1, 2)]


@pytest.fixture(scope="module")
def library(isa: Isa) -> Library:
    return Library(KERNELS, isa)


def factors(target: str, slot: int, dtype: str = "float32") -> Factors | None:
    """Factors whose magnitudes differ from rank to rank; those of a and b are ones that `dtype` has."""
    region, rank = LAYOUTS[0].regions[target], RANKS[target][slot]
    random = np.random.default_rng([slot, region.inputs, region.outputs])
    shapes = (rank, region.inputs), (rank,), (region.outputs, rank)
    a, addend, b = (random.standard_normal(shape).astype(dtype).astype(np.float32) for shape in shapes)
    larger = np.float32(2) ** random.integers(-40, 40, rank).astype(np.float32)
    return Factors(a * larger[:, None], addend * larger, b / larger) if rank else None


class Loaded:
    def __init__(self, dtype: str) -> None:
        self._dtype = dtype

    def factors(self, sequence: int, target: str) -> Factors | None:
        slot = ADAPTERS[sequence]
        return factors(target, slot, self._dtype) if slot >= 0 else None


def run(library: Library, result: str, planes: int, rows: list[int], memory: Array, threads: int = 1) -> tuple[Array, Array]:
    """The result for some of the rows, in blocks as for so many threads, and what it should be."""
    called, count, places = kernel(result, planes), len(SEQUENCES), columns(result)
    (inputs, parts), sequences = RESULTS[result], np.array(SEQUENCES, np.int32)
    outputs = sum(parts.values())
    random = np.random.default_rng(5)
    limit = 127 if planes == 1 else 32_639
    xq, xs = random.integers(-limit, limit, (count, inputs)), random.random(count).astype(np.float32) / limit
    x, y = (random.standard_normal((count, width)).astype(np.float32) for width in (inputs, outputs))
    names, sizes = ",".join(name or "" for name in parts), np.array([*parts.values()])
    keywords = {"targets": names, "rank": RANK, "adapters": Loaded(called.factors)}
    if planes:
        high = (xq + 128) >> 8 if planes == 2 else xq
        bytes_of_x = np.zeros((count, planes, 128), np.uint8)
        bytes_of_x[:, 0, :inputs] = high + 128
        bytes_of_x[:, 1:, :inputs] = (xq - 256 * high + 128)[:, None]
        given = [aligned_copy(bytes_of_x.reshape(count, -1)[rows]), aligned_copy(xs[rows])]
        expected = meanings.quantized_low_rank(y, xq.astype(np.int16), xs, sequences, sizes, **keywords)
    else:
        given = [place(x[rows], called.x)]
        expected = meanings.low_rank(y, x, sequences, sizes, **keywords)
    out = place(y[rows], called.out)
    regions = [memory[LAYOUTS[planes].regions[target].offset :] for target in places]
    blocks = adapter_blocks(np.array(ADAPTERS, np.int32)[sequences[rows]], threads)
    where = ints(len(blocks), *blocks.reshape(-1)), ints(*sequences[rows]), ints(*ADAPTERS)
    library.call(called, ints(len(rows)), *given, *where, *regions, out)
    before, width = called.out.offset, outputs
    assert np.isnan(out[:, :before]).all() and np.isnan(out[:, before + width :]).all(), "nothing else is written"
    return out[:, before : before + width], expected[rows]


@pytest.mark.parametrize("planes", [0, 1, 2])
@pytest.mark.parametrize("result", sorted(RESULTS))
def test_rows_with_adapters(library: Library, result: str, planes: int) -> None:
    memory, dtype = aligned(SLOTS * LAYOUTS[planes].slot_bytes, np.uint8), "float16" if planes else "float32"
    slots = AdapterMemory(LAYOUTS[planes], memory)
    assert slots.count == SLOTS
    for slot in range(SLOTS):
        other = {name: Factors(*(9 * each for each in found)) for name in RANKS if (found := factors(name, 2))}
        slots.write(slot, other)
        slots.write(slot, {name: found for name in RANKS if (found := factors(name, slot, dtype))})  # nothing is left of those
    every = list(range(len(SEQUENCES)))
    found, expected = run(library, result, planes, every, memory)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    for threads in (2, 8):
        again, _ = run(library, result, planes, every, memory, threads)
        np.testing.assert_array_equal(again, found, err_msg="bits depend on the blocks")
    for row in every:
        alone, _ = run(library, result, planes, [row], memory)
        np.testing.assert_array_equal(alone[0], found[row], err_msg="bits depend on the other rows")


def test_blocks() -> None:
    slots = np.array([1, -1, 0, 1, 1, 1, 1, 0, 0, 1, 1, -1], np.int32)
    for threads in (1, 2, 3, 5, 100):
        blocks = adapter_blocks(slots, threads)
        assert sorted(blocks[blocks != NO_ROW].tolist()) == np.flatnonzero(slots >= 0).tolist()
        assert len(blocks) >= min(threads, 10)
        for block in blocks:
            rows = block[block != NO_ROW]
            assert len(rows) in SIZES and np.ptp(slots[rows]) == 0 and (block[len(rows) :] == NO_ROW).all()
    assert adapter_blocks(np.full(3, -1, np.int32), 2).shape[0] == 0


def test_targets_of_slots() -> None:
    slots = AdapterMemory(LAYOUTS[0], aligned(SLOTS * LAYOUTS[0].slot_bytes, np.uint8))
    first, second = factors("first", 0), factors("second", 2)
    assert first and second
    slots.write(0, {"first": first})
    slots.write(2, {"second": second})
    assert slots.targets(frozenset({0})) == {"first"} and slots.targets(frozenset({0, 2})) == {"first", "second"}
    slots.write(0, {"second": second})
    assert slots.targets(frozenset({0, 1})) == {"second"}
