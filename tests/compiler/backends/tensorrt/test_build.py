"""Plans: the same bytes each time, for each compute capability, with the products in INT8; and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from belle_compile.compiler.backends.base import LibraryChoice
from belle_compile.compiler.backends.onnx.graph import OnnxModel, StoredTensor
from belle_compile.compiler.backends.tensorrt import build
from belle_compile.compiler.backends.tensorrt.installed import builder_for
from belle_compile.compiler.backends.tensorrt.layers import layer_reports
from belle_compile.compiler.backends.tensorrt.rules import translate
from belle_compile.compiler.errors import CompileError
from belle_compile.runtime.executors.tensorrt_library import RTX
from belle_compile.runtime.executors.tensorrt_plan import PROFILES, LayerReport, Profile
from tests.compiler.backends.tensorrt.graphs import graph
from tests.parity.lowest_weights import with_lowest_weights

pytest.importorskip("tensorrt_rtx", reason="the extra `tensorrt` is not installed")


def build_plan(model: OnnxModel, arch: str, profiles: Sequence[Profile]) -> memoryview:
    return build.build_plan(model, arch, profiles, builder_for(arch, LibraryChoice(RTX.name))).content


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    _, source = graph("llama_theta", "int8", tmp_path_factory.mktemp("graphs"))
    return translate(source, "float16", 128)


def test_the_same_model_gives_the_same_bytes_and_another_architecture_others(
    model: OnnxModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = bytes(build_plan(model, "sm_80", PROFILES))
    monkeypatch.setenv("LARGER", 1000 * "x")
    again, other = (bytes(build_plan(model, arch, PROFILES)) for arch in ("sm_80", "sm_86"))
    assert one == again != other
    (answers, prompts) = layer_reports(one, len(PROFILES)) or ()
    for report in (answers, prompts):
        assert report.int8_products > 0 == report.int8_weight_products and report.attention == 2, report
    assert answers == layer_reports(other, len(PROFILES))[0]  # type: ignore[index]


@pytest.mark.parametrize("arch", [arch for arch in RTX.archs if arch not in ("sm_80", "sm_86")])
def test_every_architecture(arch: str, model: OnnxModel, tmp_path: Path) -> None:
    if arch == "sm_75":
        with pytest.raises(CompileError, match=r"TensorRT refuses the graph: found .*FP32 GEMM is not supported"):
            build_plan(model, arch, PROFILES)
        model = translate(graph("bloom", "int8-accurate", tmp_path)[1], "float16", 128)
    assert layer_reports(build_plan(model, arch, PROFILES), len(PROFILES))


@pytest.mark.parametrize(("preset", "kind"), [("none", "float_products"), ("int8-accurate", "int8_weight_products")])
def test_what_the_layers_are(preset: str, kind: str, tmp_path: Path) -> None:
    _, source = graph("llama_gqa", preset, tmp_path)  # its heads have a size for which TensorRT has no attention in float32
    reports = layer_reports(build_plan(translate(source, "float32", 128), "sm_89", PROFILES), len(PROFILES))
    assert reports and all(getattr(report, kind) >= 10 and report.int8_products == 0 for report in reports), reports


def test_weights_of_minus_128_are_in_the_plan(tmp_path: Path) -> None:
    """Older guides of TensorRT limit INT8 weights to +-127, which its own quantization keeps; the integers of a model stay."""
    _, source = graph("llama_theta", "int8", tmp_path)
    linears = with_lowest_weights(source)
    plan = bytes(build_plan(translate(source, "float16", 128), "sm_80", PROFILES))
    (answers, _) = layer_reports(plan, len(PROFILES)) or ()
    assert answers.int8_products > 0 == answers.int8_weight_products
    assert plan.count(64 * b"\x80") >= linears > 0 == plan.count(64 * b"\x81"), "rows of -128, of which none became -127"


def test_reports_need_a_text_for_each_profile() -> None:
    tensors = '  tensor={ alignment=1 name="a" rank0=0 type=int8 }\n  sub_tensor={ base="a" name="b" offset=0 type=half }\n'
    calls = (
        '  fully_connected={ name="x" output={"c" } input={"a" "a" } stream=0\n  function={ name=_gemm_mha_v2 args={ "b" } }\n'
        '  runtime_fusion={ name=y input_args={ "a" "b" } backbone=gemm }\n  function={ name=z input_args={ "b" } }\n'
    )
    text = f"\0header {{\n}}\ndescriptors {{\n{tensors}\n label bb1: \n{calls}}}\nshape_main {{\n}}\n\0".encode()
    assert layer_reports(text, 1) == (LayerReport(1, 1, 0, 1, 1),)
    assert layer_reports(text, 2) is None and layer_reports(b"another format", 1) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: replace(model, content=model.content[:999]), r"^tensorrt: TensorRT refuses the graph: found "),
        (lambda model: replace(model, inputs={}), r"^tensorrt: TensorRT refuses the graph: found .*input_ids"),
        (
            lambda model: replace(model, weights=[_with(model.weights[0], 1e9), *model.weights[1:]]),
            r"^tensorrt: tensor .*: found NaN, infinity or what float16 does not hold, expected finite weights; use --kv-cache",
        ),
    ],
)  # fmt: skip
def test_graphs_without_a_plan(change: Callable[[OnnxModel], OnnxModel], message: str, model: OnnxModel) -> None:
    with pytest.raises(CompileError, match=message):
        build_plan(change(model), "sm_80", PROFILES)


def _with(tensor: StoredTensor, value: float) -> StoredTensor:
    """A tensor of float16 with another value."""

    def compute() -> object:
        array = tensor.compute().astype("float32")
        array.reshape(-1)[0] = value
        return array

    return replace(tensor, dtype="float16", compute=compute)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            r"was ended: found signal 9; build on a host with more",
        ),
        ("raise OSError('no space left.')", r"the process that builds the plan failed: found OSError: no space left\.$"),
        ("raise SystemExit(3)", r"the process that builds the plan failed: found no reason given\.$"),
    ],
)
def test_a_process_that_fails(
    code: str, message: str, model: OnnxModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(code)
    monkeypatch.setattr(build, "_WORKER", worker)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(CompileError, match=message):
        build_plan(model, "sm_80", PROFILES)
