"""Kernels that treat each row on its own, against their NumPy meanings."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from belle_compile.compiler.backends.program.kernel import View
from belle_compile.compiler.backends.program.lowering import pack_vector
from belle_compile.compiler.backends.tvm.isa import AVX2, AVX512VNNI, Isa
from belle_compile.compiler.backends.tvm.kernels.activation import Activation
from belle_compile.compiler.backends.tvm.kernels.base import Kernel, rows_apart
from belle_compile.compiler.backends.tvm.kernels.embedding import FloatEmbedding, QuantizedEmbedding
from belle_compile.compiler.backends.tvm.kernels.hadamard import BlockHadamard
from belle_compile.compiler.backends.tvm.kernels.norm import HeadNorm, Norm
from belle_compile.compiler.backends.tvm.kernels.quantize import QuantizeTokens
from belle_compile.compiler.backends.tvm.kernels.rotary import RotaryTable
from belle_compile.compiler.backends.tvm.kernels.rows import Add, GatherRows
from belle_compile.compiler.backends.tvm.library import compile_library
from belle_compile.compiler.backends.tvm.packing import pack_float, pack_int8
from belle_compile.compiler.ir import meanings
from tests.compiler.backends.tvm.harness import Array, Library, aligned_copy, garbage, ints, place
from tests.compiler.backends.tvm.tuning.test_candidates import inner_loops

WIDTHS = (5, 37, 64, 176)
PLANES = {5: (1,), 37: (1, 2), 64: (1,), 176: (1, 2)}  # of quantized results of each width, to save compiling some
ROWS = (1, 7)
VOCAB = 37


def own(width: int) -> View:
    return View.of_width(width)


def part(width: int) -> View:
    """A view into a wider row, at an offset that is no multiple of anything."""
    return View(own(2 * width + 3).stride, width + 3)


def quantized(width: int, planes: int) -> View:
    """Rows of one or two planes of bytes."""
    return View(planes * own(width).stride)


def norm(kind: str, width: int, *, add: bool, planes: int = 0, total: bool = True, step: bool = False) -> Norm:
    """A norm with a float result, or a quantized one of 1 or 2 planes."""
    view, out = own(width), quantized(width, planes or 1)
    return Norm(kind, width, 1e-5, kind == "layer", planes > 0, part(width), view if add else None,
                view if add and total else None, out, planes or 1, step)  # fmt: skip


def activation(function: str, width: int, planes: int = 0, hadamard: int | None = None, step: bool = False) -> Activation:
    swiglu = function == "swiglu"
    x = View(own(2 * width).stride)
    up, out = View(x.stride, width) if swiglu else None, quantized(width, planes or 1)
    return Activation(function, width, planes > 0, x, up, out, planes or 1, hadamard, step)


def block_hadamard(width: int, block: int) -> BlockHadamard:
    return BlockHadamard(width, block, part(width), own(width))


def quantize_tokens(width: int, planes: int, step: bool = False) -> QuantizeTokens:
    return QuantizeTokens(width, part(width), quantized(width, planes), planes, step)


NORMS = [norm(kind, width, add=add, planes=planes) for kind in ("layer", "rms") for width in WIDTHS for add in (False, True)
         for planes in (0, *PLANES[width])]  # fmt: skip
HEAD_NORMS = [HeadNorm(3 * head_dim, head_dim, 1e-3, part(3 * head_dim), own(3 * head_dim)) for head_dim in (5, 16, 72)]
SUM_UNUSED = norm("rms", 37, add=True, total=False)
ACTIVATIONS = [activation(f, width, planes) for f in ("gelu", "swiglu") for width in WIDTHS for planes in (0, *PLANES[width])]
# (width, block): one vector, one visit to memory, two and three; some of them several blocks
HADAMARDS = [(176, 16), (96, 32), (64, 64), (384, 128), (1536, 512)]
ROTATED = [activation(f, width, planes, block) for f in ("gelu", "swiglu") for width, block in (HADAMARDS[0], HADAMARDS[-1])
           for planes in (1, 2)]  # fmt: skip
STATIC = [(quantize_tokens(37, planes, step=True), norm("rms", 37, add=True, planes=planes, step=True),
           activation("gelu", 37, planes, step=True), activation("swiglu", 96, planes, 32, step=True))
          for planes in (1, 2)]  # fmt: skip
ROTARIES = [RotaryTable(8, 1.0, 0.0, 2048, 10000.0), RotaryTable(40, 1.25, 0.0, 2048, 10000.0),
            RotaryTable(64, 1.0, 2.0, 100, 10000.0)]  # fmt: skip
KERNELS: list[Kernel] = [
    *NORMS, *HEAD_NORMS, SUM_UNUSED, *ACTIVATIONS, *ROTATED, *ROTARIES, *STATIC[0], *STATIC[1], activation("swiglu", 96),
    *[activation(kernel.activation, kernel.width) for kernel in ROTATED],
    *[block_hadamard(*shape) for shape in HADAMARDS],
    *[quantize_tokens(width, planes) for width in WIDTHS for planes in (1, 2)],
    *[GatherRows(width, part(width), own(width)) for width in WIDTHS],
    *[Add(width, part(width), own(width), own(width)) for width in WIDTHS],
    *[FloatEmbedding(VOCAB, width, own(width)) for width in WIDTHS],
    *[QuantizedEmbedding(VOCAB, width, own(width)) for width in WIDTHS],
    FloatEmbedding(VOCAB, 37, own(37), partial=True), QuantizedEmbedding(VOCAB, 37, own(37), partial=True),
]  # fmt: skip


@pytest.fixture(scope="module")
def library(isa: Isa) -> Library:
    return Library(KERNELS, isa)


def values(rows: int, width: int, seed: int = 0) -> Array:
    """Rows of different magnitude; from three rows on, one of zeros and one with halves that must round to even."""
    generator = np.random.default_rng(seed)
    magnitude = 10.0 ** generator.integers(-3, 3, (rows, 1))
    x: Array = (generator.standard_normal((rows, width)) * magnitude).astype(np.float32)
    if rows >= 3:
        x[1] = 0
        x[2] = generator.integers(-126, 126, width) + 0.5
        x[2, 0] = 127
    return x


def assert_quantized(xq: Array, xs: Array, x: Array, planes: int, step: Array | None = None) -> None:
    """The integers and scales are exactly those of NumPy for these floats."""
    expected_xq, expected_xs = meanings.quantize_tokens(x, step, bits=8 * planes)
    parts = xq.astype(np.int32).reshape(len(xq), planes, -1)[:, :, : x.shape[1]] - 128
    np.testing.assert_array_equal(parts[:, 0] if planes == 1 else 256 * parts[:, 0] + parts[:, 1], expected_xq)
    assert parts[:, 0].min() >= -127, "the kernels count on it"
    np.testing.assert_array_equal(xs, expected_xs)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
def test_quantize_tokens_is_exact(library: Library, width: int, rows: int, planes: int) -> None:
    kernel = quantize_tokens(width, planes)
    x = values(rows, width)
    xq, xs = garbage((rows, kernel.out.stride), np.uint8), garbage(rows)
    library.call(kernel, ints(rows), place(x, kernel.x), xq, xs)
    assert_quantized(xq, xs, x, planes)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("which", range(4))
def test_one_step_for_all_tokens(library: Library, planes: int, which: int) -> None:
    """Exactly NumPy's integers for the floats that the kernel without quantization gives, some of them clipped."""
    kernel, rows = STATIC[planes - 1][which], 7
    x, r, scale = values(rows, kernel.width), values(rows, kernel.width, 1), np.ones(kernel.width, np.float32)
    buffers = [ints(rows), place(x, kernel.x)]
    if isinstance(kernel, Norm):
        buffers += [place(r, own(37)), aligned_copy(pack_vector(scale)), garbage((rows, 64))]
        plain: Kernel = norm("rms", 37, add=True)
    elif isinstance(kernel, Activation):
        buffers += [place(x, kernel.x)] if kernel.up else []
        if kernel.up:
            buffers[1] = buffers[2] = place(np.concatenate([x, r], axis=1), View(kernel.x.stride))
        plain = activation(kernel.activation, kernel.width)
    out = garbage((rows, own(kernel.width).stride))
    if not isinstance(kernel, QuantizeTokens):
        library.call(plain, *buffers, out)
    floats = x if isinstance(kernel, QuantizeTokens) else out[:, : kernel.width]
    if isinstance(kernel, Activation) and kernel.hadamard:
        floats = meanings.block_hadamard(floats, block=kernel.hadamard)
    step = np.array([np.abs(floats).max() / 3 / meanings.LIMITS[8 * planes]], np.float32)
    xq, xs = garbage((rows, kernel.out.stride), np.uint8), garbage(rows)
    library.call(kernel, *buffers, aligned_copy(pack_vector(step)), xq, xs)
    assert_quantized(xq, xs, floats, planes, step)


