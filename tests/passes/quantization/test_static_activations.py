"""StaticActivations: one scale for all tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.meanings import LIMITS
from belle_compile.passes.calibration.data import CalibrationData
from belle_compile.passes.fusion.fuse_activation_quantize import FuseActivationQuantize
from belle_compile.passes.fusion.fuse_add_norm import FuseAddNorm
from belle_compile.passes.fusion.fuse_norm_quantize import FuseNormQuantize
from belle_compile.passes.quantization.activations import CLIP
from belle_compile.passes.quantization.quantize_groups import QuantizeGroups
from belle_compile.passes.quantization.quantize_linears import QuantizeLinears
from belle_compile.passes.quantization.static_activations import StaticActivations, choose_clip, histogram
from tests.passes.helpers import VOCABULARY, assert_same_results, bloom, check_pass, count, llama, side_by_side

SEQUENCES = tuple(tuple(np.random.default_rng(n).integers(0, VOCABULARY, 24).tolist()) for n in range(8))


def static(folder: Path, clip: str = "mse", bits: int = 8) -> StaticActivations:
    return StaticActivations(CalibrationData(SEQUENCES, "a set", "a model", folder), clip, bits)


@pytest.mark.parametrize("make", [lambda: llama(last_norm=True), lambda: bloom(last_norm=True)])
def test_everything_that_a_linear_reads_gets_a_step(make: Callable[[], ir.Model], tmp_path: Path) -> None:
    model = make()
    before, result = check_pass(static(tmp_path), model)
    read = {node.inputs[0] for node in model.graph if node.op_type == "Gemm"}
    assert result.changes == len(read) and all(value is not None and value.meta[CLIP] > 0 for value in read)
    assert_same_results(before, model)  # the graph is as it was
    QuantizeLinears().run(model)
    steps = [node.inputs[1] for node in model.graph if node.op_type == "QuantizeTokens"]
    assert len(steps) == len(read) and all(step is not None and step.const_value is not None for step in steps)


def test_text(tmp_path: Path, golden: Callable[[str, str], None]) -> None:
    """The pass notes the steps; QuantizeLinears puts them into the graph."""
    model = llama(layers=1)
    before, _ = check_pass(static(tmp_path), model)
    QuantizeLinears().run(model)
    golden("static-activations", side_by_side(before, static(tmp_path), model))


@pytest.mark.parametrize("bits", [8, 16])
def test_fusions_keep_the_step(bits: int, tmp_path: Path) -> None:
    for name, make in (("llama", llama), ("bloom", bloom)):
        model = make(last_norm=True)
        static(tmp_path / name, bits=bits).run(model)
        QuantizeLinears(activation_bits=bits).run(model)
        FuseAddNorm().run(model)
        before, result = check_pass(FuseNormQuantize(), model)
        assert result.changes and not result.refusals
        FuseActivationQuantize().run(model)
        assert count(model, "NormQuantize") and count(model, "AddNormQuantize")
        fused = [node for node in model.graph if str(node.op_type).endswith("Quantize")]
        assert all(str(node.inputs[-1] and node.inputs[-1].name).endswith(".step") for node in fused)
        assert_same_results(before, model)


def test_int4_weights_read_it_too(tmp_path: Path) -> None:
    model = llama()
    static(tmp_path).run(model)
    QuantizeGroups().run(model)
    assert all(len(node.inputs) == 2 for node in model.graph if node.op_type == "QuantizeTokens")


def test_a_killed_run_goes_on_and_another_clip_counts_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = llama(), llama()
    static(tmp_path, "max").run(first)
    monkeypatch.setattr(
        "belle_compile.passes.quantization.static_activations.histogram", lambda x, name: pytest.fail("counted again")
    )
    static(tmp_path, "p50").run(second)
    clips = [{str(v.name): v.meta[CLIP] for node in model.graph for v in node.inputs if v is not None and CLIP in v.meta}
             for model in (first, second)]  # fmt: skip
    assert clips[0].keys() == clips[1].keys() and all(clips[1][name] < clips[0][name] for name in clips[0])


def test_the_clip_of_least_error_is_that_of_a_search() -> None:
    x = torch.from_numpy(np.random.default_rng(0).laplace(size=100_000).astype(np.float32))
    found = choose_clip(histogram(x, "x"), "mse", 8)

    def error(clip: float) -> float:
        step = clip / LIMITS[8]
        return float((torch.clamp(torch.round(x / step), -127, 127) * step - x).square().mean())

    best = min(error(float(clip)) for clip in np.linspace(1, float(x.abs().max()), 400))
    assert found < 0.9 * float(x.abs().max())
    assert error(found) < 1.02 * best


def test_percentiles_and_the_largest() -> None:
    x = torch.cat([torch.arange(1, 1001, dtype=torch.float32), torch.zeros(0)])
    counts = histogram(x, "x")
    assert choose_clip(counts, "max", 8) == pytest.approx(1000, rel=0.03)
    assert choose_clip(counts, "p90", 8) == pytest.approx(900, rel=0.03)


def test_what_cannot_be_calibrated(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r'option clip: found \'p101\', expected "max", "mse" or a percentile'):
        static(tmp_path, "p101")
    with pytest.raises(CompileError, match="what mlp reads: found NaN or infinity, expected finite activations"):
        histogram(torch.tensor([1.0, float("inf")]), "mlp")
