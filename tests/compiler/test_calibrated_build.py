"""Builds with calibration requests: what the engine keeps is measured, and an engine that keeps too little is none."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from belle_compile.compiler import layers as ranking
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import build_graph
from belle_compile.compiler.gate import Gate
from belle_compile.runtime.artifact import Manifest, read_manifest
from tests.parity.variants import VARIANTS

WORDS = ("the", "and", "ing", "helo", "a b c", "x, y.", "dogs run", "cats sit", "you go", "we are")
LENIENT = Gate(max_perplexity_ratio=2, min_top1=0.1, min_accuracy_kept=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return VARIANTS["llama_gqa"](tmp_path_factory.mktemp("checkpoints") / "tiny-llama")


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("requests") / "requests.jsonl"
    lines = [{"question": f"{one} {other} {i}", "std_answer": f"{other} {i}" if i % 2 else ""}
             for i, (one, other) in enumerate((a, b) for a in WORDS for b in WORDS if a != b)]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def request(checkpoint: Path, requests: Path | None, out: Path, **changes: Any) -> BuildRequest:
    return BuildRequest(checkpoint, out, **{"isas": ("avx2",), "calibration": requests, "gate": LENIENT} | changes)


class Counted:
    """Notes the first number of units that each stage reports as done, and the number of all."""

    def __init__(self) -> None:
        self.first: dict[str, int] = {}
        self.total: dict[str, int] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.first.setdefault(stage, done)
        self.total[stage] = total


def record(manifest: Manifest, name: str) -> dict[str, Any]:
    return next(record.options for record in manifest.passes if record.name == name)


def test_the_manifest_says_what_was_kept(checkpoint: Path, requests: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    manifest = read_manifest(build(request(checkpoint, requests, out)))
    accuracy = manifest.accuracy
    assert accuracy is not None
    assert accuracy["limits"] == {"max_perplexity_ratio": 2, "min_top1": 0.1, "min_accuracy_kept": 0}
    assert 0.5 < accuracy["top1_agreement"] <= 1 and 0 < accuracy["kl"] < 0.1
    assert 0.9 < accuracy["perplexity_ratio"] < 1.1 and 0 < accuracy["greedy_prefix"] <= 1
    assert 0 < accuracy["answers"] < accuracy["requests"] and accuracy["accuracy_kept"] is not None
    options = record(manifest, "gptq-rounding")
    assert options["sequences"] > 0 and options["tokens"] > options["sequences"] and len(options["calibration"]) == 64
    assert manifest.quantization["rounding"] == "by calibration requests (GPTQ)"
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_activations_with_one_scale_for_all_tokens(checkpoint: Path, requests: Path, tmp_path: Path) -> None:
    engine = build(request(checkpoint, requests, tmp_path / "engine", methods=("rotate", "rotate-online", "gptq", "static")))
    manifest = read_manifest(engine)
    assert manifest.quantization["activations"] == "int8, one scale for all tokens"
    assert record(manifest, "static-activations")["clip"] == "mse"
    assert manifest.accuracy is not None and 0.5 < manifest.accuracy["top1_agreement"]


def test_all_ranks_of_an_engine_are_judged(checkpoint: Path, requests: Path, tmp_path: Path) -> None:
    methods = ("rotate", "gptq")
    one, two = (read_manifest(build(request(checkpoint, requests, tmp_path / target, target=target, methods=methods)))
                for target in ("cpu", "cpux2"))  # fmt: skip
    assert one.accuracy is not None and two.accuracy is not None
    assert two.accuracy["tokens"] == one.accuracy["tokens"] and two.accuracy["kl"] < 2 * one.accuracy["kl"]
    assert two.accuracy["kl"] != one.accuracy["kl"], "each rank rounds what it has of the activations"


def test_the_same_requests_give_the_same_engine(checkpoint: Path, requests: Path, tmp_path: Path) -> None:
    first, second = (build(request(checkpoint, requests, tmp_path / name)) for name in ("one", "two"))
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()


@pytest.mark.usefixtures("no_kernels")
def test_an_engine_that_cannot_run_here_is_not_judged(checkpoint: Path, requests: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CompileError, match=r"gate: the engine cannot run on this host: .*; build where it can, or with --no-gate"
    ):
        build(request(checkpoint, requests, tmp_path / "engine"))
    assert [path.name for path in tmp_path.iterdir()] == [".engine.calibration"], "the next try has --no-gate"
    stages = Counted()
    built = build(request(checkpoint, requests, tmp_path / "engine", gate=None, on_progress=stages))
    assert read_manifest(built).accuracy is None and stages.first["calibrate"] == stages.total["calibrate"]
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_an_engine_that_keeps_too_little_is_none_but_its_calibration_is_kept(
    checkpoint: Path, requests: Path, tmp_path: Path
) -> None:
    with pytest.raises(CompileError) as error:
        build(request(checkpoint, requests, tmp_path / "engine", gate=Gate(max_perplexity_ratio=0.5, min_top1=0)))
    text = str(error.value)
    assert "gate: the engine is too far from the unquantized model over " in text
    assert "found perplexity ratio 0.9" in text or "found perplexity ratio 1.0" in text
    assert "expected at most 0.5; look at " in text and text.count("layers.") >= 4
    folder = tmp_path / ".engine.calibration"
    assert f"calibration is kept in {folder}" in text and f"the report is {folder / 'report.html'}" in text
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert sorted(path.name for path in folder.iterdir()) == ["gptq-rounding", "report.html"]
    assert "missed" in (folder / "report.html").read_text()

    # The next try calibrates nothing again, and makes what a first build would make.
    again = request(checkpoint, requests, tmp_path / "engine", on_progress=(stages := Counted()), size_budget=1.3)
    manifest = read_manifest(build(again))
    assert stages.first["calibrate"] == stages.total["calibrate"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]
    fresh = read_manifest(build(request(checkpoint, requests, tmp_path / "fresh", size_budget=1.3)))
    assert fresh.digest == manifest.digest


@pytest.mark.usefixtures("no_kernels")
def test_layers_are_ranked_once_for_several_budgets(checkpoint: Path, requests: Path, tmp_path: Path) -> None:
    def interrupted(stage: str, done: int, total: int) -> None:
        if stage == "weights":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(request(checkpoint, requests, tmp_path / "engine", gate=None, size_budget=1.2, on_progress=interrupted))
    stages = Counted()
    manifest = read_manifest(
        build(request(checkpoint, requests, tmp_path / "engine", gate=None, size_budget=1.4, on_progress=stages))
    )
    assert "layers" not in stages.first and stages.first["calibrate"] == stages.total["calibrate"]
    fresh = read_manifest(build(request(checkpoint, requests, tmp_path / "fresh", gate=None, size_budget=1.4)))
    assert fresh.digest == manifest.digest


@pytest.mark.usefixtures("no_kernels")
def test_methods_by_name(checkpoint: Path, requests: Path, tmp_path: Path) -> None:
    def passes(*methods: str, calibration: Path | None = requests) -> list[str]:
        built = request(checkpoint, calibration, tmp_path / "engine", methods=methods, gate=None, force=True)
        return [record.name for record in read_manifest(build(built)).passes]

    calibrated = {"smooth-activations", "gptq-rounding"}
    assert not calibrated & set(passes(calibration=None)) and "rotate-residual" not in passes(calibration=None)
    assert calibrated < set(passes("smooth", "gptq")) and "rotate-residual" not in passes("gptq")
    assert "rotate-residual" in passes("rotate", calibration=None)
    names = passes("gptq", "rotate", "smooth")
    assert [name for name in names if name in {*calibrated, "rotate-residual", "quantize-linears"}] == [
        "smooth-activations", "rotate-residual", "gptq-rounding", "quantize-linears",
    ]  # fmt: skip


def test_the_graph_is_built_once(checkpoint: Path, requests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything that looks at it: memory, a size budget, calibration, errors of layers, the gate."""
    calls: list[Any] = []

    def counted(opened: Any) -> ir.Model:
        calls.append(opened)
        return build_graph(opened)

    for module in [module for name, module in sys.modules.items() if name.startswith("belle_compile.compiler.")]:
        if vars(module).get("build_graph") is build_graph:
            monkeypatch.setattr(module, "build_graph", counted)
    manifest = read_manifest(build(request(checkpoint, requests, tmp_path / "engine", size_budget=1.3, drift=True)))
    assert len(calls) == 1
    assert manifest.accuracy is not None and record(manifest, "quantize-linears")["keep"]


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("round",)}, "unknown method: found round, expected some of reorder, smooth, rotate"),
        (
            {"methods": ("gptq",), "calibration": None},
            "method gptq: found no requests to calibrate with; give some with --calib",
        ),
        ({"methods": ("rotate",), "quantization": "none"}, "methods: found rotate, expected none with --quant none"),
        ({"calibration": Path("nothing.jsonl")}, "nothing.jsonl"),
    ],
)
def test_what_does_not_fit(checkpoint: Path, requests: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CompileError, match=message):
        build(request(checkpoint, requests, tmp_path / "engine", **changes))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_kernels")