def test_quantize_tokens_of_16_bits_at_the_ends_of_its_range(library: Library) -> None:
    """Integers whose low byte is -128 or 127, and the largest."""
    limit = meanings.LIMITS[16]
    x = np.array([[limit, -limit, 127, 128, -128, -129, 256 * -126 - 128, 0.5, 1.5, *[0] * 28]], np.float32)
    kernel = quantize_tokens(37, 2)
    xq, xs = garbage((1, kernel.out.stride), np.uint8), garbage(1)
    library.call(kernel, ints(1), place(x, kernel.x), xq, xs)
    assert_quantized(xq, xs, x, 2)
    high, low = xq.reshape(2, -1)[:, :9].astype(int) - 128
    assert high.tolist() == [127, -127, 0, 1, 0, -1, -126, 0, 0]
    assert low.tolist() == [127, -127, 127, -128, -128, 127, -128, 0, 2]


@pytest.mark.parametrize("kernel", [k for k in NORMS if not k.quantize], ids=lambda k: k.name)
@pytest.mark.parametrize("rows", ROWS)
def test_norm(library: Library, kernel: Norm, rows: int) -> None:
    width = kernel.width
    x, r = values(rows, width), values(rows, width, 1)
    scale, bias = values(1, width, 2)[0], values(1, width, 3)[0]
    total = x + r if kernel.r else x
    parts = [place(r, kernel.r)] if kernel.r else []
    outs = [garbage((rows, kernel.total.stride))] if kernel.total else []
    out = garbage((rows, kernel.out.stride))
    weights = [pack_vector(w) for w in ([scale, bias] if kernel.bias else [scale])]
    library.call(kernel, ints(rows), place(x, kernel.x), *parts, *map(aligned_copy, weights), *outs, out)
    expected = meanings.norm(total, scale, bias if kernel.bias else None, kind=kernel.norm, epsilon=kernel.epsilon)
    np.testing.assert_allclose(out[:, :width], expected, rtol=5e-6, atol=5e-6 * np.abs(expected).max())
    for written in outs:
        np.testing.assert_array_equal(written[:, :width], total)
    if rows > 1 and kernel.r is None:
        return
    for planes in PLANES[width]:
        quantizing = norm(kernel.norm, width, add=kernel.r is not None, planes=planes)
        xq, xs = garbage((rows, quantizing.out.stride), np.uint8), garbage(rows)
        library.call(quantizing, ints(rows), place(x, kernel.x), *parts, *map(aligned_copy, weights), *outs, xq, xs)
        assert_quantized(xq, xs, out[:, :width], planes)


