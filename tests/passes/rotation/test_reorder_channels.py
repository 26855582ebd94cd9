"""ReorderChannels: the function stays, and channels of similar size become neighbours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from belle_compile.compiler.ir.stream import ActivationStream, Tensor
from belle_compile.passes.base import PassResult
from belle_compile.passes.calibration.data import CalibrationData
from belle_compile.passes.rotation.reorder_channels import ReorderChannels
from tests.passes.helpers import VOCABULARY, Tiny, assert_same_results, bloom, check_pass, llama, side_by_side

SEQUENCES = tuple(tuple(np.random.default_rng(n).integers(0, VOCABULARY, 24).tolist()) for n in range(8))
ROUNDING = 2e-6  # float32 sums in another order


def reorder(folder: Path) -> ReorderChannels:
    return ReorderChannels(CalibrationData(SEQUENCES, "a set", "a model", folder))


def sizes(model: ir.Model, folder: Path) -> dict[str, npt.NDArray[np.float64]]:
    """The root mean square of each channel that a linear reads, by the linear's name."""
    squares: dict[str, list[Tensor]] = {}

    def observe(node: ir.Node, x: Tensor) -> Tensor:
        squares.setdefault(str(node.name), []).append(x.double().square().sum(dim=0))
        return x

    stream = ActivationStream(model, SEQUENCES, folder)
    for number in range(len(stream.segments)):
        stream.forward(number, stream.load(number), on_linear=observe)
    return {name: np.sqrt(sum(part.numpy() for part in parts)) for name, parts in squares.items()}


def test_text(tmp_path: Path, golden: Callable[[str, str], None]) -> None:
    model = bloom(layers=1, last_norm=True)
    before, result = check_pass(reorder(tmp_path), model)
    assert result == PassResult(2)  # the residual stream and the feed-forward
    golden("reorder-channels", side_by_side(before, reorder(tmp_path), model))


@pytest.mark.parametrize(
    "make",
    [
        lambda: llama(last_norm=True),
        llama,
        lambda: bloom(last_norm=True),
        lambda: bloom(residual_after_norm=True, last_norm=True),
    ],
)
def test_the_function_stays(make: Callable[[], ir.Model], tmp_path: Path) -> None:
    model = make()
    before, result = check_pass(reorder(tmp_path / "pass"), model)
    assert result == PassResult(3)
    assert_same_results(before, model, rtol=ROUNDING)
    found, earlier = sizes(model, tmp_path / "after"), sizes(before, tmp_path / "before")
    sorted_ones = {name for name, each in found.items() if (np.diff(each) >= -1e-6 * each[1:]).all()}
    assert {"lm_head", *(name for name in found if name.endswith("mlp.down"))} <= sorted_ones
    assert not any((np.diff(each) >= 0).all() for each in earlier.values())


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    model = bloom(last_norm=True)
    check_pass(reorder(tmp_path), model)
    head, embedding = (next(node for node in model.graph if node.name == name) for name in ("lm_head", "embed"))
    assert head.inputs[1] is embedding.inputs[0]


def test_what_else_reads_the_channels_is_refused(tmp_path: Path) -> None:
    b = Tiny()
    inner = b.op("Gelu", b.linear(b.x, "up", 48), name="gelu", approximate="tanh")
    both = b.op("Add", b.linear(inner, "down", 32), b.linear(inner, "second", 32), name="both")
    model = b.head(b.op("Gelu", b.op("Add", b.x, both, name="add"), name="last", approximate="tanh"))
    _, result = check_pass(reorder(tmp_path), model)
    assert result.changes == 0
    assert result.refusals[0] == "add: adds something else than the output of a linear"
    assert "gelu: its output is not read by one linear alone" in result.refusals


def test_a_stream_that_an_activation_reads_is_refused(tmp_path: Path) -> None:
    b = Tiny()
    model = b.head(b.op("Gelu", b.x, name="gelu", approximate="tanh"))
    _, result = check_pass(reorder(tmp_path), model)
    assert result.refusals[0] == "gelu: the residual stream is read by Gelu"
