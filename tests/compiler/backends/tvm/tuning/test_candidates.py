"""Every candidate of the search computes the same exact integers, with its sums in registers."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from belle_compile.compiler.backends.program.lowering import pack_vector
from belle_compile.compiler.backends.tvm import packing
from belle_compile.compiler.backends.tvm.isa import AMX, AVX2, AVX512VNNI, Isa
from belle_compile.compiler.backends.tvm.kernels.tiling import LinearTiling, Walk
from belle_compile.compiler.backends.tvm.library import compile_functions, compile_library
from belle_compile.compiler.backends.tvm.tuning import candidates
from belle_compile.compiler.ir import meanings
from belle_compile.runtime.executors.native import CallList, KernelLibrary, ThreadPool
from tests.compiler.backends.tvm.harness import HOST_ISAS, Library, aligned_copy, ints
from tests.compiler.backends.tvm.test_linear import CAPACITY, ISAS, integers, quantized, run_quantized, tokens

SHAPE = (200, 200)  # 13 panels: a last group that is not full for every width, and tasks that are not
ROWS = (1, 3, 8, 17)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("isa", HOST_ISAS, ids=lambda isa: isa.name)
def test_every_candidate_is_exact(isa: Isa, planes: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    wq = rng.integers(-127, 128, SHAPE).astype(np.int8)
    wq[0], wq[1] = 127, -127
    ones = aligned_copy(np.ones(CAPACITY, np.float32))
    scale = aligned_copy(pack_vector(np.ones(SHAPE[0], np.float32)))
    packed, correction = aligned_copy(packing.pack_int8(wq)), aligned_copy(pack_vector(packing.correction(wq)))
    kernel = quantized(*SHAPE, False, planes)
    # Blocks for the row counts of this test only, which is what the search compiles, too.
    tilings = [LinearTiling(((None, walk),), trial_rows=ROWS) for walk in _walks(isa, planes)]
    functions = {f"f{i}": replace(kernel, tiling=tiling).build(isa, f"f{i}") for i, tiling in enumerate(tilings)}
    path = tmp_path / "kernels.so"
    path.write_bytes(compile_functions(functions, isa))
    library = KernelLibrary(path)
    pool = ThreadPool(library, 2)
    for rows in ROWS:
        xq = integers(rng, planes, rows, SHAPE[1])
        stored, expected = tokens(xq), meanings.integer_linear(xq, wq).astype(np.float32)
        for i, tiling in enumerate(tilings):
            out = aligned_copy(np.full((CAPACITY, kernel.out.stride), np.nan, np.float32))
            arrays = (ints(rows), stored, ones, packed, scale, correction, out)
            CallList(pool, [(library.address(f"f{i}"), [array.ctypes.data for array in arrays])]).run()
            np.testing.assert_array_equal(out[:rows, : SHAPE[0]], expected, err_msg=f"{rows} rows, {tiling}")


def _walks(isa: Isa, planes: int) -> list[Walk]:
    """Every block, and every change to a bucket's last block. How far a prefetch reaches changes no result, and slices of the
    inputs are shortened to the test's."""
    buckets = candidates.buckets(isa, planes, 512)
    blocks = [walk for bucket in buckets for walk in bucket.first()]
    changed = [walk for b in buckets for stage in range(len(b.stages)) for walk in b.following(stage, b.first()[-1])]
    changed += [Walk(4, 1, 1024, chain=True, unroll=2, places=places) for places in (4, 8)] if isa.dot == "vnni" else []
    same = [replace(walk, prefetch=walk.prefetch and 1024, depth=walk.depth and 128) for walk in (*blocks, *changed)]
    return list(dict.fromkeys(same))


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_buckets_and_tiles_meet_without_gap(isa: Isa, planes: int) -> None:
    rng = np.random.default_rng(1)
    wq, none = rng.integers(-127, 128, SHAPE).astype(np.int8), np.zeros(SHAPE[0], np.float32)
    walks = ((1, Walk(8, 1)), (4, Walk(2, 3)), (8, Walk(3, 4, depth=64)), (None, Walk(2, 2, task_groups=3, row_blocks=2)))
    for tiles_from in (1, 5, 9, 12, 1 << 20) if isa.amx else (16,):
        tiling = LinearTiling(walks, tiles_from=tiles_from)
        kernel = replace(quantized(*SHAPE, planes=planes), tiling=tiling)
        assert kernel.name == quantized(*SHAPE, planes=planes).name
        library = Library([kernel], isa)
        for rows in (1, 2, 4, 5, 8, 9, 11, 12, 50):
            xq = integers(rng, planes, rows, SHAPE[1])
            got = run_quantized(library, kernel, xq, np.ones(rows, np.float32), wq, none + 1, none)
            np.testing.assert_array_equal(got, meanings.integer_linear(xq, wq).astype(np.float32), err_msg=f"{rows} rows")


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("outputs, inputs", [(200, 200), (16, 64), (40, 3000), (96, 577)])
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa.amx], ids=lambda isa: isa.name)
def test_every_order_of_tiles_is_exact(isa: Isa, outputs: int, inputs: int, planes: int) -> None:
    """Fewer panels than are taken at a time, groups and rows that are not full, fewer and more steps than rows to finish."""
    rng = np.random.default_rng(2)
    wq, none = rng.integers(-127, 128, (outputs, inputs)).astype(np.int8), np.zeros(outputs, np.float32)
    walks = ((None, Walk(1, 1)),)
    for wide, panels in candidates.TILES:
        tiling = LinearTiling(walks, tiles_from=1, tile_wide=wide, tile_panels=panels)
        kernel = replace(quantized(outputs, inputs, planes=planes), tiling=tiling)
        library = Library([kernel], isa)
        for rows in (1, 16, 33, 50, 64):
            xq = integers(rng, planes, rows, inputs)
            got = run_quantized(library, kernel, xq, np.ones(rows, np.float32), wq, none + 1, none)
            np.testing.assert_array_equal(got, meanings.integer_linear(xq, wq).astype(np.float32), err_msg=f"{rows} rows")


