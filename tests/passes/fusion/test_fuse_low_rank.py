"""FuseLowRank: changes of linears that were fused as one op."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.ops import attributes_of, columns_of_targets
from belle_compile.compiler.ir.verify import verify
from belle_compile.passes.adapters.add_low_rank import AddLowRank
from belle_compile.passes.base import PassResult
from belle_compile.passes.fusion.fuse_dequantize import FuseDequantize
from belle_compile.passes.fusion.fuse_low_rank import FuseLowRank
from belle_compile.passes.fusion.fuse_projections import FuseProjections
from belle_compile.passes.quantization.quantize_linears import QuantizeLinears
from belle_compile.runtime.adapters.factors import Factors
from tests.passes.helpers import bloom, check_pass, count, llama, run_steps, side_by_side

RANK = 3


class Changes:
    """The second of the two sequences has an adapter, with factors for every linear of a graph."""

    def __init__(self, model: ir.Model) -> None:
        self._factors = {}
        for node in model.graph:
            if node.op_type.endswith("LowRank"):
                assert node.inputs[1] is not None and node.inputs[1].shape is not None
                inputs = node.inputs[1].shape[1]
                assert isinstance(inputs, int)
                for target, columns in columns_of_targets(node).items():
                    random = np.random.default_rng(len(self._factors))
                    shapes = (RANK, inputs), (RANK,), (columns.stop - columns.start, RANK)
                    self._factors[target] = Factors(*(random.standard_normal(s).astype(np.float32) / 4 for s in shapes))

    def factors(self, sequence: int, target: str) -> Factors | None:
        return self._factors.get(target) if sequence == 1 else None


def adapted(targets: tuple[str, ...] = (), quantize: bool = True) -> ir.Model:
    """A LLaMA model with adapters, whose linears are fused."""
    model = llama(layers=1)
    if quantize:
        QuantizeLinears().run(model)
    AddLowRank(RANK, targets).run(model)
    FuseDequantize().run(model)
    FuseProjections().run(model)
    return model


def test_text(golden: Callable[[str, str], None]) -> None:
    model = adapted(("q", "v", "down"))
    before, result = check_pass(FuseLowRank(), model)
    assert result == PassResult(1)
    golden("fuse-low-rank", side_by_side(before, FuseLowRank(), model))


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("targets", [(), ("q", "v"), ("k", "gate", "up", "o")])
def test_same_results(targets: tuple[str, ...], quantize: bool) -> None:
    model = adapted(targets, quantize)
    changes = Changes(model)
    before, result = check_pass(FuseLowRank(), model)
    assert result.changes == (1 if targets == ("q", "v") else 2)
    plain, expected, found = run_steps(before), run_steps(before, changes), run_steps(model, changes)
    for without, one, other in zip(plain, expected, found, strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.abs(one[1] - without[1]).max() > 0.01 and (one[0] == without[0]).all()


def test_splits_of_one_linear_and_of_other_models_stay() -> None:
    model = bloom(layers=1)
    AddLowRank(RANK).run(model)
    FuseProjections().run(model)
    _, result = check_pass(FuseLowRank(), model)  # q, k and v of BLOOM are parts of one linear, which has one op already
    assert result == PassResult(0) and count(model, "LowRank") == 4


def test_a_result_that_is_read_elsewhere_is_refused() -> None:
    model = adapted(("q", "v"))
    change = next(node for node in model.graph if node.op_type == "QuantizedLowRank")
    reader = next(iter(change.outputs[0].consumers()))
    reader.replace_input_with(list(reader.inputs).index(change.outputs[0]), change.inputs[0])
    result = FuseLowRank().run(model)
    assert result.changes == 0 and "what they change is also read by" in result.refusals[0]


def test_targets_must_fit_the_sizes() -> None:
    model = adapted(("q", "v"))
    FuseLowRank().run(model)
    change = next(node for node in model.graph if node.op_type == "QuantizedLowRank")
    assert attributes_of(change)["targets"].split(",")[1] == ""
    change.attributes["targets"] = ir.AttrString("targets", "layers.0.q")
    with pytest.raises(CompileError, match=r"found layers\.0\.q, expected 3 names of linears"):
        verify(model)
