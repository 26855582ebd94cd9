"""The order in which layers of 4 bits are ranked: by the noise that they add to the residual stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from belle_compile.passes.calibration.stream_noise import stream_noise
from belle_compile.passes.quantization.scheme import INT4, MoreBits
from belle_compile.passes.quantization.use_more_bits import UseMoreBits
from tests.passes.helpers import llama

SEQUENCES = ((1, 2, 3, 4, 5, 6, 7, 8), (9, 10, 11))


def scaled(model: ir.Model, name: str, factor: float) -> ir.Model:
    value = model.graph.initializers[name]
    assert value.const_value is not None
    value.const_value = ir.Tensor(value.const_value.numpy() * np.float32(factor), name=name)
    return model


def test_units_and_their_order(tmp_path: Path) -> None:
    """Linears that read the same input are one unit; the head is none. Greater weights add more noise."""
    found = stream_noise(llama(), SEQUENCES, tmp_path, INT4)
    names = [name for unit in found for name in unit.linears]
    assert len(found) == 2 * 4 and len(names) == len(set(names)) == 2 * 7
    assert ("layers.0.attn.q", "layers.0.attn.k", "layers.0.attn.v") in [unit.linears for unit in found]
    assert [unit.noise / unit.weights for unit in found] == sorted((unit.noise / unit.weights for unit in found), reverse=True)
    loud = stream_noise(scaled(llama(), "layers.1.mlp.down.weight", 30), SEQUENCES, tmp_path / "loud", INT4)
    assert {loud[0].linears, loud[1].linears} == {("layers.1.mlp.down",), ("layers.1.mlp.gate", "layers.1.mlp.up")}
    assert found[0].linears not in (loud[0].linears, loud[1].linears)


def test_weights_without_rounding_errors_add_none(tmp_path: Path) -> None:
    model, name = llama(layers=1), "layers.0.attn.o"
    value = model.graph.initializers[f"{name}.weight"]
    integers = np.random.default_rng(0).integers(-7, 8, (32, 32)).astype(np.float32)
    integers[:, 0] = -8
    value.const_value = ir.Tensor(integers / 32, name=f"{name}.weight")
    noise = {unit.linears: unit.noise for unit in stream_noise(model, SEQUENCES, tmp_path, INT4)}
    assert noise.pop((name,)) == pytest.approx(0, abs=1e-9) and all(each > 1e-6 for each in noise.values())


def test_linears_with_int8_weights_are_not_ranked(tmp_path: Path) -> None:
    model = llama(layers=1)
    UseMoreBits(MoreBits((), ("layers.0.mlp.down",))).run(model)
    done: list[tuple[int, int]] = []
    found = stream_noise(model, SEQUENCES, tmp_path, INT4, lambda *each: done.append(each))
    assert "layers.0.mlp.down" not in [name for unit in found for name in unit.linears]
    assert done[0][0] == 0 and done[-1][0] == done[-1][1] == len(done) - 1
