"""KeepIntegers: which integers of a checkpoint the layouts of weights can hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from belle_compile.compiler.ir.lazy import lazy
from belle_compile.compiler.ir.quantized import Grid, QuantizedRows, QuantizedTensor
from belle_compile.compiler.ir.text import to_text
from belle_compile.passes.base import PassResult
from belle_compile.passes.quantization.keep_integers import KeepIntegers
from belle_compile.passes.quantization.quantize_groups import QuantizeGroups
from belle_compile.passes.quantization.quantize_linears import QuantizeLinears
from belle_compile.passes.quantization.scheme import INT4, INT8, WeightScheme
from tests.passes.helpers import Tiny, assert_same_results, llama

INPUTS, OUTPUTS = 32, 24


def held(
    bits: int = 8, group: int | None = INPUTS, zero: int = 0, *, scale: Any = None, offsets: bool = False
) -> QuantizedTensor:
    """Random integers of the whole range. Their zero points are 0, and `zero` for one output."""
    random = np.random.default_rng(bits)
    middle = 1 << (bits - 1)
    integers = random.integers(-middle, middle, (OUTPUTS, INPUTS)).astype(np.int8)
    groups = INPUTS // (group or 8)
    scales = (
        random.uniform(0.5, 1, (OUTPUTS, groups)).astype(np.float16) if scale is None else np.full((OUTPUTS, groups), scale)
    )
    zeros = np.zeros((OUTPUTS, groups), np.int8)
    zeros[3] = zero
    rows = QuantizedRows(
        integers, scales, zeros, scales if offsets else None, None if group else random.permutation(INPUTS) // 8
    )

    def load(start: int, stop: int) -> QuantizedRows:
        grid = rows.grid.taken(np.arange(start, stop))
        return QuantizedRows(rows.integers[start:stop], grid.scales, grid.zero_points, grid.offsets, rows.group_of)

    return QuantizedTensor((OUTPUTS, INPUTS), bits, group, load, lambda: rows.grid)


def graph_of(source: QuantizedTensor) -> ir.Model:
    """A linear whose weight a checkpoint holds as integers, and a head with floats."""
    b = Tiny()
    weight = lazy("kept.weight", source.numpy, source.shape, np.float32, source.rows, quantized=source)
    x = b.op("Gemm", b.x, b.weight("kept.weight", weight), name="kept", transB=1)
    return b.head(b.linear(x, "other", INPUTS))


def integers_after(model: ir.Model, step: KeepIntegers, kind: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Integers and scales of the linear once the passes that quantize ran."""
    assert step.run(model) == PassResult(1)
    assert step.run(model) == PassResult(0)
    if kind == "int4":
        QuantizeGroups(weights=step.weights).run(model)
    QuantizeLinears().run(model)
    scales = model.graph.initializers[f"kept.weight.{'scale' if kind == 'int8' else 'scales'}"].const_value
    integers = model.graph.initializers[f"kept.weight.{kind}"].const_value
    assert integers is not None and scales is not None
    return integers.numpy().astype(np.int8), scales.numpy()


@pytest.mark.parametrize(("bits", "zero"), [(8, 0), (4, 0), (4, -8), (3, 3), (2, 1)])
def test_int8_takes_integers_less_their_zero_points(bits: int, zero: int) -> None:
    source = held(bits, zero=zero)
    integers, scales = integers_after(graph_of(source), KeepIntegers(), "int8")
    expected = source.read()
    assert expected.zero_points is not None and scales.dtype == np.float32
    np.testing.assert_array_equal(integers, expected.integers.astype(np.int64) - expected.zero_points)
    np.testing.assert_array_equal(scales, expected.scales[:, 0].astype(np.float32))
    model = graph_of(source)
    KeepIntegers().run(model)
    QuantizeLinears().run(model)
    assert_same_results(graph_of(source), model, rtol=0.03)


@pytest.mark.parametrize("group", [16, 32])
def test_int4_repeats_scales_of_larger_groups(group: int) -> None:
    source = held(4, group)
    integers, scales = integers_after(graph_of(source), KeepIntegers(weights=WeightScheme(4, 16)), "int4")
    np.testing.assert_array_equal(integers, source.read().integers)
    np.testing.assert_array_equal(scales, np.repeat(source.read().scales, group // 16, axis=1))
    assert scales.dtype == np.float16


REFUSED: dict[str, tuple[KeepIntegers, QuantizedTensor, str]] = {
    "groups": (KeepIntegers(), held(8, 16), "a scale for every 16 inputs, where int8 has one for each output"),
    "small groups": (
        KeepIntegers(weights=WeightScheme(4, 32)), held(4, 16),
        "a scale for every 16 inputs, where int4 has one for 32",
    ),
    "order": (
        KeepIntegers(), held(8, None),
        "inputs in an order of their own (act-order), which groups of neighbours do not have",
    ),
    "offsets": (KeepIntegers(), held(8, offsets=True), "offsets, which the layout has no place for"),
    "zero points": (
        KeepIntegers(), held(8, zero=1),
        "8 bits with zero points, that is integers from -129 to 127, where int8 has -128 to 127",
    ),
    "bits": (
        KeepIntegers(weights=INT4), held(8),
        "8 bits, that is integers from -128 to 127, where int4 has -8 to 7",
    ),
    "planes": (
        KeepIntegers(activation_bits=16), held(8),
        "8 bits, that is integers from -128 to 127, where int8 has -127 to 127",
    ),
    "scales": (KeepIntegers(weights=INT4), held(4, scale=np.float32(0.1)), "scales that float16 does not represent"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_a_layout_cannot_hold(case: str) -> None:
    step, source, reason = REFUSED[case]
    model = graph_of(source)
    assert step.run(model) == PassResult(0, (f"kept: {reason}",))


def test_a_grid_is_read_without_integers() -> None:
    """Whether integers are kept is decided before they are read; they are read whole where the format has no other way."""
    source = held(4)
    calls: list[str] = []

    def load(start: int, stop: int) -> QuantizedRows:
        calls.append("integers")
        return source.load(start, stop)

    def grid() -> Grid:
        calls.append("grid")
        return source.grid()

    KeepIntegers().run(graph_of(replace(source, load=load, load_grid=grid)))
    assert calls == ["grid"]
    np.testing.assert_array_equal(replace(source, load=load, load_grid=None).grid().scales, source.grid().scales)


def test_graphs_without_integers_and_linears_to_keep_stay_as_they_are() -> None:
    for step, model in ((KeepIntegers(), llama()), (KeepIntegers(keep=("ke*",)), graph_of(held()))):
        before = to_text(model)
        assert step.run(model) == PassResult(0) and to_text(model) == before
        assert not any(value.meta for value in model.graph.initializers.values())
    assert KeepIntegers(weights=INT8).options == {"keep": [], "layout": "int8 per output channel"}
