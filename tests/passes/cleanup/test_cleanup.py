"""The cleanup passes: identities, duplicates, what is unused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from belle_compile.compiler.ir.lazy import lazy
from belle_compile.passes.base import Pass, PassResult
from belle_compile.passes.cleanup.merge_duplicates import MergeDuplicates
from belle_compile.passes.cleanup.remove_identities import RemoveIdentities
from belle_compile.passes.cleanup.remove_unused import RemoveUnused
from tests.passes.helpers import Tiny, assert_same_results, bloom, check_pass, count, llama, side_by_side


def identities() -> ir.Model:
    """One inside, one at the end."""
    b = Tiny()
    x = b.op("Identity", b.x, name="same")
    rows = b.op("Gather", b.op("Add", x, b.x, name="add"), b.inputs.logit_rows, name="rows")
    return b.finish(b.op("Identity", rows, name="end"))


def duplicates() -> ir.Model:
    """Two equal norms, and linears of them that are equal once the norms are one; one norm with another epsilon."""
    b = Tiny()
    weight, scale = b.random("w", 32, 32), b.random("scale", 32)
    epsilons = [1e-5, 1e-5, 1e-3]
    norms = [b.op("RMSNormalization", b.x, scale, name=f"norm.{i}", epsilon=e) for i, e in enumerate(epsilons)]
    parts = [b.op("Gemm", norm, weight, name=f"dense.{i}", transB=1) for i, norm in enumerate(norms)]
    return b.head(b.op("Add", parts[0], b.op("Add", *parts[1:], name="add.1"), name="add.0"))


def unused() -> ir.Model:
    """A chain of two nodes nobody reads, their weight, and a weight that is never read (nor loaded)."""
    b = Tiny()
    b.norm(b.linear(b.x, "dense", 32), "norm", "rms")

    def never() -> np.ndarray:
        raise AssertionError("an unused weight was read")

    b.weight("unused", lazy("unused", never, (3,), np.float32))
    return b.head(b.x)


@pytest.mark.parametrize(
    ("step", "make", "changes"),
    [(RemoveIdentities(), identities, 2), (MergeDuplicates(), duplicates, 2), (RemoveUnused(), unused, 5)],
)
def test_text_and_same_results(
    golden: Callable[[str, str], None], step: Pass, make: Callable[[], ir.Model], changes: int
) -> None:
    model = make()
    before, result = check_pass(step, model)
    assert result == PassResult(changes)
    golden(step.name, side_by_side(before, step, model))
    assert_same_results(before, model)


@pytest.mark.parametrize("step", [RemoveIdentities(), MergeDuplicates(), RemoveUnused()])
@pytest.mark.parametrize("make", [llama, bloom])
def test_tidy_graph_is_left_alone(step: Pass, make: Callable[[], ir.Model]) -> None:
    assert check_pass(step, make())[1] == PassResult()


def test_identity_of_a_weight_at_the_output_stays() -> None:
    b = Tiny()
    table = b.op("Gather", b.x, b.inputs.logit_rows, name="rows")
    b.finish(b.op("Identity", table, name="end"))
    weight = b.weight("constant", np.ones((3, 4), np.float32))
    end = b.graph.node("end")
    end.replace_input_with(0, weight)
    result = RemoveIdentities().run(ir.Model(b.graph, ir_version=11))
    assert result == PassResult(0, ("end: the output logits must be a value of its own, constant is taken",))


def test_duplicates_that_must_stay() -> None:
    b = Tiny()
    first = b.attention(b.x, b.x, b.x, "attn.0", 0)
    second = b.attention(b.x, b.x, b.x, "attn.1", 0)
    rows = b.op("Gather", b.op("Add", first, second, name="add"), b.inputs.logit_rows, name="rows")
    b.op("Add", rows, rows, name="twice")
    b.graph.outputs.append(b.op("Add", rows, rows, name="again"))
    result = MergeDuplicates().run(ir.Model(b.graph, ir_version=11))
    assert result == PassResult(
        0,
        (
            "attn.1: computes the same as attn.0 but Attention has state",
            "again: computes the same as twice but is the graph's output",
        ),
    )


def test_unused_attention_stays() -> None:
    b = Tiny()
    b.attention(b.x, b.x, b.x, "attn", 0)
    model = b.head(b.x)
    _, result = check_pass(RemoveUnused(), model)
    assert result == PassResult(0, ("attn: its result is not used but Attention writes the cache",))
    assert count(model, "Attention") == 1
