"""Builds that calibrate by requests which the model writes itself, and when a build does so without being asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from belle_compile.compiler import self_written
from belle_compile.compiler.build_request import resolve
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.exports.driver import export
from belle_compile.compiler.exports.request import ExportRequest
from belle_compile.compiler.gate import Gate
from belle_compile.compiler.request_writer import write_requests
from belle_compile.compiler.self_written import SelfWritten
from belle_compile.runtime import Engine, host
from belle_compile.runtime.artifact import Manifest, PassRecord, read_manifest
from tests.parity.variants import VARIANTS

FEW = SelfWritten(size=6, holdout=2)
STRICT = Gate(max_perplexity_ratio=0.5)
MILLIONS = 1_000_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return VARIANTS["llama_gqa"](tmp_path_factory.mktemp("checkpoints") / "tiny-llama")


@pytest.fixture(autouse=True)
def avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine that writes has the kernels that the other engines of the tests have."""
    monkeypatch.setattr(host, "host_isas", lambda: ("avx2",))


def request(checkpoint: Path, out: Path, **changes: Any) -> BuildRequest:
    return BuildRequest(checkpoint, out, **{"isas": ("avx2",), "calibration": FEW, "gate": None, "drift": False} | changes)


def written(manifest: Manifest) -> PassRecord | None:
    return next((record for record in manifest.passes if record.name == "write-requests"), None)


def test_the_same_build_writes_the_same_requests_and_says_that_they_are_synthetic(checkpoint: Path, tmp_path: Path) -> None:
    lenient = Gate(max_perplexity_ratio=2, min_top1=0, min_accuracy_kept=0)
    first, second = (build(request(checkpoint, tmp_path / name, gate=lenient)) for name in ("one", "two"))
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes(), "it has the digests of all files"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"], "the engine that wrote them is gone"
    manifest = read_manifest(first)
    record = written(manifest)
    assert record is not None and record.options["synthetic"] is True and record.options["seed"] == 0
    assert record.options["requests"] + record.options["held_out"] == record.changes == 8
    sentence = "The requests are synthetic, those that were held out for the gate too: the model wrote them itself."
    assert record.refusals == (sentence,) and sentence in (first / "report.html").read_text()
    assert manifest.accuracy is not None and manifest.accuracy["requests_written_by"] == "the model itself"
    assert manifest.quantization["rounding"] == "by calibration requests (GPTQ)"


def test_a_seed_gives_requests_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    with Engine.load(build(request(checkpoint, tmp_path / "engine", calibration=None))) as engine:
        first, again, other = (write_requests(engine, replace(FEW, seed=seed)) for seed in (0, 0, 1))
        plain, texts = write_requests(engine, FEW, raw=True)
    assert first == again and not first[0] and plain
    assert {each.text for each in first[1]}.isdisjoint(each.text for each in other[1])
    assert any(each.answer for each in first[1]) and not any(each.answer for each in texts)
    assert len({each.text for each in first[1]}) == len(first[1]) == FEW.size + FEW.holdout


