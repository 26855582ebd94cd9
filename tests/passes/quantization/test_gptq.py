"""GPTQ: its arithmetic, and the pass that runs it through a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir import stream
from belle_compile.compiler.ir.activation_files import ActivationFiles
from belle_compile.compiler.ir.constants import GROUP
from belle_compile.passes.base import PassResult
from belle_compile.passes.calibration.data import CalibrationData
from belle_compile.passes.quantization import gptq
from belle_compile.passes.quantization.gptq_rounding import GptqRounding
from belle_compile.passes.quantization.quantize_groups import QuantizeGroups
from belle_compile.passes.quantization.quantize_linears import QuantizeLinears
from belle_compile.passes.quantization.scheme import INT4, WeightScheme
from belle_compile.passes.quantization.weights import product, quantize_groups
from tests.passes.helpers import VOCABULARY, assert_same_results, bloom, check_pass, llama, side_by_side

SEQUENCES = tuple(tuple(np.random.default_rng(n).integers(0, VOCABULARY, 24).tolist()) for n in range(16))


def data(folder: Path, **changes: object) -> CalibrationData:
    return CalibrationData(**{"sequences": SEQUENCES, "digest": "a set", "checkpoint": "a model", "folder": folder} | changes)  # type: ignore[arg-type]


def correlated(outputs: int = 24, inputs: int = 160) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs [512, K] of which many depend on each other."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(inputs // 8, inputs, generator=generator)
    x = torch.randn(512, inputs // 8, generator=generator) @ mixing + 0.1 * torch.randn(512, inputs, generator=generator)
    return torch.randn(outputs, inputs, generator=generator), x


def error(weight: torch.Tensor, rounded: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor) -> float:
    integers, scales = rounded
    return float((x @ (integers * scales[:, None] - weight).T).square().sum())


def nearest(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = weight.abs().amax(dim=1) / 127
    return torch.round(weight / scales[:, None]), scales


def test_outputs_change_less_than_with_the_nearest_integers() -> None:
    weight, x = correlated()
    rounded = gptq.round_weight(weight, x.T @ x, 0.01)
    assert rounded[0].dtype == torch.int8 and rounded[0].abs().max() <= 127
    assert error(weight, rounded, x) < 0.25 * error(weight, nearest(weight), x)


def simple_gptq(weight: torch.Tensor, hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """The integers of GPTQ as its paper has it: one input after the other, by the factor of the inverse, in float64."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    left, matrix = weight[:, order].double(), hessian[order][:, order].double()
    matrix += damping * matrix.diagonal().mean() * torch.eye(len(matrix))
    factor = torch.linalg.cholesky(torch.linalg.inv(matrix), upper=True)
    scales, integers = nearest(weight)[1].double(), torch.empty_like(left)
    for k in range(len(matrix)):
        integers[:, k] = torch.round(left[:, k] / scales).clamp(-127, 127)
        error = (left[:, k] - integers[:, k] * scales) / factor[k, k]
        left[:, k:] -= error[:, None] * factor[k, k:]
    return integers[:, torch.argsort(order)]


@pytest.mark.parametrize("inputs", [16, 160, 296])
def test_it_comes_to_the_integers_of_the_paper(inputs: int) -> None:
    """Blocks, and a factor of the matrix in place of its inverse, change hardly an integer: where float32 rounds otherwise."""
    weight, x = correlated(inputs=inputs)
    found, scales = gptq.round_weight(weight, x.T @ x, 0.01, clips=(1.0,))
    expected = simple_gptq(weight, x.T @ x, 0.01)
    assert (found != expected).float().mean() < 0.01
    assert error(weight, (found, scales), x) == pytest.approx(error(weight, (expected.float(), scales), x), rel=0.01)


def test_without_correlation_it_is_rounding_to_nearest() -> None:
    weight, _ = correlated()
    integers, scales = gptq.round_weight(weight, torch.eye(160), 0.0, clips=(1.0,))
    expected, expected_scales = nearest(weight)
    assert torch.equal(integers.float(), expected) and torch.equal(scales, expected_scales)


