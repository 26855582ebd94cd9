"""Adapters on the command line: what is recorded, which commands take them, and that refusals write nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.reading import AdapterChoice, Reading
from belle_compile.passes.calibration.data import CalibrationData
from belle_compile.runtime.artifact import read_manifest
from tests.compiler.checkpoint.overlays.adapters import make_adapter
from tests.compiler.report.pages import Page
from tests.compiler.test_cli import fail, run
from tests.parity.variants import VARIANTS

pytestmark = pytest.mark.usefixtures("no_kernels")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return VARIANTS["llama"](tmp_path_factory.mktemp("bases") / "BELLE-LLaMA-7B")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapters") / "chat", target_modules=["q_proj", "v_proj"])


def test_manifest_and_report_say_what_was_merged(base: Path, adapter: Path, tmp_path: Path) -> None:
    reading = Reading(adapters=(AdapterChoice(str(adapter)), AdapterChoice(str(adapter), 0.5)))
    out = build(BuildRequest(base, tmp_path / "engine", reading=reading))
    manifest = read_manifest(out)
    opened = manifest.passes[0]
    assert opened.options["adapters"] == ["chat", "chat at 0.5"]
    notes = [
        "adapter chat was merged: LoRA of rank 4 in 4 modules (q_proj, v_proj)",
        "adapter chat was merged, its changes of low rank multiplied by 0.5: LoRA of rank 4 in 4 modules (q_proj, v_proj)",
    ]
    assert list(opened.refusals) == notes
    assert {"adapter_config.json", "adapter_model.safetensors"} <= manifest.model.source_digests.keys()
    assert str(adapter.parent) not in (out / "manifest.json").read_text()
    report = Page((out / "report.html").read_text()).text("passes")
    assert all(note in report for note in notes)


def test_commands_take_adapters(capsys: pytest.CaptureFixture[str], base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "requests.txt").write_text("".join(f"{number * 7919} and {number}\n" for number in range(1, 40)))
    options = "--adapter", adapter, "--adapter-scale", "0.5"
    made = json.loads(run(capsys, "build", base, *options, "-o", tmp_path / "engine", "--json")[1])
    assert made["passes"][0]["options"]["adapters"] == ["chat at 0.5"]
    assert run(capsys, "plan", base, *options)[0] == 0
    assert "found a config.json alone" in fail(capsys, "plan", base / "config.json", *options)
    command = "sensitivity", base, "--calibration", tmp_path / "requests.txt", "--output-errors", "--json"
    plain, changed = (json.loads(run(capsys, *command, *given)[1])["layers"] for given in ((), options))
    assert {layer["name"]: layer["output_error"] for layer in plain} != {
        layer["name"]: layer["output_error"] for layer in changed
    }
    export = "export", base, *options, "--format", "safetensors", "--quant", "none", "-o", tmp_path / "export", "--json"
    assert "adapter chat was merged" in json.loads(run(capsys, *export)[1])["notes"][0]


@pytest.mark.parametrize("command", ["build", "export --format gguf"])
def test_refusals_write_nothing(
    command: str, capsys: pytest.CaptureFixture[str], base: Path, adapter: Path, tmp_path: Path
) -> None:
    arguments = *command.split(), base, "-o", tmp_path / "out"
    assert "path missing: found nothing there, expected the directory of an adapter" in fail(
        capsys, *arguments, "--adapter", "missing"
    )
    assert "scale of adapter" in fail(capsys, *arguments, "--adapter", adapter, "--adapter-scale", "nan")
    assert "found a directory without adapter_config.json" in fail(capsys, *arguments, "--adapter", base)
    status, _, err = run(capsys, *arguments, "--adapter", adapter, "--adapter", adapter, "--adapter-scale", "2")
    assert status == 2 and "1 --adapter-scale for 2 --adapter: give a scale for each adapter" in err
    assert list(tmp_path.iterdir()) == []


def test_calibration_of_another_scale_is_not_continued(tmp_path: Path) -> None:
    def key(scale: float) -> str:
        reading = Reading(adapters=(AdapterChoice("chat", scale),))
        return CalibrationData.of_files((), "d", {"a": "b"}, reading.facts, tmp_path, lambda done, total: None).checkpoint

    assert key(1) != key(0.5) == key(0.5)
