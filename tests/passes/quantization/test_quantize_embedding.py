"""QuantizeEmbedding: the table as INT8, shared with a tied head."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from belle_compile.passes.base import PassResult
from belle_compile.passes.quantization.quantize_embedding import QuantizeEmbedding
from belle_compile.passes.quantization.quantize_linears import QuantizeLinears
from tests.passes.helpers import Tiny, assert_same_results, bloom, check_pass, run_steps, side_by_side


def test_text(golden: Callable[[str, str], None]) -> None:
    b = Tiny()
    model = b.head(b.x, tied=True)
    QuantizeLinears().run(model)
    before, result = check_pass(QuantizeEmbedding(), model)
    assert result == PassResult(1)
    golden("quantize-embedding", side_by_side(before, QuantizeEmbedding(), model))


def test_tied_head_and_embedding_share_one_table() -> None:
    model = bloom()
    QuantizeLinears().run(model)
    check_pass(QuantizeEmbedding(), model)
    head, embed = (
        next(node for node in model.graph if node.name == name).inputs[1] for name in ("lm_head.accumulate", "embed")
    )
    assert head is embed and head is not None and head.name == "embed.weight.int8"
    assert "embed.weight" not in model.graph.initializers


def test_rows_are_those_of_the_table() -> None:
    b = Tiny()
    table = b.graph.initializers["embed.weight"].const_value
    assert table is not None
    model = b.finish(b.op("Gather", b.x, b.inputs.logit_rows, name="rows"))
    before, _ = check_pass(QuantizeEmbedding(), model)
    for exact, found in zip(run_steps(before), run_steps(model), strict=True):
        step = np.abs(exact).max(axis=1, keepdims=True) / 127
        assert (np.abs(found - exact) <= 0.5001 * step).all()


def test_same_results_with_a_table_of_integers() -> None:
    b = Tiny()
    integers = np.random.default_rng(0).integers(-127, 128, (40, 32)).astype(np.float32)
    integers[:, 0] = 127
    b.x = b.op("Gather", b.weight("table", integers), b.inputs.token_ids, name="lookup")
    model = b.head(b.x)
    before, result = check_pass(QuantizeEmbedding(), model)
    assert result.changes
    assert_same_results(before, model)


def test_refuses_a_table_that_stays_float32_elsewhere() -> None:
    _, result = check_pass(QuantizeEmbedding(), bloom())
    assert result == PassResult(0, ("embed: its table embed.weight is also read as float32 by lm_head",))


def test_rows_of_activations_are_no_embedding() -> None:
    model = bloom()
    QuantizeLinears().run(model)
    QuantizeEmbedding().run(model)  # leaves the Gather of logit rows
    assert check_pass(QuantizeEmbedding(), model)[1] == PassResult()
