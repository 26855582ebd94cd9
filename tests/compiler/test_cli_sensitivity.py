"""`belle-compile sensitivity`: layers ranked by what quantization does to them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.compiler.test_cli import fail, run
from tests.parity.variants import VARIANTS


def test_layers_are_ranked_and_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    checkpoint = VARIANTS["llama_gqa"](tmp_path / "checkpoint")
    requests = tmp_path / "requests.txt"
    requests.write_text("".join(f"the {i} and {i * i} you\n" for i in range(40)))
    command = ("sensitivity", checkpoint, "--calibration", requests, "--output-errors", "--tokens", 100)
    status, out, _ = run(capsys, *command, "-o", tmp_path / "layers.svg")
    assert status == 0 and len(out.splitlines()) == 20 and "output error" in out
    plot = (tmp_path / "layers.svg").read_text()
    assert plot.startswith("<svg") and plot.count("<rect") == 1 + 3 * 7 + 1
    status, out, _ = run(capsys, *command, "-o", tmp_path / "layers.json", "--json")
    assert status == 0 and json.loads(out)["layers"] == json.loads((tmp_path / "layers.json").read_text())["layers"]
    layers = json.loads(out)["layers"]
    assert len(layers) == 3 * 7 + 1 and layers[0]["output_error"] >= layers[-1]["output_error"] > 0
    status, _, err = run(capsys, *command, "-o", tmp_path / "layers.txt")
    assert status == 2 and "expected a name that ends in .json or .svg" in err


def test_plan_and_sensitivity_ignore_the_keys_that_a_build_ignores(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    checkpoint = VARIANTS["llama_gqa"](tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"qk_scale": 2}))
    (tmp_path / "requests.txt").write_text("".join(f"{number * 7919} and {number * 104729}\n" for number in range(1, 40)))
    for path in (checkpoint, checkpoint / "config.json"):
        assert "pass --ignore-config-key qk_scale" in fail(capsys, "plan", path)
        assert run(capsys, "plan", path, "--ignore-config-key", "qk_scale")[0] == 0
    command = ["sensitivity", checkpoint, "--calibration", tmp_path / "requests.txt", "--output-errors"]
    assert "pass --ignore-config-key qk_scale" in fail(capsys, *command)
    assert run(capsys, *command, "--ignore-config-key", "qk_scale")[0] == 0