def test_few_panels_are_not_tasks_of_many() -> None:
    """What two threads do not mind leaves others of more threads without work."""
    for walk, panels, good in (
        (Walk(8, 1), 36, True),
        (Walk(16, 1), 36, False),
        (Walk(16, 1), 241, True),
        (Walk(4, 1, task_groups=4), 160, False),
        (Walk(2, 8, task_groups=32, row_blocks=16), 36, True),  # prefill: for its caches
    ):
        assert candidates.leaves_tasks(walk, panels) is good, walk


def test_one_group_can_be_interleaved() -> None:
    """A parallel loop of one task is no loop to TVM."""
    kernel = replace(quantized(16, 64), tiling=LinearTiling(((None, Walk(1, 1, interleave=True)),)))
    assert compile_library([kernel], AVX2)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("isa", [AVX2, AVX512VNNI], ids=lambda isa: isa.name)
def test_candidates_keep_their_sums_in_registers(isa: Isa, planes: int, tmp_path: Path) -> None:
    """The inner loops touch no vector on the stack. Those of other blocks than the first stage's differ by few instructions."""
    blocks = {(bucket.first()[0].prefetch, block) for bucket in candidates.buckets(isa, planes, 512) for block in bucket.blocks}
    kernel, functions = quantized(16 * 24, 256, False, planes), {}
    for number, (prefetch, (wide, tall)) in enumerate(sorted(blocks)):
        tiling = LinearTiling(((None, Walk(wide, tall, prefetch)),), trial_rows=(tall,))
        functions[f"f{number}"] = replace(kernel, tiling=tiling).build(isa, f"f{number}")
    path = tmp_path / "kernels.so"
    path.write_bytes(compile_functions(functions, isa))
    loops = inner_loops(path, "vpdpbusd" if isa.dot == "vnni" else "vpmaddubsw")
    assert len(loops) >= len(functions)
    for loop in loops:
        assert not [line for line in loop if re.search(r"\(%rsp\)", line) and re.search("%[yz]mm", line)], "\n".join(loop)


def inner_loops(library: Path, instruction: str) -> list[list[str]]:
    """The instructions of every innermost loop that holds `instruction`."""
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(library)], capture_output=True, text=True, check=True
    ).stdout
    code = [(int(found[1], 16), found[2]) for found in re.finditer(r"^\s+([0-9a-f]+):\s+(.*)$", text, re.M)]
    places, loops = {address: index for index, (address, _) in enumerate(code)}, []
    for index, (address, line) in enumerate(code):
        jump = re.match(r"j\w+\s+([0-9a-f]+)", line)
        start = places.get(int(jump[1], 16), index) if jump and int(jump[1], 16) < address else index
        body = [text for _, text in code[start:index]]
        if any(instruction in text for text in body) and not any(re.match("j|ret", text) for text in body):
            loops.append(body)
    return loops


def test_buckets_cover_every_row_count() -> None:
    for isa in (AVX2, AVX512VNNI, AMX):
        for most in (64, 512):
            buckets = candidates.buckets(isa, 1, most)
            assert buckets[-1].most is None and all(row <= most for bucket in buckets for row in bucket.rows)
            for before, bucket in itertools.pairwise(buckets):
                assert before.most is not None and max(before.rows) <= before.most < min(bucket.rows)
        for bucket in candidates.buckets(isa, 2, 512):
            assert max(wide * tall for wide, tall in bucket.blocks) * 2 <= (4 if isa is AVX2 else 24)
            assert not any("depth" in change for stage in bucket.stages for change in stage)