@pytest.mark.parametrize("kernel", HEAD_NORMS, ids=lambda k: k.name)
@pytest.mark.parametrize("rows", ROWS)
def test_norm_of_each_head(library: Library, kernel: HeadNorm, rows: int) -> None:
    x, scale = values(rows, kernel.width), values(1, kernel.head_dim, 2)[0]
    out = garbage((rows, kernel.out.stride))
    library.call(kernel, ints(rows), place(x, kernel.x), aligned_copy(pack_vector(scale)), out)
    expected = meanings.head_norm(x, scale, epsilon=kernel.epsilon)
    np.testing.assert_allclose(out[:, : kernel.width], expected, rtol=5e-6, atol=5e-6 * np.abs(expected).max())


def test_norm_in_place_and_with_an_unused_sum(library: Library) -> None:
    """`total` may be the memory of r; and may be left out."""
    kernel, rows = norm("rms", 37, add=True), 7
    x, r, scale = values(rows, 37), values(rows, 37, 1), values(1, 37, 2)[0]
    stream, out, other = place(r, own(37)), garbage((rows, 64)), garbage((rows, 64))
    library.call(kernel, ints(rows), place(x, kernel.x), stream, aligned_copy(pack_vector(scale)), stream, out)
    np.testing.assert_array_equal(stream[:, :37], x + r)
    library.call(SUM_UNUSED, ints(rows), place(x, kernel.x), place(r, own(37)), aligned_copy(pack_vector(scale)), other)
    np.testing.assert_array_equal(out[:, :37], other[:, :37])


