"""Lazy weights: reading, keeping, parts, and the steps by which they are computed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.build import make_initializer
from belle_compile.compiler.ir.lazy import (
    Shared,
    WeightError,
    describe,
    errors_about,
    keeping,
    lazy,
    made_of,
    part_of,
    quantized_source,
    read_rows,
    wholes_kept,
)
from belle_compile.compiler.ir.quantized import QuantizedRows, QuantizedTensor

FILE = "model-00001-of-00002.safetensors: model.layers.0.up.weight"


def test_lazy_reads_on_every_use_and_checks_what_it_gets() -> None:
    reads = []

    def compute() -> np.ndarray:
        reads.append(1)
        return np.zeros((2, 3), np.float32)

    tensor = lazy("w", compute, (2, 3), np.float32)
    assert not reads and tensor.shape == (2, 3) and tensor.dtype == ir.DataType.FLOAT
    assert tensor.numpy().shape == tensor.numpy().shape == (2, 3) and len(reads) == 2
    wrong = lazy("w", compute, (3, 2), np.float32)
    with pytest.raises(CompileError, match=r"weights: tensor w: found float32\[2, 3\], expected float32\[3, 2\]"):
        wrong.numpy()
    with pytest.raises(CompileError, match=r"found float32\[2, 3\], expected int8\[2, 3\]"):
        lazy("w", compute, (2, 3), np.int8).numpy()


def test_values_read_last_are_kept_inside_of_keeping() -> None:
    computed = []

    def tensor(name: str) -> ir.LazyTensor:
        def compute() -> np.ndarray:
            computed.append(name)
            return np.zeros(25, np.float32)

        return lazy(name, compute, (25,), np.float32)

    a, b, c = map(tensor, "abc")
    with keeping(200):
        assert [each.numpy().nbytes for each in (a, b, a, b)] == [100] * 4 and computed == ["a", "b"]
        with pytest.raises(ValueError, match="read-only"):
            a.numpy()[0] = 1
        c.numpy(), a.numpy()  # b was read before a, and goes
        assert computed == ["a", "b", "c"]
        b.numpy()
        assert computed == ["a", "b", "c", "b"]
    with keeping(99):
        a.numpy(), a.numpy()
        assert computed[4:] == ["a", "a"]
    a.numpy()[0] = 1
    assert computed[6:] == ["a"]


def test_shared_keeps_the_last_source_only() -> None:
    computed = []

    def source(name: str) -> Shared:
        def compute() -> tuple[np.ndarray, ...]:
            computed.append(name)
            return np.array([1]), np.array([2])

        return Shared(compute)

    first, second = source("first"), source("second")
    assert (first[0], first[1], second[1], second[0]) == (1, 2, 2, 1) and computed == ["first", "second"]
    assert first[0] == 1 and computed == ["first", "second", "first"]


def test_parts_of_a_tensor() -> None:
    reads = []

    def read() -> np.ndarray:
        reads.append(1)
        return np.arange(24, dtype=np.float32).reshape(4, 6)

    whole = lazy("whole", read, (4, 6), np.float32)
    rows, columns = part_of(whole, [(0, 1), (3, 4)], 0, "rows"), part_of(whole, [(2, 4)], 1, "columns")
    assert (rows.name, list(rows.shape), list(columns.shape)) == ("rows", [2, 6], [4, 2]) and not reads
    np.testing.assert_array_equal(rows.numpy(), read()[[0, 3]])
    np.testing.assert_array_equal(columns.numpy(), read()[:, 2:4])
    reads.clear()
    with wholes_kept():
        for tensor in (rows, columns, rows):
            tensor.numpy()
        assert len(reads) == 1
        assert not part_of(whole, [(0, 4)], 0, "all").numpy().flags.writeable, "others read the same memory"
    rows.numpy()
    assert len(reads) == 2


def of_file(name: str, array: np.ndarray, source: str = FILE) -> ir.LazyTensor:
    return lazy(name, lambda: array, array.shape, array.dtype, lambda start, stop: array[start:stop], sources=[source])


def doubled(source: ir.TensorProtocol) -> ir.LazyTensor:
    return lazy(
        f"{source.name}.doubled",
        lambda: 2 * source.numpy(),
        source.shape.numpy(),
        source.dtype,
        step="doubled",
        sources=[source],
    )


def integers(source: ir.TensorProtocol) -> ir.LazyTensor:
    def compute() -> np.ndarray:
        if not np.isfinite(source.numpy()).all():
            raise CompileError("quantize", f"tensor {source.name}", found="NaN", expected="finite weights")
        return source.numpy().astype(np.int8)

    return lazy(f"{source.name}.int8", compute, source.shape.numpy(), ir.DataType.INT8, step="int8", sources=[source])


def test_a_chain_is_described_back_to_its_file() -> None:
    weight = of_file("up", np.ones((2, 3), np.float32))
    assert describe(weight) == f"up <- {FILE}"
    assert describe(integers(doubled(weight))) == f"up.doubled.int8 <- doubled <- {FILE}"
    assert describe(part_of(integers(weight), [(0, 1)], 0, "up.int8")) == f"up.int8 <- int8 <- {FILE}"
    assert describe(ir.Tensor(np.ones(2), name="ones")) == "ones"


def test_a_stack_names_all_of_its_parts() -> None:
    gate, up = of_file("gate", np.ones((2, 3), np.float32), "a.gguf: gate"), of_file("up", np.ones((1, 3), np.float32))
    zeros = lazy("bias", lambda: np.zeros((1, 3), np.int8), (1, 3), np.int8, step="zeros")
    parts = [integers(doubled(gate)), part_of(integers(up), [(0, 1)], 0, "up.int8"), zeros]
    stack = made_of(lazy("gate+up.int8", lambda: np.concatenate([part.numpy() for part in parts]), (4, 3), np.int8), parts)
    assert describe(stack) == f"gate+up.int8 <- (int8 <- doubled <- a.gguf: gate; rows 0:1 <- int8 <- {FILE}; zeros)"


def test_an_error_says_by_which_steps_the_weight_was_computed() -> None:
    nan = of_file("up", np.full((2, 3), np.nan, np.float32))
    fine = of_file("gate", np.ones((2, 3), np.float32), "a.gguf: gate")
    parts = [integers(fine), integers(doubled(nan))]
    stack = made_of(lazy("gate+up.int8", lambda: np.concatenate([part.numpy() for part in parts]), (4, 3), np.int8), parts)
    with pytest.raises(WeightError) as caught:
        stack.numpy()
    assert str(caught.value) == (
        "quantize: tensor up.doubled: found NaN, expected finite weights; "
        f"while computing gate+up.int8 <- int8 <- doubled <- {FILE}."
    )
    assert caught.value.found == "NaN" and caught.value.stage == "quantize"


def test_an_error_of_reading_travels_up_the_chain() -> None:
    def load() -> np.ndarray:
        raise CompileError("checkpoint", "weights a.safetensors", found="a file that became shorter", remedy="start again")

    weight = lazy("up", load, (2, 3), np.float32, lambda start, stop: load(), sources=[FILE])
    expected = (
        "checkpoint: weights a.safetensors: found a file that became shorter; start again; "
        "while computing up.doubled.int8 <- doubled <- "
    )
    with pytest.raises(WeightError) as caught:
        integers(doubled(weight)).numpy()
    assert str(caught.value) == f"{expected}{FILE}."
    with pytest.raises(WeightError, match="start again; while computing up <- model-00001"):
        read_rows(weight, 0, 1)
    both = Shared(lambda: (doubled(weight).numpy(),))
    shared = lazy("up.int8", lambda: both[0], (2, 3), np.int8, step="int8", sources=[doubled(weight)])
    with pytest.raises(WeightError, match=r"while computing up\.int8 <- doubled <- model-00001"):
        shared.numpy()


def test_errors_about_a_tensor_that_was_read_before() -> None:
    weight = doubled(of_file("up", np.ones((2, 3), np.float32)))
    with pytest.raises(WeightError, match=r"calibrate: a weight: found NaN; while computing up\.doubled <- model-00001"):
        with errors_about(weight):
            raise CompileError("calibrate", "a weight", found="NaN")


def test_only_what_a_file_holds_has_a_quantized_source() -> None:
    held = QuantizedRows(np.ones((2, 4), np.int8), np.ones((2, 2), np.float16))
    quantized = QuantizedTensor((2, 4), 4, 2, lambda start, stop: held)
    weight = lazy("up", quantized.numpy, (2, 4), np.float32, sources=[FILE], quantized=quantized)
    rotated = doubled(weight)
    assert quantized_source(make_initializer(weight)) is quantized
    assert quantized_source(make_initializer(rotated)) is None
    assert quantized_source(make_initializer(part_of(weight, [(0, 1)], 0, "up"))) is None
    assert quantized_source(ir.Value(name="computed")) is None
