"""What a preset says of weights."""

from __future__ import annotations

import pytest

from belle_compile.passes.quantization.scheme import FLOAT32, INT4, INT8, WeightScheme


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (FLOAT32, "float32"),
        (INT8, "int8 per output channel"),
        (INT4, "int4 in groups of 128 inputs, int8 embedding and head"),
        (WeightScheme(4, 64, zero_points=True), "int4 in groups of 64 inputs with zero points, int8 embedding and head"),
    ],
)
def test_words_of_the_manifest(scheme: WeightScheme, words: str) -> None:
    assert str(scheme) == words
    assert scheme.quantizes == (scheme is not FLOAT32)
