"""The ops in torch against their NumPy meanings, and row by row with the same bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from belle_compile.compiler.backends.torchscript import ops
from belle_compile.compiler.ir import meanings
from belle_compile.compiler.ir.ops import REGISTRY
from tests.compiler.backends.torchscript.harness import needs_vnni

Array = npt.NDArray[Any]

ROWS, WIDTH, OUTPUTS = 37, 96, 40
ROTATED = {"bits": 8, "hadamard": 32}


def floats(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def integers(*shape: int, limit: int = 127, dtype: str = "int8") -> Array:
    return np.random.default_rng(5).integers(-limit, limit + 1, shape).astype(dtype)


X, R = 3 * floats(ROWS, WIDTH), floats(ROWS, WIDTH, seed=1)
X[4] = 0
GAIN, BIAS, STEP = floats(WIDTH, seed=2), floats(WIDTH, seed=3), np.asarray([0.03], np.float32)
WEIGHT, OFFSETS = floats(OUTPUTS, WIDTH, seed=4), floats(OUTPUTS, seed=6)
XS, WQ, WS = np.abs(floats(ROWS, seed=7)), integers(OUTPUTS, WIDTH), np.abs(floats(OUTPUTS, seed=8))
NORM = {"epsilon": 1e-5}

# Op, inputs of which the first `rows` have a row for every token, attributes
CASES: Sequence[tuple[str, list[Array | None], int, Mapping[str, Any]]] = [
    ("Identity", [X], 1, {}),
    ("Add", [X, R], 2, {}),
    ("LayerNormalization", [X, GAIN, BIAS], 1, NORM),
    ("RMSNormalization", [X, GAIN], 1, NORM),
    ("Gemm", [X, WEIGHT, None], 1, {}),
    ("Gemm", [X, WEIGHT, OFFSETS], 1, {}),
    ("Gelu", [X], 1, {}),
    ("SwiGLU", [40 * X, R], 2, {}),
    ("BlockHadamard", [X], 1, {"block": 32}),
    ("BlockHadamard", [X], 1, {"block": 16}),
    ("AddNorm", [X, R, GAIN, BIAS], 2, NORM | {"kind": "layer"}),
    ("QuantizeTokens", [X, None], 1, {"bits": 8}),
    ("QuantizeTokens", [X, None], 1, {"bits": 16}),
    ("QuantizeTokens", [X, STEP], 1, {"bits": 8}),
    ("NormQuantize", [X, GAIN, None, None], 1, NORM | {"kind": "rms", "bits": 8}),
    ("AddNormQuantize", [X, R, GAIN, BIAS, STEP], 2, NORM | {"kind": "layer", "bits": 16}),
    ("GeluQuantize", [X, None], 1, ROTATED),
    ("SwiGLUQuantize", [X, R, None], 2, ROTATED | {"bits": 16}),
    ("IntegerLinear", [integers(ROWS, WIDTH), WQ], 1, {}),
    ("IntegerLinear", [integers(ROWS, WIDTH, limit=32_639, dtype="int16"), WQ], 1, {}),
    ("QuantizedLinear", [integers(ROWS, WIDTH), XS, WQ, WS, None], 2, {}),
    ("QuantizedLinear", [integers(ROWS, WIDTH, limit=32_639, dtype="int16"), XS, WQ, WS, OFFSETS], 2, {}),
]


def stored(value: Array | None) -> torch.Tensor | None:
    """An input as the ops in torch take it: integers of activations with 128 added, scales as a column."""
    if value is None:
        return None
    if value.dtype == np.int8 and len(value) == ROWS:
        return torch.from_numpy((value.astype(np.int16) + 128).astype(np.uint8))
    return torch.from_numpy(value[:, None] if value is XS else value)


def plain(value: torch.Tensor) -> Array:
    """A result as its meaning gives it."""
    array: Array = value.numpy()
    return array.astype(np.int16) - 128 if array.dtype == np.uint8 else array


def compute(op: str, inputs: Sequence[torch.Tensor | None], attributes: Mapping[str, Any]) -> list[torch.Tensor]:
    result = ops.OPS[op](*inputs, **attributes)
    return list(result) if isinstance(result, tuple) else [result]


@needs_vnni
@pytest.mark.parametrize(("op", "inputs", "rows", "attributes"), CASES)
def test_meanings_and_bits(op: str, inputs: list[Array | None], rows: int, attributes: Mapping[str, Any]) -> None:
    expected = REGISTRY[op].meaning(*inputs, **attributes)
    given = [stored(value) for value in inputs]
    found = compute(op, given, attributes)
    for result, meaning in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
        array = plain(result)
        if meaning.dtype in (np.int8, np.int16):
            assert np.abs(array.astype(np.int64) - meaning).max() <= 1 and (array != meaning).mean() < 0.01
        else:
            array = np.resize(array, meaning.shape)  # one scale may stand for all tokens
            np.testing.assert_allclose(array, meaning, rtol=2e-5, atol=2e-5 * np.abs(meaning).max())
    for start, stop in ((0, 1), (3, 5), (7, 36)):
        part = [v[start:stop].clone() if v is not None and i < rows else v for i, v in enumerate(given)]
        for result, whole in zip(compute(op, part, attributes), found, strict=True):
            assert torch.equal(result, whole[start:stop] if len(whole) == ROWS else whole), (op, start)


@needs_vnni
def test_products_of_packed_weights_are_exact() -> None:
    """Sums beyond the 24 bits that float32 holds, of the largest integers."""
    for xq in (integers(ROWS, 2048), np.full((3, 2048), 127, np.int8), np.full((1, 2048), -127, np.int8)):
        wq = np.where(np.arange(OUTPUTS)[:, None] % 2, 127, integers(OUTPUTS, 2048)).astype(np.int8)
        packed = torch.ops.onednn.qlinear_prepack(torch.from_numpy(wq), None)
        unsigned = torch.from_numpy((xq.astype(np.int16) + 128).astype(np.uint8))
        scales = np.ones(len(xq), np.float32)
        found = ops.packed_linear(unsigned, packed, torch.from_numpy(scales[:, None]), torch.from_numpy(WS), None)
        np.testing.assert_array_equal(found.numpy(), meanings.quantized_linear(xq, scales, wq, WS, None))


@pytest.mark.parametrize("dynamic_factor", [0.0, 8.0])
def test_rotary_table(dynamic_factor: float) -> None:
    positions = np.concatenate([np.arange(30, 50), np.arange(17)]).astype(np.int32)
    sequences = np.repeat([0, 1], [20, 17]).astype(np.int32)
    frequencies = (10000.0 ** -(np.arange(0, 16, 2) / 16)).astype(np.float32)
    options: dict[str, Any] = {
        "attention_scaling": 1.1, "dynamic_factor": dynamic_factor, "original_max": 16, "base": 10000.0
    }  # fmt: skip
    lengths = torch.from_numpy(np.repeat([50, 17], [20, 17]))
    found = ops.rotary_table(torch.from_numpy(positions).long(), lengths, torch.from_numpy(frequencies), **options)
    expected = meanings.rotary_table(positions, sequences, frequencies, **options)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)
    alone = ops.rotary_table(torch.from_numpy(positions[20:]).long(), lengths[20:], torch.from_numpy(frequencies), **options)
    assert torch.equal(alone, found[20:])


def test_an_embedding() -> None:
    ids = np.asarray([3, 0, 3, 39], np.int64)
    found = ops.quantized_embedding(torch.from_numpy(ids), torch.from_numpy(WQ), torch.from_numpy(WS), None)
    np.testing.assert_array_equal(found.numpy(), meanings.quantized_embedding(ids.astype(np.int32), WQ, WS))


def test_every_op_of_one_rank_with_int8_weights_has_a_meaning() -> None:
    missing = REGISTRY.keys() - ops.OPS.keys()
    assert missing == {"Split", "RotaryTable", "Attention", "GroupQuantizedLinear", "Embedding", "AllReduce"}
