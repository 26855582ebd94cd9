"""The presets on whole models, and what a pipeline does when a pass goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.lazy import lazy
from belle_compile.compiler.ir.text import to_text
from belle_compile.compiler.ir.verify import verify
from belle_compile.passes.base import Pass, PassResult
from belle_compile.passes.pipeline import FUSION, run_pipeline
from tests.passes.helpers import assert_same_results, bloom, count, llama
from tests.pipelines import PIPELINES

normed_llama, normed_bloom = partial(llama, last_norm=True), partial(bloom, last_norm=True)
MODELS = {"llama": normed_llama, "bloom": normed_bloom}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("preset", PIPELINES)
def test_text(golden: Callable[[str, str], None], name: str, preset: str) -> None:
    model = MODELS[name](layers=1)
    run_pipeline(model, PIPELINES[preset])
    golden(f"pipeline-{preset}-{name}", to_text(model))


@pytest.mark.parametrize("preset", [preset for preset in PIPELINES if preset != "none"])
@pytest.mark.parametrize("make", [normed_llama, normed_bloom, lambda: bloom(residual_after_norm=True)])
def test_fusions_of_int8_change_no_bit(make: Callable[[], ir.Model], preset: str) -> None:
    quantized, fused = make(), make()
    run_pipeline(quantized, PIPELINES[preset][: -len(FUSION)])
    run_pipeline(fused, PIPELINES[preset])
    assert_same_results(quantized, fused)
    assert count(fused, "QuantizedLinear") and not count(fused, "IntegerLinear") + count(fused, "Gemm")


@pytest.mark.parametrize("make", [normed_llama, normed_bloom, lambda: bloom(residual_after_norm=True)])
def test_results_of_presets(make: Callable[[], ir.Model]) -> None:
    for preset, rtol in (("none", 2e-6), ("int8", 0.06), ("int8-plain", 0.06), ("int8-accurate", 0.03), ("int4", 0.4)):
        model = make()
        run_pipeline(model, PIPELINES[preset])
        assert_same_results(make(), model, rtol=rtol)


def test_records() -> None:
    records = run_pipeline(bloom(residual_after_norm=True), PIPELINES["int8"])
    assert [record["name"] for record in records] == [step.name for step in PIPELINES["int8"]]
    assert json.loads(json.dumps(records)) == records
    by_name = {record["name"]: record for record in records}
    options = {"keep": [], "activation_bits": 8, "wide": []}
    assert by_name["quantize-linears"] == {"name": "quantize-linears", "options": options, "changes": 9, "refusals": []}
    assert len(by_name["fuse-norm-quantize"]["refusals"]) == 4


def test_dump(tmp_path: Path) -> None:
    model = llama(layers=1)
    first = to_text(model)
    run_pipeline(model, PIPELINES["none"], tmp_path / "ir")
    stages = ["00-frontend", "01-remove-identities", "02-merge-duplicates", "03-remove-unused"]
    stages += ["04-fuse-projections", "05-fuse-add-norm"]
    assert sorted(path.name for path in (tmp_path / "ir").iterdir()) == [
        f"{s}.{kind}" for s in stages for kind in ("onnx", "txt")
    ]
    assert (tmp_path / "ir/00-frontend.txt").read_text() == first
    assert (tmp_path / "ir/05-fuse-add-norm.txt").read_text() == to_text(model)
    graph = onnx.load(str(tmp_path / "ir/05-fuse-add-norm.onnx"), load_external_data=False).graph
    assert [node.op_type for node in graph.node] == [node.op_type for node in model.graph]


@dataclass(frozen=True)
class LeavesWrongShape(Pass):
    """A bug: records another width than the op computes."""

    def run(self, model: ir.Model) -> PassResult:
        model.graph.node("embed").outputs[0].shape = ir.Shape(["T", 31])
        return PassResult(1)


@dataclass(frozen=True)
class Crashes(Pass):
    """A bug: raises."""

    def run(self, model: ir.Model) -> PassResult:
        raise KeyError("weight")


def test_error_names_the_failing_pass_and_those_before_it() -> None:
    passes = [*PIPELINES["none"][:2], LeavesWrongShape(), *PIPELINES["none"][2:]]
    with pytest.raises(
        CompileError,
        match=r"passes: leaves-wrong-shape failed \(node embed\): found verify: output embed .*expected float32\[T, 32\]; "
        r"passes that ran before it: remove-identities, merge-duplicates\.$",
    ):
        run_pipeline(bloom(), passes)


def test_error_of_a_crash() -> None:
    with pytest.raises(
        CompileError, match=r"passes: crashes failed: found KeyError: 'weight'; passes that ran before it: none\.$"
    ):
        run_pipeline(bloom(), [Crashes()])


@pytest.mark.parametrize("preset", PIPELINES)
@pytest.mark.parametrize("name", MODELS)
def test_no_weight_is_read_while_compiling(name: str, preset: str) -> None:
    model = MODELS[name]()

    def never() -> np.ndarray:
        raise AssertionError("a pass read a weight")

    for key, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if tensor.dtype != ir.DataType.INT64:
            value.const_value = lazy(key, never, tensor.shape.numpy(), tensor.dtype)
    run_pipeline(model, PIPELINES[preset])


def test_graphs_stay_readable_by_onnx() -> None:
    for make in MODELS.values():
        model = make()
        run_pipeline(model, PIPELINES["int8"])
        verify(ir.from_proto(ir.to_proto(model)))
