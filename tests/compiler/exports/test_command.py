"""`belle-compile export`: its headline and record, and one sentence for each wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from belle_compile.compiler import cli
from belle_compile.compiler.exports import base
from belle_compile.compiler.exports.directory import is_export
from tests.compiler.exports.models import llama


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main(["export", *(str(argument) for argument in arguments), "--quiet"])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def fail(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, "") and err.startswith("belle-compile: ") and err.endswith(".\n") and err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("checkpoints") / "tiny")


def test_an_export_ends_with_a_headline_and_force_replaces_it(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    status, text, _ = run(capsys, checkpoint, "--format", "gguf", "-o", out)
    assert status == 0 and "for llama.cpp" in text and "not measured" in text and "left out: the method rotate-online" in text
    assert is_export(out) and {path.name for path in out.iterdir()} == {"tiny-Q8_0.gguf", "export.json"}
    assert "exists already; choose another -o or pass --force to replace an export" in fail(
        capsys, checkpoint, "--format", "gguf", "-o", out
    )
    status, text, _ = run(capsys, checkpoint, "--format", "safetensors", "-o", out, "--force", "--json")
    plain = json.loads(text)
    assert status == 0 and plain["format"] == "safetensors" and plain["export"] == str(out)
    record = json.loads((out / "export.json").read_text())
    assert record["files"].keys() == {path.name for path in out.iterdir()} - {"export.json"}
    assert all(record[key] == plain[key] for key in record)
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing else is left"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--quant", "int4"), "format gguf cannot carry this: found int4 in groups of 128 inputs"),
        (("--quant", "int8-accurate"), "found 16-bit activations, and the format's runtimes compute with 8 bits; use --quant"),
        (("--quant", "none"), "found float32 weights, and the format holds int8 per output channel; use --quant int8 or"),
        (("--methods", "rotate-online"), "found the method rotate-online, which llama.cpp does not compute; use --methods"),
        (
            ("--format", "safetensors", "--granularity", "block"),
            "scales per block in the format safetensors: found floats, expected --format gguf",
        ),
        (("--format", "onnx", "--dtype", "float16"), "option --dtype: found the format onnx, which has none, expected"),
        (("--format", "onnx", "--keep-tied"), "option --keep-tied or --untie: found the format onnx, which has none"),
        (("--format", "onnx", "--quant", "int4"), "for which ONNX Runtime has no kernels with integer activations; use --q"),
        (("--methods", "gptq"), "method gptq: found no requests to calibrate with; give some with --calibration"),
        (("--calibration", "nowhere.jsonl"), "calibration: path nowhere.jsonl: found nothing there"),
        (("--runtime-python", "nowhere/python"), "export: path nowhere/python: found nothing there"),
    ],
)
def test_what_a_format_cannot_carry_is_refused_before_work_starts(
    arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    assert sentence in fail(capsys, checkpoint, "--format", "gguf", "-o", tmp_path / "out", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_other_wrong_inputs(capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    status, _, err = run(capsys, checkpoint, "--format", "onyx", "-o", tmp_path / "out")
    assert status == 2 and "'onyx' is not one of 'compressed-tensors', 'gguf', 'onnx'" in err
    assert "nothing there" in fail(capsys, tmp_path / "nowhere", "--format", "gguf", "-o", tmp_path / "out")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "export.json").write_text('{"format": "mine"}')
    sentence = fail(capsys, checkpoint, "--format", "gguf", "-o", folder, "--force")
    assert f"--force replaces export directories only and {folder} is none" in sentence
    assert (folder / "export.json").read_text() == '{"format": "mine"}'


def test_a_format_is_a_record_in_the_registry() -> None:
    assert [format.name for format in base.registered()] == ["compressed-tensors", "gguf", "onnx", "safetensors"]
    with pytest.raises(AssertionError, match="another format of the name gguf"):

        class Other(base.Format):
            name = "gguf"
            carries = base.Carries(frozenset())

            def check_model(self, model: object) -> None: ...
            def write(self, *arguments: object) -> dict[str, object]:  # type: ignore[override]
                return {}

            def stored_bytes(self, model: object) -> int:
                return 0

        base.register(Other())
