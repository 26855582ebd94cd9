"""FuseNormQuantize: norms that end in INT8."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import pytest

from belle_compile.passes.base import PassResult
from belle_compile.passes.fusion.fuse_add_norm import FuseAddNorm
from belle_compile.passes.fusion.fuse_norm_quantize import FuseNormQuantize
from belle_compile.passes.quantization.quantize_linears import QuantizeLinears
from tests.passes.helpers import Tiny, assert_same_results, bloom, check_pass, count, llama, side_by_side


def block(kind: str) -> ir.Model:
    """norm, linear, residual sum, norm, linear, residual sum."""
    b = Tiny()
    first = b.linear(b.norm(b.x, "norm.0", kind), "dense.0", 32)
    total = b.op("Add", b.x, first, name="add.0")
    second = b.linear(b.norm(total, "norm.1", kind), "dense.1", 32)
    return quantized(b.head(b.op("Add", total, second, name="add.1")))


def quantized(model: ir.Model) -> ir.Model:
    QuantizeLinears().run(model)
    FuseAddNorm().run(model)
    return model


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_text(golden: Callable[[str, str], None], kind: str) -> None:
    model = block(kind)
    before, result = check_pass(FuseNormQuantize(), model)
    assert result == PassResult(2)
    golden(f"fuse-norm-quantize-{kind}", side_by_side(before, FuseNormQuantize(), model))


@pytest.mark.parametrize("make", [lambda: block("layer"), lambda: block("rms"), lambda: quantized(llama())])
def test_same_results(make: Callable[[], ir.Model]) -> None:
    model = make()
    before, result = check_pass(FuseNormQuantize(), model)
    assert result.changes and not result.refusals
    assert_same_results(before, model)


def test_refuses_where_the_residual_comes_after_the_norm() -> None:
    model = quantized(bloom(layers=1, residual_after_norm=True))
    before, result = check_pass(FuseNormQuantize(), model)
    assert result == PassResult(
        0,
        (
            "h.0.input_norm.quantize: the float32 result of h.0.input_norm is also read by h.0.post_norm",
            "h.0.post_norm.quantize: the float32 result of h.0.post_norm is also read by h.0.add_mlp",
        ),
    )
    assert count(model, "AddNorm") == 1
    assert_same_results(before, model)


def test_a_quantized_sum_is_no_norm() -> None:
    b = Tiny()
    total = b.op("Add", b.x, b.x, name="add")
    both = b.op("Add", b.linear(total, "dense", 32), b.norm(total, "norm", "rms"), name="join")
    assert check_pass(FuseNormQuantize(), quantized(b.head(both)))[1] == PassResult()