@pytest.mark.parametrize("kernel", [k for k in ACTIVATIONS if not k.quantize], ids=lambda k: k.name)
@pytest.mark.parametrize("rows", ROWS)
def test_activation(library: Library, kernel: Activation, rows: int) -> None:
    width = kernel.width
    both = values(rows, 2 * width)
    both[0, : min(width, 8)] = [-1e4, 1e4, -90, 90, 0, -20, -5, 3][: min(width, 8)]  # where exp would overflow
    x, up = both[:, :width], both[:, width:]
    buffers = [place(both, View(kernel.x.stride))] * (2 if kernel.up else 1)
    out = garbage((rows, kernel.out.stride))
    library.call(kernel, ints(rows), *buffers, out)
    expected = meanings.swiglu(x, up) if kernel.up else meanings.gelu(x)
    np.testing.assert_allclose(out[:, :width], expected, rtol=1e-6, atol=2e-6)
    for planes in PLANES[width]:
        quantizing = activation(kernel.activation, width, planes)
        xq, xs = garbage((rows, quantizing.out.stride), np.uint8), garbage(rows)
        library.call(quantizing, ints(rows), *buffers, xq, xs)
        assert_quantized(xq, xs, out[:, :width], planes)


@pytest.mark.parametrize(("width", "block"), HADAMARDS)
@pytest.mark.parametrize("rows", ROWS)
def test_block_hadamard_is_exact(library: Library, width: int, block: int, rows: int) -> None:
    kernel = block_hadamard(width, block)
    x, out = values(rows, width), garbage((rows, kernel.out.stride))
    library.call(kernel, ints(rows), place(x, kernel.x), out)
    np.testing.assert_array_equal(out[:, :width], meanings.block_hadamard(x, block=block))
    assert np.isnan(out[:, width:]).all()


@pytest.mark.parametrize("kernel", ROTATED, ids=lambda k: k.name)
@pytest.mark.parametrize("rows", ROWS)
def test_activation_with_hadamard(library: Library, kernel: Activation, rows: int) -> None:
    """Exactly the meaning's, for the floats that the activation alone gives."""
    plain, width = activation(kernel.activation, kernel.width), kernel.width
    buffers = [place(values(rows, 2 * width), View(kernel.x.stride))] * (2 if kernel.up else 1)
    out = garbage((rows, plain.out.stride))
    library.call(plain, ints(rows), *buffers, out)
    xq, xs = garbage((rows, kernel.out.stride), np.uint8), garbage(rows)
    library.call(kernel, ints(rows), *buffers, xq, xs)
    assert kernel.hadamard is not None
    assert_quantized(xq, xs, meanings.block_hadamard(out[:, :width], block=kernel.hadamard), kernel.planes)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.parametrize("isa", [AVX2, AVX512VNNI], ids=lambda isa: isa.name)
def test_hadamard_loops_are_vectors_in_registers(isa: Isa, tmp_path: Path) -> None:
    path = tmp_path / "kernels.so"
    path.write_bytes(compile_library([block_hadamard(1536, 512)], isa))
    loops = inner_loops(path, "vsubps")
    assert len(loops) >= 2
    for loop in loops:
        spills = [line for line in loop if "(%rsp)" in line and re.search("%[xyz]mm", line) and "mov" in line]
        scalars = [line for line in loop if re.match(r"v(add|sub|mul|fm\w+)ss", line)]
        assert not spills and len(scalars) <= 4, "\n".join(loop)  # the signs of a group are two scalars


@pytest.mark.parametrize("width", WIDTHS)
def test_gather_and_add(library: Library, width: int) -> None:
    x, r = values(9, width), values(9, width, 1)
    gather, add = GatherRows(width, part(width), own(width)), Add(width, part(width), own(width), own(width))
    out = garbage((9, own(width).stride))
    library.call(gather, ints(3), ints(8, 0, 5), place(x, gather.x), out)
    np.testing.assert_array_equal(out[:3, :width], x[[8, 0, 5]])
    assert np.isnan(out[3:]).all()
    library.call(add, ints(9), place(x, add.x), place(r, add.r), out)
    np.testing.assert_array_equal(out[:, :width], x + r)