def test_integers_stay_what_they_are() -> None:
    _, x = correlated()
    integers = torch.randint(-127, 128, (24, 160), generator=torch.Generator().manual_seed(1)).float()
    integers[:, 0] = 127
    found, scales = gptq.round_weight(integers / 64, x.T @ x, 0.01)
    assert torch.equal(found.float(), integers) and torch.equal(scales, torch.full((24,), 1 / 64))


def test_inputs_that_are_always_zero_and_rows_of_zeros() -> None:
    weight, x = correlated()
    x[:, 5] = 0
    weight[3] = 0
    integers, scales = gptq.round_weight(weight, x.T @ x, 0.01)
    assert torch.isfinite(scales).all() and not integers[3].any()
    assert error(weight, (integers, scales), x) < error(weight, nearest(weight.clamp(min=1e-9)), x)


def test_rows_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = correlated()
    whole = gptq.round_weight(weight, x.T @ x, 0.01)
    monkeypatch.setattr(gptq, "ROWS", 7)
    parts = gptq.round_weight(weight, x.T @ x, 0.01)
    assert torch.equal(whole[1], parts[1])
    # Sums of another length may round otherwise in float32, which moves a value that lies between two integers.
    assert (whole[0] != parts[0]).float().mean() < 0.01


def test_a_smaller_scale_is_taken_where_it_pays() -> None:
    weight = torch.full((1, 1000), 0.0995)
    weight[0, 0] = 12.7  # absmax / 127 = 0.1: all others round up by half a hundredth, 900 times
    importance = torch.full((1000,), 1e-3)
    importance[0] = 1e-9
    assert gptq.scales_of(weight, importance, (1.0, 0.995))[0] == pytest.approx(0.0995)
    assert gptq.scales_of(weight, importance, (1.0,))[0] == pytest.approx(0.1)


def test_text(tmp_path: Path, golden: Callable[[str, str], None]) -> None:
    """Tensors are those of the products; what they hold is in their meta, for the passes that quantize."""
    model, step = llama(layers=1, last_norm=True), GptqRounding(data(tmp_path))
    before, result = check_pass(step, model)
    assert result == PassResult(7 + 1)
    golden("gptq-rounding", side_by_side(before, step, model))


def test_linears_keep_the_integers(tmp_path: Path) -> None:
    """What QuantizeLinears multiplies is what the pass has chosen, exactly."""
    model = llama(last_norm=True)
    before, result = check_pass(GptqRounding(data(tmp_path)), model)
    assert result == PassResult(7 * 2 + 1)
    assert_same_results(before, model, rtol=0.02)
    weights = {str(node.name): node.inputs[1] for node in model.graph if node.op_type == "Gemm"}
    products = {name: value.const_value.numpy().copy() for name, value in weights.items()}
    assert QuantizeLinears().run(model).changes == len(products)
    for node in model.graph:
        if node.op_type == "Dequantize":
            integers, scale = node.inputs[0].producer().inputs[1], node.inputs[2]
            product = integers.const_value.numpy() * scale.const_value.numpy()[:, None]
            assert np.array_equal(product, products[str(node.name)])


def grouped_error(weight: torch.Tensor, integers: torch.Tensor, scales: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (product(integers, scales, GROUP) - weight).T).square().sum())


