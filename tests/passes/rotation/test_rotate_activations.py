"""RotateActivations: the function stays, what the linear behind the activation multiplies is spread."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.ops import attributes_of
from belle_compile.passes.base import PassResult
from belle_compile.passes.rotation import rotate_activations
from belle_compile.passes.rotation.rotate_activations import RotateActivations
from belle_compile.passes.rotation.rotate_residual import RotateResidual
from tests.passes.helpers import Tiny, assert_same_results, bloom, check_pass, llama, run_steps, side_by_side

ROUNDING = 2e-6  # float32 sums in another order


def feed_forward(width: int, reused: bool = False) -> ir.Model:
    b = Tiny()
    inner = b.op("SwiGLU", b.linear(b.x, "gate", width), b.linear(b.x, "up", width), name="act")
    down = b.linear(inner, "down", 32, bias=True)
    return b.head(b.op("Add", down, b.linear(inner, "other", 32), name="add") if reused else down)


@pytest.mark.parametrize("make", [llama, bloom])
def test_text(golden: Callable[[str, str], None], make: Callable[..., ir.Model]) -> None:
    model = make(layers=1)
    before, result = check_pass(RotateActivations(), model)
    assert result == PassResult(1)
    golden(f"rotate-activations-{make.__name__}", side_by_side(before, RotateActivations(), model))


@pytest.mark.parametrize("make", [llama, bloom, lambda: feed_forward(1536), lambda: feed_forward(176)])
def test_same_logits(make: Callable[[], ir.Model]) -> None:
    model = make()
    before, result = check_pass(RotateActivations(), model)
    assert result.changes
    assert_same_results(before, model, rtol=ROUNDING)
    assert any((a != b).any() for a, b in zip(run_steps(before), run_steps(model), strict=True)), "nothing was rotated"


def test_a_weight_that_does_not_take_part_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parity above fails for a rewrite that forgets it."""
    monkeypatch.setattr(rotate_activations, "_rotate_rows", lambda block, weight: weight)
    model = llama()
    before, _ = check_pass(RotateActivations(), model)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_same_results(before, model, rtol=ROUNDING)


def test_with_a_rotated_residual_stream() -> None:
    model = llama(last_norm=True)
    before = model.clone()
    for step in (RotateResidual(), RotateActivations()):
        assert check_pass(step, model)[1].changes
    assert_same_results(before, model, rtol=ROUNDING)


@pytest.mark.parametrize(("width", "limit", "block"), [(48, 512, 16), (1536, 512, 512), (1536, 64, 64), (1376, 512, 32)])
def test_block(width: int, limit: int, block: int) -> None:
    model = feed_forward(width)
    RotateActivations(limit).run(model)
    assert attributes_of(model.graph.node("act.hadamard")) == {"block": block}


@pytest.mark.parametrize(
    ("width", "ranks", "group", "block"),
    [
        (16384, 8, 1, 512),  # BLOOM-7B1: 32 blocks
        (11008, 4, 1, 256),  # LLaMA-7B: 43 blocks, 11 of them on three ranks
        (11008, 8, 1, 128),  # 86 blocks; with 43 the largest share is 12% above an even one
        (13824, 4, 1, 128),  # LLaMA-13B: 27 blocks of 512
        (13824, 8, 1, 64),
        (13824, 8, 128, 256),  # as even as groups of INT4 weights allow
        (5632, 2, 1, 256),
        (768, 4, 1, 64),  # three blocks of 256 would leave a rank without any
        (48, 4, 1, 16),  # for the partition to refuse
    ],
)
def test_blocks_are_shared_evenly(width: int, ranks: int, group: int, block: int) -> None:
    assert RotateActivations(ranks=ranks, group=group).block_of(width) == block


def test_rows_of_the_weight_are_spread() -> None:
    """An input that all outputs weigh heavily, which is what an outlier of the activation looks like from behind."""
    model = feed_forward(512)
    weight = model.graph.initializers["down.weight"].const_value
    assert weight is not None
    weight.numpy()[:, 17] = 10
    RotateActivations().run(model)
    rotated = model.graph.initializers["down.weight.rotated"].const_value
    assert rotated is not None and np.abs(rotated.numpy()).max() < 1


def test_a_width_without_blocks_is_refused() -> None:
    model = feed_forward(24)
    before, result = check_pass(RotateActivations(), model)
    assert result == PassResult(0, ("down: no power of two from 16 on divides its 24 inputs",))
    assert_same_results(before, model)


def test_a_result_with_another_reader_is_refused() -> None:
    _, result = check_pass(RotateActivations(), feed_forward(48, reused=True))
    assert result == PassResult(
        0, ("down: the result of act is also read by other", "other: the result of act is also read by down")
    )


def test_a_computed_weight_is_refused() -> None:
    b = Tiny()
    inner = b.op("Gelu", b.linear(b.x, "up", 32), name="act", approximate="tanh")
    rows = b.op("Gather", inner, b.inputs.logit_rows, name="rows")
    table = b.op("Identity", b.random("table", 40, 32), name="table_copy")
    model = b.finish(b.op("Gemm", b.op("Gelu", rows, name="last", approximate="tanh"), table, name="lm_head", transB=1))
    _, result = check_pass(RotateActivations(), model)
    assert result == PassResult(0, ("lm_head: its weight is computed, so it cannot absorb a rotation",))


@pytest.mark.parametrize("block", [0, 8, 24])
def test_option_block(block: int) -> None:
    with pytest.raises(CompileError, match=f"option block: found {block}, expected a power of two from 16 on"):
        RotateActivations(block)


def test_a_graph_without_activations_is_left_alone() -> None:
    b = Tiny()
    model = b.head(b.linear(b.x, "left", 32))
    before, result = check_pass(RotateActivations(), model)
    assert result == PassResult()
    assert_same_results(before, model)