def test_a_build_that_was_stopped_does_not_write_again(checkpoint: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "weights":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(request(checkpoint, tmp_path / "engine", on_progress=stop))
    stages: list[str] = []
    build(request(checkpoint, tmp_path / "engine", on_progress=lambda stage, done, total: stages.append(stage)))
    assert "calibrate" in stages and not [stage for stage in stages if stage.startswith("writer")]


def test_a_model_without_a_template_writes_plain_texts(checkpoint: Path, tmp_path: Path) -> None:
    manifest = read_manifest(build(request(checkpoint, tmp_path / "engine", template="raw")))
    assert written(manifest) is not None
    note = "the prompt template adds nothing to a text, so that the model wrote plain texts to calibrate with, not chats"
    assert manifest.passes[0].refusals.count(note) == 1


def test_an_export_is_calibrated_by_requests_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    asked = ExportRequest(checkpoint, tmp_path / "one", "compressed-tensors", calibration=FEW, gate=None)
    first, again = export(asked), export(replace(asked, output=tmp_path / "two"))
    record = first["passes"][0]
    assert first == again and record["name"] == "write-requests" and record["options"]["synthetic"] is True
    assert "The requests are synthetic" in " ".join(first["notes"])
    assert first["quantization"]["rounding"] == "by calibration requests (GPTQ)"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    with pytest.raises(CompileError, match="gate: the export is too far from the unquantized model"):
        export(replace(asked, output=tmp_path / "three", gate=STRICT))


def test_a_default_that_misses_a_limit_ends_no_build(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CompileError, match="gate: the engine is too far from the unquantized model"):
        build(request(checkpoint, tmp_path / "named", gate=STRICT))
    monkeypatch.setattr(self_written, "LEAST_PARAMETERS", 0)
    notes: list[str] = []
    by_default = replace(FEW, within_s=3600.0)
    engine = build(request(checkpoint, tmp_path / "engine", gate=STRICT, calibration=by_default, on_note=notes.append))
    assert "no requests were given: the model writes its own" in notes[0] and "--no-calibration" in notes[0]
    assert notes[1].startswith("the engine misses limits of the gate on requests that the model wrote: perplexity ratio")
    assert "missed" in (engine / "report.html").read_text()


@pytest.mark.usefixtures("no_kernels")
def test_a_small_model_is_built_as_without_requests(checkpoint: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    engine = build(request(checkpoint, tmp_path / "engine", calibration=SelfWritten(within_s=120.0), on_note=notes.append))
    plain = build(request(checkpoint, tmp_path / "plain", calibration=None))
    ours, theirs = (read_manifest(directory) for directory in (engine, plain))
    assert ours.passes == theirs.passes and ours.quantization == theirs.quantization and ours.accuracy is None
    assert {name for name in ours.files if ours.files[name] != theirs.files[name]} == {"report.html"}
    assert len(notes) == 1 and notes[0] in (engine / "report.html").read_text()


def test_the_default_is_decided_by_the_estimated_time() -> None:
    by_default = SelfWritten(within_s=120.0)
    assert "built without calibration unless --calibration names requests or self" in by_default.reason_against(MILLIONS, 2)
    assert by_default.reason_against(25 * MILLIONS, 2) == by_default.reason_against(135 * MILLIONS, 2) == ""
    assert "estimated to take" in by_default.reason_against(7000 * MILLIONS, 2)
    assert by_default.reason_against(300 * MILLIONS, 64) == "", "more cores take less time"
    assert by_default.reason_against(300 * MILLIONS, 2)
    assert SelfWritten().reason_against(MILLIONS, 2) == SelfWritten().reason_against(7000 * MILLIONS, 2) == ""


def test_a_default_that_the_build_would_not_use_is_dropped(checkpoint: Path, tmp_path: Path) -> None:
    by_default = SelfWritten(within_s=120.0)

    def kept(**changes: Any) -> bool:
        return resolve(request(checkpoint, tmp_path / "engine", **changes)).self_written is not None

    assert kept(calibration=by_default) and kept(calibration=FEW, quantization="none")
    for changes in ({"quantization": "none"}, {"quantization": "int8-plain"}, {"methods": ("rotate",)}):
        assert not kept(calibration=by_default, **changes)
    with pytest.raises(CompileError, match="method gptq: found no requests to calibrate with"):
        kept(calibration=by_default, methods=("gptq",))
    with pytest.raises(CompileError, match="a size budget: found no requests to rank layers by"):
        kept(calibration=by_default, size_budget=1.2)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"holdout": 0}, {"seed": -1}])
def test_wrong_amounts(wrong: dict[str, int]) -> None:
    with pytest.raises(CompileError, match=r"of self-written requests: found (0|-1), expected"):
        SelfWritten(**wrong)
