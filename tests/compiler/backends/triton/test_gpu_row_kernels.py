"""Kernels over rows beside their NumPy meanings, interpreted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from belle_compile.compiler.backends.program.kernel import View
from belle_compile.compiler.backends.triton.kernels import activation
from belle_compile.compiler.backends.triton.kernels.activation import (
    ActivateChunks,
    Activation,
    BlockHadamard,
    QuantizeChunks,
    QuantizeTokens,
)
from belle_compile.compiler.backends.triton.kernels.norm import HeadNorm, Norm
from belle_compile.compiler.backends.triton.kernels.rotary import RotaryTable
from belle_compile.compiler.backends.triton.kernels.rows import Add, FloatEmbedding, GatherRows, QuantizedEmbedding
from belle_compile.compiler.ir import meanings
from tests.compiler.backends.triton.harness import Array, call, floats, garbage, place, taken

ROWS, BEYOND = 3, 2  # rows of a step, and those of its grid that it lacks


def integers(xq: Array, view: View, width: int, planes: int) -> Array:
    """The quantized rows of a buffer."""
    of_plane = view.stride // planes
    parts = [xq[:ROWS, view.offset + plane * of_plane :][:, :width].astype(np.int32) for plane in range(planes)]
    return parts[0] if planes == 1 else 256 * parts[0] + parts[1]


def check_quantized(xq: Array, xs: Array, view: View, expected: tuple[Array, Array], planes: int) -> None:
    """As the meaning has it: scales to the last digits, and integers but for a few that lie between two."""
    found, wanted = integers(xq, view, expected[0].shape[1], planes), expected[0].astype(np.int32)
    np.testing.assert_allclose(xs[:ROWS], expected[1], rtol=2e-6)
    assert np.abs(found - wanted).max() <= planes
    assert (found != wanted).mean() < (0.01 if planes == 1 else 0.2)
    assert np.isnan(xs[ROWS:]).all() and (xq[ROWS:] == 99).all(), "rows beyond the step"


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("width", [64, 88])
def test_quantize_tokens_rounds_like_the_meaning(width: int, planes: int) -> None:
    x = floats(ROWS, width)
    x[1] = 0
    kernel = QuantizeTokens(width, View(160, 7), View(planes * 128), planes)
    xq, xs = garbage((ROWS + BEYOND, planes * 128), np.int8), garbage(ROWS + BEYOND)
    call(kernel, ROWS, place(x, kernel.x, BEYOND), xq, xs, launched=ROWS + BEYOND)
    expected = meanings.quantize_tokens(x, bits=8 * planes)
    np.testing.assert_array_equal(integers(xq, kernel.out, width, planes), expected[0])
    check_quantized(xq, xs, kernel.out, expected, planes)


def test_a_fixed_step_clips() -> None:
    x, step = floats(ROWS, 64), np.array([0.01], np.float32)
    kernel = QuantizeTokens(64, View(64), View(64), step=True)
    xq, xs = garbage((ROWS + BEYOND, 64), np.int8), garbage(ROWS + BEYOND)
    call(kernel, ROWS, x, step, xq, xs)
    assert np.abs(xq[:ROWS]).max() == 127
    check_quantized(xq, xs, kernel.out, meanings.quantize_tokens(x, step), 1)


@pytest.mark.parametrize("head_dim", [16, 24])
def test_each_head_is_normalized(head_dim: int) -> None:
    width = 3 * head_dim
    x, scale, kernel = floats(ROWS, width), floats(head_dim), HeadNorm(width, head_dim, 1e-5, View(128, 5), View(96, 3))
    out = garbage((ROWS + BEYOND, 96))
    call(kernel, ROWS, place(x, kernel.x, BEYOND), scale, out, launched=ROWS + BEYOND)
    expected = meanings.head_norm(x, scale, epsilon=1e-5)
    np.testing.assert_allclose(taken(out, kernel.out, ROWS, width), expected, rtol=1e-5, atol=1e-6)
    assert np.isnan(out[ROWS:]).all()


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_adds_normalizes_and_quantizes(kind: str, adds: bool, quantize: bool) -> None:
    width, planes = 72, 2 if kind == "rms" else 1
    x, r, scale, bias = floats(ROWS, width), floats(ROWS, width), floats(width), floats(width)
    own = View(128, 5)
    kernel = Norm(
        kind, width, 1e-5, kind == "layer", quantize, own, View(80) if adds else None, View(96, 3) if adds else None,
        View(planes * 128), planes if quantize else 1,
    )  # fmt: skip
    total = garbage((ROWS + BEYOND, 96))
    residual, sums = ([place(r, View(80))], [total]) if adds else ([], [])
    biases = [bias] if kernel.bias else []
    out = garbage((ROWS + BEYOND, planes * 128), np.int8 if quantize else np.float32)
    xs = garbage(ROWS + BEYOND)
    outs = [out, xs] if quantize else [out]
    call(kernel, ROWS, place(x, own, BEYOND), *residual, scale, *biases, *sums, *outs, launched=ROWS + BEYOND)
    summed = x + r if adds else x
    if adds:
        np.testing.assert_array_equal(taken(total, View(96, 3), ROWS, width), summed)
    normed = meanings.norm(summed, scale, bias if kernel.bias else None, kind=kind, epsilon=1e-5)
    if quantize:
        check_quantized(out, xs, kernel.out, meanings.quantize_tokens(normed, bits=8 * planes), planes)
    else:
        np.testing.assert_allclose(taken(out, kernel.out, ROWS, width), normed, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("hadamard", [None, 16, 64])
@pytest.mark.parametrize("function", ["gelu", "swiglu"])
def test_activation_transforms_and_quantizes(function: str, hadamard: int | None) -> None:
    width, both = 192, View(448, 32)
    gate, up = floats(ROWS, width) * 3, floats(ROWS, width)
    buffer = place(np.concatenate([gate, up], axis=1), both, BEYOND)
    views = (both, View(448, 32 + width) if function == "swiglu" else None)
    expected = meanings.gelu(gate) if function == "gelu" else meanings.swiglu(gate, up)
    second = [buffer] if function == "swiglu" else []
    if hadamard:
        expected = meanings.block_hadamard(expected, block=hadamard)
    kernel = Activation(function, width, True, *views, View(192), 1, hadamard)
    xq, xs = garbage((ROWS + BEYOND, 192), np.int8), garbage(ROWS + BEYOND)
    call(kernel, ROWS, buffer, *second, xq, xs, launched=ROWS + BEYOND)
    check_quantized(xq, xs, kernel.out, meanings.quantize_tokens(expected), 1)
    if not hadamard:
        plain, out = Activation(function, width, False, *views, View(256, 1)), garbage((ROWS, 256))
        call(plain, ROWS, buffer, *second, out)
        np.testing.assert_allclose(taken(out, plain.out, ROWS, width), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("hadamard", [None, 16, 64])
@pytest.mark.parametrize("function", ["gelu", "swiglu"])
def test_chunks_of_a_row_give_what_the_whole_row_does(
    function: str, hadamard: int | None, planes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activation, "_CHUNK", 64)
    width, both, out = 192, View(448, 32), View(planes * 192)
    buffer = place(floats(ROWS, 2 * width) * 3, both, BEYOND)
    views = (both, View(448, 32 + width) if function == "swiglu" else None)
    whole = Activation(function, width, True, *views, out, planes, hadamard)
    assert whole.chunked and not replace(whole, quantize=False).chunked and not replace(whole, step=True).chunked
    second = [buffer] if function == "swiglu" else []
    expected = garbage((ROWS + BEYOND, out.stride), np.int8), garbage(ROWS + BEYOND)
    call(whole, ROWS, buffer, *second, *expected, launched=ROWS + BEYOND)
    before = buffer.copy()
    for (bound, first), (bound_too, last) in zip(
        ActivateChunks(whole).variants(), QuantizeChunks(ActivateChunks(whole)).variants(), strict=True
    ):
        assert bound == bound_too and first.pointers()[-3:] == last.pointers()[-3:]
        buffer[:], maxima = before, garbage((ROWS + BEYOND, 3))
        found = garbage((ROWS + BEYOND, out.stride), np.int8), garbage(ROWS + BEYOND)
        call(first, ROWS, buffer, *second, maxima, *found, launched=ROWS + BEYOND)
        call(last, ROWS, buffer, maxima, *found, launched=ROWS + BEYOND)
        for got, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(got, wanted)
        taken(buffer, both, ROWS, width)[:] = taken(before, both, ROWS, width)
        np.testing.assert_array_equal(buffer, before, "something else was written")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_reaches_the_scale(bad: float) -> None:
    x = floats(2, 2048)
    x[1, 1500] = bad
    first = ActivateChunks(Activation("gelu", 2048, True, View(2048), None, View(2048)))
    maxima, xq, xs = garbage((2, 4)), garbage((2, 2048), np.int8), garbage(2)
    call(first, 2, x, maxima, xq, xs)
    call(QuantizeChunks(first), 2, x, maxima, xq, xs)
    assert np.isfinite(xs[0]) and not np.isfinite(xs[1])


def test_the_hadamard_transform_adds_in_the_order_of_the_meaning() -> None:
    x = floats(ROWS, 96)
    kernel, out = BlockHadamard(96, 32, View(96), View(128)), garbage((ROWS, 128))
    call(kernel, ROWS, x, out)
    np.testing.assert_array_equal(taken(out, kernel.out, ROWS, 96), meanings.block_hadamard(x, block=32))


@pytest.mark.parametrize("first", [None, 40])
def test_embeddings_look_up_rows_and_a_part_gives_zeros_for_others(first: int | None) -> None:
    tokens = np.array([41, 0, 89, 1000], np.int32)
    table, scales = np.random.default_rng(0).integers(-127, 128, (50, 70)).astype(np.int8), floats(50)
    padded, wide = np.zeros((50, 128), np.int8), np.zeros((50, 80), np.float32)
    padded[:, :70], wide[:, :70] = table, table
    parts: list[Array] = [] if first is None else [np.array([first], np.int32)]
    out, plain = garbage((4, 96)), garbage((4, 96))
    call(QuantizedEmbedding(50, 70, View(96, 2), first is not None), 4, tokens, padded, scales, *parts, out)
    call(FloatEmbedding(50, 70, View(96, 2), first is not None), 4, tokens, wide, *parts, plain)
    if first is None:
        expected = meanings.quantized_embedding(np.minimum(tokens, 49), table, scales)
        other = table[np.minimum(tokens, 49)].astype(np.float32)
    else:
        expected = meanings.quantized_embedding(tokens, table, scales, parts[0])
        other = meanings.embedding(tokens, table.astype(np.float32), parts[0])
    np.testing.assert_array_equal(taken(out, View(96, 2), 4, 70), expected)
    np.testing.assert_array_equal(taken(plain, View(96, 2), 4, 70), other)


def test_rows_are_gathered_and_added() -> None:
    x, r = floats(ROWS, 1100), floats(ROWS, 1100)
    out = garbage((ROWS + BEYOND, 1104))
    call(Add(1100, View(1104, 1), View(1200), View(1104)), ROWS, place(x, View(1104, 1)), place(r, View(1200)), out)
    np.testing.assert_array_equal(taken(out, View(1104), ROWS, 1100), x + r)
    wanted = np.array([2, 0, 0, 0, 0], np.int32)
    gathered = garbage((ROWS + BEYOND, 1104))
    call(GatherRows(1100, View(1104, 1), View(1104)), 2, wanted, place(x, View(1104, 1)), gathered, launched=4)
    np.testing.assert_array_equal(taken(gathered, View(1104), 2, 1100), x[[2, 0]])
    assert np.isnan(gathered[2:]).all()


@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_rotary_table_grows_its_base_for_long_sequences(factor: float) -> None:
    positions = np.array([0, 5, 70, 3, 130, 4], np.int32)
    sequences = np.array([0, 1, 2, 2, 3, 3], np.int32)
    options: dict[str, Any] = dict(attention_scaling=1.5, dynamic_factor=factor, original_max=64, base=10000.0)
    inv_freq = (10000.0 ** (-np.arange(0, 24, 2) / 24)).astype(np.float32)
    out = garbage((6, 64))
    call(RotaryTable(head_dim=24, **options), 6, positions, sequences, inv_freq, out)
    expected = meanings.rotary_table(positions, sequences, inv_freq, **options)
    np.testing.assert_allclose(out[:, :24], expected, atol=2e-5 if factor else 1e-6)
