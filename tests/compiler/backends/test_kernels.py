"""Kernel descriptions: one for all backends, and names that stay what programs on disk say."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("triton")

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.program.kernel import Kernel, View
from belle_compile.compiler.backends.triton.kernels import activation as triton_activation
from belle_compile.compiler.backends.triton.kernels import linear as triton_linear
from belle_compile.compiler.backends.triton.lower import TritonLowering
from belle_compile.compiler.backends.tvm.kernels.activation import Activation
from belle_compile.compiler.backends.tvm.kernels.attention import Attention
from belle_compile.compiler.backends.tvm.kernels.quantized_linear import QuantizedLinear
from belle_compile.compiler.backends.tvm.lower import TvmLowering

SHARED = [
    kind
    for _, kind in inspect.getmembers(kernels, inspect.isclass)
    if issubclass(kind, Kernel) and kind.__module__ == kernels.__name__ and "kind" in vars(kind)
]


# The kind of the first kernel where a backend has several for what is one elsewhere.
FIRST_OF_SEVERAL = {(TritonLowering, "LowRank"): "shrink"}


@pytest.mark.parametrize("shared", SHARED, ids=lambda shared: shared.__name__)
@pytest.mark.parametrize("backend", [TvmLowering, TritonLowering])
def test_kernels_of_backends_derive_from_one_description(
    shared: type[Kernel], backend: type[TvmLowering | TritonLowering]
) -> None:
    made = getattr(backend.kernels, shared.__name__)
    if made is None:  # for what the backend refuses
        assert backend.kernels.__dataclass_fields__[shared.__name__].default is None
        return
    assert issubclass(made, shared) and made.kind == FIRST_OF_SEVERAL.get((backend, shared.__name__), shared.kind)
    assert list(made.__dataclass_fields__)[: len(shared.__dataclass_fields__)] == list(shared.__dataclass_fields__)


def test_attention_derives_from_one_description() -> None:
    for backend in (TvmLowering, TritonLowering):
        assert all(issubclass(kind, kernels.Attention) for _, kind in backend.kernels.Attention)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        (Activation("swiglu", 80, True, View(192), View(192, 80), View(128)), "activation_fswiglu_w80_q_x192_u192at80_o128_p1"),
        (triton_activation.Activation("gelu", 80, False, View(128), None, View(128)), "activation_agelu_w80_x128_o128_p1"),
        (QuantizedLinear(96, 64, True, View(64), View(112), 2), "qlinear_o96_i64_b_x64_o112_p2"),
        (
            triton_linear.QuantizedLinear(96, 64, False, View(64), View(112), 1, triton_linear.Tile(16, 32, 64, 2)),
            "qlinear_o96_i64_x64_o112_p1_tm16x32x64s2w4n3",
        ),
        (
            Attention(2, 8, 4, 16, 0.25, View(256), View(128, 64), 40, "bfloat16", True, False),
            "attention_nl2_nh8_nkh4_hd16_s0p25_q256_o128at64_mb40_cdbfloat16_r",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_names_say_all_fields(kernel: Kernel, name: str) -> None:
    assert kernel.name == name


def test_a_bfloat16_cache_is_taken_as_16_bits() -> None:
    attention = Attention(2, 8, 4, 16, 0.25, View(256), View(128), 40, "bfloat16", False, True)
    assert attention.pointers()[-4:] == (("slopes", "float32"), ("kcache", "uint16"), ("vcache", "uint16"), ("out", "float32"))