@pytest.mark.parametrize("inputs", [160, 256, 300])
def test_int4_outputs_change_less_than_with_the_nearest_integers(inputs: int) -> None:
    weight, x = correlated(inputs=inputs // 8 * 8)
    rounded = gptq.round_weight(weight, x.T @ x, 0.01, group=GROUP)
    assert rounded[0].dtype == torch.int8 and rounded[0].min() >= -8 and rounded[0].max() <= 7
    assert rounded[1].dtype == torch.float16 and rounded[1].shape == (24, -(-weight.shape[1] // 128))
    plain = map(torch.from_numpy, quantize_groups(weight.numpy(), "w", GROUP))
    assert grouped_error(weight, *rounded, x) < 0.35 * grouped_error(weight, *plain, x)


def test_int4_without_correlation_is_rounding_to_nearest() -> None:
    weight, _ = correlated(inputs=304)
    integers, scales = gptq.round_weight(weight, torch.eye(304), 0.0, group=GROUP)
    expected, expected_scales = quantize_groups(weight.numpy(), "w", GROUP)
    assert np.array_equal(integers.numpy(), expected) and np.array_equal(scales.numpy(), expected_scales)


def test_int4_scales_belong_to_neighbours_whatever_the_order_of_rounding() -> None:
    """Integers come back, though inputs of both groups take turns."""
    generator = torch.Generator().manual_seed(1)
    integers = torch.randint(-8, 8, (24, 256), generator=generator).float()
    integers[:, ::100] = -8
    steps = torch.tensor([0.5, -0.125]).repeat_interleave(128)
    hessian = torch.diag(torch.rand(256, generator=generator) + 0.5)
    found, scales = gptq.round_weight(integers * steps, hessian, 0.01, group=GROUP)
    assert torch.equal(found.float(), integers) and scales.unique().tolist() == [-0.125, 0.5]


@pytest.mark.parametrize("scheme", [INT4, WeightScheme(4, 20)], ids=str)
def test_layers_keep_int4_integers_and_the_head_int8_ones(tmp_path: Path, scheme: WeightScheme) -> None:
    model = llama(last_norm=True)
    step = GptqRounding(data(tmp_path), weights=scheme)
    assert step.options.items() >= {"weight_bits": 4}.items() and step.options.get("group", GROUP) == scheme.group
    _, result = check_pass(step, model)
    assert result == PassResult(7 * 2 + 1)
    weights = {str(node.name): node.inputs[1] for node in model.graph if node.op_type == "Gemm"}
    products = {name: value.const_value.numpy().copy() for name, value in weights.items()}
    assert QuantizeGroups(weights=scheme).run(model).changes == 7 * 2 and QuantizeLinears().run(model).changes == 1
    seen = set()
    for node in model.graph:
        if node.op_type == "GroupQuantizedLinear":
            wq, ws = (value.const_value.numpy() for value in node.inputs[2:4])
            seen.add(str(node.name))
            found = product(torch.from_numpy(wq.astype(np.int8)), torch.from_numpy(ws.copy()), scheme.group)
            assert np.array_equal(found.numpy(), products[str(node.name)])
    assert seen == products.keys() - {"lm_head"}


def test_schemes_that_it_does_not_know(tmp_path: Path) -> None:
    message = (
        r"option weights of GPTQ: found int4 per output channel, expected int8 per output channel or int4 in groups of 128"
    )
    with pytest.raises(CompileError, match=message):
        GptqRounding(data(tmp_path), weights=WeightScheme(4))
    with pytest.raises(CompileError, match=r"found int4 in groups of 128 inputs with zero points"):
        GptqRounding(data(tmp_path), weights=replace(INT4, zero_points=True))


def test_a_tied_head_is_refused(tmp_path: Path) -> None:
    _, result = check_pass(GptqRounding(data(tmp_path)), bloom(last_norm=True))
    assert result.changes == 4 * 2
    assert result.refusals == ("lm_head: its weight is also read by embed",)


def test_a_quantized_graph_is_left_alone(tmp_path: Path) -> None:
    model = llama()
    QuantizeLinears().run(model)
    _, result = check_pass(GptqRounding(data(tmp_path)), model)
    assert result == PassResult() and not list(tmp_path.iterdir())


def test_it_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    heard: list[int] = []

    class Killed(BaseException):
        pass

    def kill_at_three(done: int, total: int) -> None:
        if done >= 3 * 16 * 24:
            raise Killed

    def chosen(model: object) -> dict[str, np.ndarray]:
        return {str(node.name): node.inputs[1].const_value.numpy() for node in model.graph if node.op_type == "Gemm"}  # type: ignore[attr-defined]

    with pytest.raises(Killed):
        GptqRounding(data(tmp_path / "a", on_progress=kill_at_three)).run(llama())
    resumed, whole, other = llama(), llama(), llama()
    GptqRounding(data(tmp_path / "a", on_progress=lambda done, total: heard.append(done // (16 * 24)))).run(resumed)
    assert heard == [3, 4, 5, 6, 7, 8, 9]  # of each layer four segments, and the head
    GptqRounding(data(tmp_path / "b")).run(whole)
    assert all(np.array_equal(array, chosen(whole)[name]) for name, array in chosen(resumed).items())
    heard.clear()
    again = data(tmp_path / "a", digest="another set", on_progress=lambda done, total: heard.append(done // (16 * 24)))
    GptqRounding(again).run(other)
    assert heard == list(range(10))


@pytest.mark.parametrize("last", [1, 4, 7, 9])
def test_it_goes_on_where_it_was_killed_while_it_wrote(last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed build left in a file that it wrote over another is not read."""
    write, written = ActivationFiles.write, 0

    def write_half(self: ActivationFiles, name: str, tensor: torch.Tensor) -> None:
        nonlocal written
        written += 1
        write(self, name, tensor if written < last else torch.zeros_like(tensor))
        if written == last:
            raise KeyboardInterrupt

    monkeypatch.setattr(ActivationFiles, "write", write_half)
    with pytest.raises(KeyboardInterrupt):
        GptqRounding(data(tmp_path / "a")).run(llama())
    monkeypatch.undo()
    resumed, whole = llama(), llama()
    GptqRounding(data(tmp_path / "a")).run(resumed)
    GptqRounding(data(tmp_path / "b")).run(whole)
    assert all(np.array_equal(one, other) for one, other in zip(products_of(resumed), products_of(whole), strict=True))


def test_batches_at_the_same_time_change_nothing(tmp_path: Path) -> None:
    """Four batches, run one after the other and by three threads."""
    chosen, before = [], torch.get_num_threads()
    sequences = tuple(tuple(np.random.default_rng(n).integers(0, VOCABULARY, 1500).tolist()) for n in range(4))
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            model = llama(layers=1)
            GptqRounding(data(tmp_path / str(threads), sequences=sequences)).run(model)
            chosen.append(products_of(model))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(one, other) for one, other in zip(*chosen, strict=True))


def products_of(model: ir.Model) -> list[np.ndarray]:
    """The weights of the linears."""
    return [node.inputs[1].const_value.numpy() for node in model.graph if node.op_type == "Gemm"]


def test_products_of_bfloat16_observe_as_well_as_those_of_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The predictions of the rounded model are as near to those of the model, whichever the processor has."""
    exact = every_logit(llama(last_norm=True), tmp_path / "exact")
    divergences, weights = [], []
    for coarse in (False, True):
        monkeypatch.setattr(stream, "multiplies_bfloat16", lambda device, coarse=coarse: coarse)
        model = llama(last_norm=True)
        GptqRounding(data(tmp_path / str(coarse))).run(model)
        weights.append(products_of(model))
        found = every_logit(model, tmp_path / "rounded")
        divergences.append(float((exact.exp() * (exact - found)).sum(-1).mean()))
    assert any(not np.array_equal(fine, coarse) for fine, coarse in zip(*weights, strict=True))
    assert divergences[1] == pytest.approx(divergences[0], rel=0.1)


def every_logit(model: ir.Model, folder: Path) -> torch.Tensor:
    """The log-probabilities after every token that calibrates."""
    found: dict[int, torch.Tensor] = {}
    activations = stream.ActivationStream(model, SEQUENCES, folder)
    for number in range(len(activations.segments)):
        activations.forward(number, activations.load(number), on_logits=found.__setitem__)
        activations.drop(number)
    return torch.log_softmax(torch.stack([found[i] for i in range(len(SEQUENCES))]), -1)


def test_weights_that_are_not_numbers(tmp_path: Path) -> None:
    model = llama()
    weight = next(node for node in model.graph if node.op_type == "Gemm").inputs[1].const_value.numpy()
    weight[0, 0] = np.nan
    with pytest.raises(CompileError, match=r"the weight of layers.0.attn.q: found NaN or infinity"):
        GptqRounding(data(tmp_path)).run(model)
