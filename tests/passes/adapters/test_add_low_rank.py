"""AddLowRank: adapters of the checkpoint's weights, carried through each pass, compute what the merged model does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from belle_compile.compiler.adapter_basis import basis_of
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.meanings import LIMITS
from belle_compile.compiler.ir.signature import Role
from belle_compile.compiler.ir.verify import verify
from belle_compile.passes.adapters.add_low_rank import AddLowRank
from belle_compile.passes.adapters.linears import adapted_linears
from belle_compile.passes.base import Pass, PassResult
from belle_compile.passes.calibration.data import CalibrationData
from belle_compile.passes.quantization.gptq_rounding import GptqRounding
from belle_compile.passes.quantization.quantize_groups import QuantizeGroups
from belle_compile.passes.quantization.quantize_linears import QuantizeLinears
from belle_compile.passes.quantization.smooth_activations import SmoothActivations
from belle_compile.passes.rotation.fold_embedding_norm import FoldEmbeddingNorm
from belle_compile.passes.rotation.fold_layer_norms import FoldLayerNorms
from belle_compile.passes.rotation.reorder_channels import ReorderChannels
from belle_compile.passes.rotation.rotate_activations import RotateActivations
from belle_compile.passes.rotation.rotate_centered_residual import RotateCenteredResidual
from belle_compile.passes.rotation.rotate_residual import RotateResidual
from belle_compile.passes.rotation.rotate_values import RotateValues
from belle_compile.passes.rotation.weights import replace_weight
from belle_compile.runtime.adapters.basis import EngineBasis
from belle_compile.runtime.adapters.factors import Factors
from tests.passes import helpers
from tests.passes.helpers import VOCABULARY, check_pass, count, run_steps, side_by_side

Floats = npt.NDArray[np.float32]
SEQUENCES = tuple(tuple(np.random.default_rng(n).integers(0, VOCABULARY, 24).tolist()) for n in range(8))
RANK = 3
bloom, llama = partial(helpers.bloom, last_norm=True), partial(helpers.llama, last_norm=True)


class Changes:
    """The second of the two sequences has an adapter."""

    def __init__(self, factors: dict[str, Factors]) -> None:
        self._factors = factors

    def factors(self, sequence: int, target: str) -> Factors | None:
        return self._factors.get(target) if sequence == 1 else None


def factors(basis: EngineBasis) -> dict[str, Factors]:
    """Random factors by linear, as in the checkpoint."""
    found = {}
    for seed, (name, linear) in enumerate(sorted(basis.linears.items())):
        random = np.random.default_rng(seed)
        a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((RANK, linear.inputs), (linear.outputs, RANK)))
        found[name] = Factors(a / 4, np.zeros(RANK, np.float32), b / 4)
    return found


def merged(make: Callable[[], ir.Model]) -> ir.Model:
    """The model with all changes merged."""
    model = make()
    basis = basis_of(adapted_linears(model.graph)[0])
    for name, change in factors(basis).items():
        tensor = model.graph.initializers[f"{name}.weight"].const_value
        assert tensor is not None
        tensor.numpy()[...] += change.b @ change.a
    return model


def error(make: Callable[[], ir.Model], passes: list[Pass], edit: Callable[[EngineBasis], EngineBasis] = lambda b: b) -> float:
    """The largest difference of logits, relative to the largest, between graphs with adapters and merged ones."""
    model = make()
    for step in passes:
        assert step.run(model).changes
    basis = edit(basis_of(adapted_linears(model.graph)[0]))
    check_pass(AddLowRank(RANK), model)
    mapped = {name: basis.factors(name, change.a, change.b) for name, change in factors(basis).items()}
    found, plain, whole = (run_steps(each, Changes(mapped)) for each in (model, make(), merged(make)))
    scale = max(np.abs(logits).max() for logits in whole)
    # Logits are those of one row of each sequence; the first one has no adapter.
    differences = [np.abs(f - np.stack([p[0], w[1]])).max() for f, p, w in zip(found, plain, whole, strict=True)]
    assert max(np.abs(w[1] - p[1]).max() for w, p in zip(whole, plain, strict=True)) > 0.2 * scale
    return float(max(differences) / scale)


def data(folder: Path) -> CalibrationData:
    return CalibrationData(SEQUENCES, "a set", "a model", folder)


FOLDED: list[Pass] = [FoldEmbeddingNorm(), FoldLayerNorms()]
FLOAT: dict[str, tuple[Callable[[], ir.Model], Callable[[Path], list[Pass]]]] = {
    "nothing": (llama, lambda folder: []),
    "folded norms": (bloom, lambda folder: FOLDED),
    "smoothed llama": (llama, lambda folder: [SmoothActivations(data(folder))]),
    "smoothed and folded": (bloom, lambda folder: [SmoothActivations(data(folder)), *FOLDED]),
    "residual": (llama, lambda folder: [RotateResidual()]),
    "residual of bloom": (bloom, lambda folder: [*FOLDED, RotateResidual()]),
    "values": (llama, lambda folder: [RotateValues()]),
    "values of bloom": (partial(bloom, residual_after_norm=True), lambda folder: [RotateValues()]),
    "activations": (llama, lambda folder: [RotateActivations(block=16)]),
    "channels": (llama, lambda folder: [ReorderChannels(data(folder))]),
    "channels of bloom": (bloom, lambda folder: [ReorderChannels(data(folder))]),
    "all": (bloom, lambda folder: [SmoothActivations(data(folder)), *FOLDED, RotateResidual(), RotateValues(),
                                   RotateActivations(block=16)]),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOAT)
def test_adapters_follow_every_pass(name: str, tmp_path: Path) -> None:
    make, passes = FLOAT[name]
    assert error(make, passes(tmp_path)) < 2e-5


@pytest.mark.parametrize("kind", ["shift", "scale", "center", "rotate"])
def test_a_change_that_is_left_out_is_found(kind: str, tmp_path: Path) -> None:
    make, passes = FLOAT["all"]

    def broken(basis: EngineBasis) -> EngineBasis:
        name = next(name for name, linear in basis.linears.items() if any(step.kind == kind for step in linear.steps))
        linear = basis.linears[name]
        kept = tuple(step for step in linear.steps if step.kind != kind)
        return EngineBasis({**basis.linears, name: replace(linear, steps=kept)}, basis.tensors)

    assert error(make, passes(tmp_path), broken) > 1e-3


@pytest.mark.parametrize(
    "quantize",
    [lambda folder: [QuantizeLinears()], lambda folder: [QuantizeLinears(activation_bits=16)],
     lambda folder: [GptqRounding(data(folder)), QuantizeLinears()], lambda folder: [QuantizeGroups(), QuantizeLinears()]],
    ids=["int8", "16 bits", "gptq", "int4"],
)  # fmt: skip
def test_integers_have_the_basis_of_the_floats(quantize: Callable[[Path], list[Pass]], tmp_path: Path) -> None:
    passes: list[Pass] = [*FOLDED, RotateResidual(), RotateValues()]
    model, floats = bloom(), bloom()
    for step in (*passes, *quantize(tmp_path)):
        step.run(model)
    for step in passes:
        step.run(floats)
    found, expected = (basis_of(adapted_linears(each.graph)[0]) for each in (model, floats))
    assert found.linears == expected.linears and found.tensors.keys() == expected.tensors.keys()
    check_pass(AddLowRank(RANK), model)
    assert count(model, "QuantizedLowRank") == 8 and count(model, "LowRank") == 0
    assert LIMITS.keys() == {8, 16}


def test_text(golden: Callable[[str, str], None]) -> None:
    model = llama(layers=1)
    QuantizeLinears(keep=("*.down",)).run(model)
    before, result = check_pass(step := AddLowRank(RANK, ("q", "mlp.down")), model)
    assert result == PassResult(2)
    golden("add-low-rank", side_by_side(before, step, model))


def test_the_head_and_unknown_changes_take_none() -> None:
    model = llama(layers=1)
    node = next(node for node in model.graph if node.name == "layers.0.mlp.up")
    replace_weight(node, Role.WEIGHT, lambda weight: weight * 1, model.graph, "doubled")
    _, result = check_pass(AddLowRank(RANK), model)
    assert result == PassResult(6, ("layers.0.mlp.up: takes no adapter, since what was done to its weight is not known",))
    assert "lm_head" not in {node.inputs[0].name for node in model.graph if node.op_type == "LowRank" and node.inputs[0]}
    exported = bloom()
    assert RotateCenteredResidual().run(exported).changes
    linears, refusals = adapted_linears(exported.graph)
    assert len(refusals) == 8 and not linears


def test_targets_that_are_no_linears() -> None:
    with pytest.raises(CompileError, match=r"lora-targets: found query, expected linear layers such as down, gate, k, lm_head"):
        AddLowRank(RANK, ("q", "query")).run(llama(layers=1))


def test_results_are_changed_in_place_only_where_nothing_else_reads_them() -> None:
    model = llama(layers=1)
    AddLowRank(RANK).run(model)
    low_rank = next(node for node in model.graph if node.op_type == "LowRank")
    reader = next(iter(low_rank.outputs[0].consumers()))
    reader.replace_input_with(list(reader.inputs).index(low_rank.outputs[0]), low_rank.inputs[0])
    with pytest.raises(CompileError, match="which is read elsewhere or not computed"):
        verify(model)