@pytest.mark.parametrize("width", WIDTHS)
def test_embeddings_read_the_tables_of_the_linear_layers(library: Library, width: int) -> None:
    table, tokens = values(VOCAB, width), ints(0, 36, 15, 16, 5)
    out = garbage((5, own(width).stride))
    library.call(FloatEmbedding(VOCAB, width, own(width)), ints(5), tokens, aligned_copy(pack_float(table)), out)
    np.testing.assert_array_equal(out[:, :width], table[tokens])
    wq = np.random.default_rng(0).integers(-127, 128, (VOCAB, width), np.int8)
    ws = np.random.default_rng(1).random(VOCAB, np.float32)
    kernel = QuantizedEmbedding(VOCAB, width, own(width))
    library.call(kernel, ints(5), tokens, aligned_copy(pack_int8(wq)), aligned_copy(pack_vector(ws)), out)
    np.testing.assert_array_equal(out[:, :width], meanings.quantized_embedding(tokens, wq, ws))


def test_embeddings_of_some_tokens_give_zeros_for_others(library: Library) -> None:
    width, first = 37, ints(100, *[0] * 15)
    tokens = ints(99, 100, 136, 137, 0, 2**31 - 1)
    table, out = values(VOCAB, width), garbage((6, own(width).stride))
    kernel = FloatEmbedding(VOCAB, width, own(width), partial=True)
    library.call(kernel, ints(6), tokens, aligned_copy(pack_float(table)), first, out)
    np.testing.assert_array_equal(out[:, :width], meanings.embedding(tokens, table, first[:1]))
    np.testing.assert_array_equal(out[1:3, :width], table[[0, 36]])
    assert not out[[0, 3, 4, 5], :width].any() and np.isnan(out[:, width:]).all()
    wq = np.random.default_rng(0).integers(-127, 128, (VOCAB, width), np.int8)
    ws = np.random.default_rng(1).random(VOCAB, np.float32)
    quantized = QuantizedEmbedding(VOCAB, width, own(width), partial=True)
    library.call(quantized, ints(6), tokens, aligned_copy(pack_int8(wq)), aligned_copy(pack_vector(ws)), first, out)
    np.testing.assert_array_equal(out[:, :width], meanings.quantized_embedding(tokens, wq, ws, first[:1]))
    assert not out[[0, 3, 4, 5], :width].any()


@pytest.mark.parametrize("kernel", ROTARIES, ids=lambda k: k.name)
def test_rotary_table(library: Library, kernel: RotaryTable) -> None:
    """Ragged positions up to 32,000; with dynamic NTK one sequence is short and two are long."""
    dim = kernel.head_dim
    positions, sequences = ints(0, 1, 99, 5, 100, 31999, 7, 2), ints(0, 0, 0, 2, 2, 1, 1, 2)
    inv_freq = (1 / kernel.base ** (np.arange(0, dim, 2) / dim)).astype(np.float32)
    out = garbage((8, rows_apart(dim).stride))
    library.call(kernel, ints(8), positions, sequences, aligned_copy(inv_freq), out)
    expected = meanings.rotary_table(positions, sequences, inv_freq, attention_scaling=kernel.attention_scaling,
                                     dynamic_factor=kernel.dynamic_factor, original_max=kernel.original_max,
                                     base=kernel.base)  # fmt: skip
    # A frequency may differ by one rounding, which its position then magnifies.
    tolerance = 3e-7 * np.maximum(1, positions if kernel.dynamic_factor else 1)
    assert (np.abs(out[:, :dim] - expected).max(axis=1) <= tolerance).all()


def test_the_library_needs_no_libm(library: Library) -> None:
    """The engine must load wherever it is copied: only symbols of libc, and no newer ones than of 2012."""
    listing = subprocess.run(["nm", "-D", "--undefined-only", str(library.file)], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1].partition("@") for line in listing.stdout.splitlines()]
    allowed = {"__cxa_finalize", "__gmon_start__", "memcpy", "memset", "memmove", "strlen", "syscall", "sched_yield",
               "clock_gettime", "sysconf", "__tls_get_addr", "_ITM_deregisterTMCloneTable",
               "_ITM_registerTMCloneTable"}  # fmt: skip
    assert {name for name, _, _ in symbols} <= allowed
    versions = {tuple(map(int, version.removeprefix("GLIBC_").split("."))) for _, _, version in symbols if version}
    assert max(versions) <= (2, 17)
