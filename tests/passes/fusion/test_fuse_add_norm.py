"""FuseAddNorm: residual sum and norm in one node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir
import pytest

from belle_compile.compiler.ir.build import make_node
from belle_compile.passes.base import PassResult, Replacement
from belle_compile.passes.fusion.fuse_add_norm import FuseAddNorm
from tests.passes.helpers import Tiny, assert_same_results, bloom, check_pass, count, llama, side_by_side


def add_then_norm(kind: str) -> ir.Model:
    """The sum goes on beside its norm, as in a pre-norm block."""
    b = Tiny()
    total = b.op("Add", b.x, b.linear(b.x, "dense", 32), name="add")
    return b.head(b.op("Add", total, b.norm(total, "norm", kind), name="join"))


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_text(golden: Callable[[str, str], None], kind: str) -> None:
    model = add_then_norm(kind)
    before, result = check_pass(FuseAddNorm(), model)
    assert result == PassResult(1)
    golden(f"fuse-add-norm-{kind}", side_by_side(before, FuseAddNorm(), model))


@pytest.mark.parametrize("make", [lambda: add_then_norm("layer"), lambda: add_then_norm("rms"), llama, bloom])
def test_same_results(make: Callable[[], ir.Model]) -> None:
    model = make()
    before, result = check_pass(FuseAddNorm(), model)
    assert result.changes
    assert_same_results(before, model)


def test_refuses_second_norm_of_one_sum() -> None:
    b = Tiny()
    total = b.op("Add", b.x, b.x, name="add")
    norms = [b.norm(total, f"norm.{index}", "rms") for index in range(2)]
    model = b.head(b.op("Add", *norms, name="join"))
    before, result = check_pass(FuseAddNorm(), model)
    assert result == PassResult(1, ("norm.1: its sum is already computed together with the norm norm.0",))
    assert_same_results(before, model)


def test_no_sum_before_the_norm() -> None:
    b = Tiny()
    _, result = check_pass(FuseAddNorm(), b.head(b.norm(b.x, "norm", "layer")))
    assert result == PassResult()


@dataclass(frozen=True)
class BrokenFuseAddNorm(FuseAddNorm):
    """Forgets the norm's epsilon: an error of about 1e-3, which a loose comparison would let by."""

    def rewrite(self, match: tuple[ir.Node, ir.Node], graph: ir.Graph) -> Replacement:
        add, norm = match
        attributes = {"kind": "layer", "epsilon": 1e-3}
        node = make_node("AddNorm", [*add.inputs, *norm.inputs[1:]], str(norm.name), attributes=attributes)
        return Replacement(match, [node], {add.outputs[0]: node.outputs[0], norm.outputs[0]: node.outputs[1]})


def test_parity_rejects_a_broken_rewrite() -> None:
    model = add_then_norm("layer")
    before, result = check_pass(BrokenFuseAddNorm(), model)
    assert result == PassResult(1)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_same_results(before, model)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_same_results(before, model, rtol=1e-5)


def test_counts_in_whole_models() -> None:
    model = bloom(layers=3)
    FuseAddNorm().run(model)
    assert (count(model, "AddNorm"), count(model, "Add"), count(model, "LayerNormalization")) == (5, 1, 2)