def test_an_interrupted_build_keeps_what_calibration_found(checkpoint: Path, requests: Path, tmp_path: Path) -> None:
    heard: list[int] = []

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "calibrate" and done > total / 2:
            raise KeyboardInterrupt

    def listen(stage: str, done: int, total: int) -> None:
        if stage == "calibrate":
            heard.append(done)

    with pytest.raises(KeyboardInterrupt):
        build(request(checkpoint, requests, tmp_path / "engine", on_progress=interrupt, gate=None))
    assert [path.name for path in tmp_path.iterdir()] == [".engine.calibration"]
    build(request(checkpoint, requests, tmp_path / "engine", on_progress=listen, gate=None))
    assert heard[0] > 0 and [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_layers_are_ranked(checkpoint: Path, requests: Path) -> None:
    found = ranking.rank(checkpoint, requests, tokens=200)
    assert len(found) == 3 * 7 + 1 and all(layer.kl is not None and layer.kl > 0 for layer in found)
    quick = ranking.rank(checkpoint, requests, tokens=200, alone=False)
    assert {layer.name for layer in quick} == {layer.name for layer in found} and quick[0].kl is None


@pytest.mark.usefixtures("no_kernels")
def test_a_size_budget_keeps_the_layers_that_suffer_most(checkpoint: Path, requests: Path, tmp_path: Path) -> None:
    built = request(checkpoint, requests, tmp_path / "engine", gate=None, size_budget=1.3)
    manifest = read_manifest(build(built))
    kept = record(manifest, "quantize-linears")["keep"]
    assert kept == record(manifest, "gptq-rounding")["keep"] == sorted(kept)
    layers = {layer.name: layer for layer in ranking.rank(checkpoint, requests, tokens=1024)}
    total = sum(layer.weights for layer in layers.values())
    assert kept and 3 * sum(layers[name].weights for name in kept) <= 0.3 * total
    best = max(layers.values(), key=lambda layer: (layer.kl or 0) / layer.weights if 3 * layer.weights <= 0.3 * total else 0)
    assert best.name in kept
    with pytest.raises(CompileError, match="a size budget: found no requests to rank layers by"):
        build(request(checkpoint, None, tmp_path / "other", size_budget=1.1))
