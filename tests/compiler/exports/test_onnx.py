"""ONNX for ONNX Runtime GenAI: the logits of Transformers, the weights of engines, and the gate without GenAI."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("onnxruntime")

from belle_compile.compiler.backends.onnx.genai import genai_folder
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.exports import base, driver
from belle_compile.compiler.exports.onnx import Onnx
from belle_compile.compiler.exports.request import ExportRequest
from belle_compile.compiler.exports.runtimes import ONNX_RUNTIME, ForeignRuntime
from belle_compile.compiler.gate import Gate
from belle_compile.runtime import Engine
from belle_compile.runtime.artifact import GenerationDefaults, SpecialTokens
from belle_compile.runtime.errors import EngineError
from tests.compiler.backends.onnx import harness
from tests.compiler.backends.onnx.test_translate import graph
from tests.compiler.exports.models import bloom, content, export, llama, requests
from tests.parity.conftest import builder  # noqa: F401 (a fixture)
from tests.parity.engines import Builder
from tests.parity.stepping import relative_error
from tests.parity.variants import VARIANTS, hf_step_logits, random_ids

FIXTURE = Path(__file__).parents[2] / "fixtures" / "tiny-bloom-trained"
TEXTS = {"chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
MODEL = {"model.onnx", "weights.safetensors", "genai_config.json"}
LOOSE = Gate(max_perplexity_ratio=1e9, min_top1=0.0)
ABSENT = ForeignRuntime("ONNX Runtime GenAI", "no_such_module", ("no-such-package",), "")
STEPS = (13, 7, 1)  # tokens of a sequence that come at a time


def engine(source: Path, **options: Any) -> Path:
    out = source.parent / f"engine-{len(list(source.parent.iterdir()))}"
    return build(BuildRequest(source, out, **{"drift": False, "gate": None} | options))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(builder: Builder, variant: str, tmp_path: Path) -> None:  # noqa: F811
    source, out = builder.checkpoint(variant), tmp_path / "out"
    driver.export(ExportRequest(source, out, "onnx", quantization="none"))
    onnx.checker.check_model(str(out / "model.onnx"))
    session, ids, logits, done = harness.Session(out / "model.onnx"), random_ids(source, sum(STEPS)), [], 0
    steps = [ids[sum(STEPS[:number]) : sum(STEPS[: number + 1])] for number in range(len(STEPS))]
    for step in steps:
        done += len(step)
        inputs = {"input_ids": np.array([step], np.int64), "attention_mask": np.ones((1, done), np.int64)}
        logits.append(session.run(inputs)[0])
    assert relative_error(np.concatenate(logits), hf_step_logits(source, steps)) < 1e-5


def test_the_worker_gives_the_logits_of_whole_sequences(builder: Builder, tmp_path: Path) -> None:  # noqa: F811
    source, out = builder.checkpoint("llama_gqa"), tmp_path / "out"
    driver.export(ExportRequest(source, out, "onnx", quantization="none"))
    with ONNX_RUNTIME.start(out, 21, None) as running:
        for count in (21, 5):
            ids = random_ids(source, count)
            assert relative_error(running.logits(ids), hf_step_logits(source, [ids])) < 1e-5


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A checkpoint, its export with the default preset, and the record of that."""
    source = bloom(tmp_path_factory.mktemp("exports") / "bloom")
    return source, *export(source, "onnx")


def test_a_folder_is_complete(int8: tuple[Path, Path, dict[str, Any]]) -> None:
    _, out, record = int8
    assert {path.name for path in out.iterdir()} == {*TEXTS, *MODEL, "export.json"}
    onnx.checker.check_model(str(out / "model.onnx"))
    assert record["weights"] == ["model.onnx", "weights.safetensors"] and record["notes"] == []
    assert record["runtimes"] == "ONNX Runtime GenAI" and record["float_dtype"] == "float32"
    assert record["head"] == "of its own", "the rotation gives it one"
    assert "while running" in record["quantization"]["online rotations"] and "GenAI" in record["accuracy"]["how"]
    config, generation = (json.loads((out / name).read_text()) for name in ("genai_config.json", "generation_config.json"))
    assert config["search"]["top_k"] == generation["top_k"] == 30 and config["model"]["eos_token_id"] == [2]


def test_two_exports_give_the_same_bytes(int8: tuple[Path, Path, dict[str, Any]]) -> None:
    source, out, _ = int8
    assert content(export(source, "onnx")[0]) == content(out)


def test_the_weights_of_an_engine_for_onnx_runtime_are_copied(
    int8: tuple[Path, Path, dict[str, Any]],
) -> None:
    source, out, _ = int8
    made = engine(source, backend="onnxruntime")
    copied, record = export(made, "onnx")
    assert record["accuracy"]["how"].startswith("not measured: made from an engine")
    assert "kv_cache" not in record["quantization"], "GenAI chooses its type"
    assert {name: content(copied)[name] for name in TEXTS | MODEL} == {name: content(out)[name] for name in TEXTS | MODEL}
    assert content(copied)["weights.safetensors"] == (made / "rank0/weights.safetensors").read_bytes()
    ids = random_ids(source, 21)
    inputs = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, 21), np.int64)}
    with Engine.load(made, threads=1, kv_tokens=64) as loaded:
        assert relative_error(harness.Session(copied / "model.onnx").run(inputs)[0], loaded.logits(ids)) < 1e-5


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quantization": "int8-accurate", "target": "cpux2"},  # ranks that are put together again
        {"quantization": "none", "backend": "torchscript"},
    ],
)
def test_an_engine_for_other_executors_has_the_bytes_of_its_checkpoint(options: dict[str, str], tmp_path: Path) -> None:
    source = llama(tmp_path / "llama", tie_word_embeddings=True)
    ours = content(export(engine(source, **options), "onnx")[0])
    expected = content(export(source, "onnx", quantization=options.get("quantization", "int8"))[0])
    assert {name: ours[name] for name in TEXTS | MODEL} == {name: expected[name] for name in TEXTS | MODEL}


def test_static_scales_of_activations_are_exported(tmp_path: Path) -> None:
    source = llama(tmp_path / "llama")
    options: dict[str, Any] = {"calibration": requests(source), "methods": ("rotate", "static"), "gate": None}
    out, record = export(source, "onnx", **options)
    assert "one scale for all tokens" in record["quantization"]["activations"]
    made = engine(source, backend="onnxruntime", **options)
    assert content(export(made, "onnx")[0])["weights.safetensors"] == content(out)["weights.safetensors"]


def test_engines_that_cannot_be_exported_are_refused(tmp_path: Path, no_kernels: None) -> None:
    source = bloom(tmp_path / "bloom")
    made = engine(source, backend="onnxruntime")
    with pytest.raises(CompileError, match=r"cannot carry the engine .*: found weights int4 in groups of 128 inputs, .* for w"):
        export(engine(source, quantization="int4"), "onnx")
    with pytest.raises(CompileError, match=r"found weights of the backend onnxruntime, which cannot be read back"):
        export(engine(source, backend="onnxruntime", methods=("rotate",)), "gguf")
    weights = made / "rank0/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(EngineError, match=r"rank0/weights\.safetensors: found [\d,]+ bytes, expected [\d,]+"):
        export(made, "onnx")
    with pytest.raises(CompileError, match=r"option --calibration: found the engine .* expected a checkpoint"):
        export(made, "onnx", calibration=requests(source))
    assert not [path for path in tmp_path.iterdir() if "onnx-" in path.name]


def test_weights_of_another_engine_are_refused(builder: Builder, tmp_path: Path) -> None:  # noqa: F811
    other = tmp_path / "weights.safetensors"
    other.write_bytes(b"\0" * 4096)
    (tmp_path / "out").mkdir()
    model, tokens = graph(builder.checkpoint("bloom"), "int8"), SpecialTokens(None, (2,), None, False)
    with pytest.raises(CompileError, match=r"^onnx: weights of .*: found others than the engine's graph has; export the eng"):
        genai_folder(tmp_path / "out", model, tokens, GenerationDefaults(), {}, engine_weights=other)


@pytest.fixture
def truncated(int8: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> Iterator[Path]:
    out = tmp_path / "truncated"
    shutil.copytree(int8[1], out)
    yield out


@pytest.mark.parametrize("name", ["model.onnx", "weights.safetensors"])
def test_truncated_files_are_one_sentence(name: str, truncated: Path) -> None:
    file = truncated / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CompileError) as failure, ONNX_RUNTIME.start(truncated, 8, None):
        pass
    sentence = str(failure.value)
    assert sentence.startswith("gate: ONNX Runtime cannot run the export: found it ended; it last printed: ")
    assert "\n" not in sentence and len(sentence) < 500


def test_an_export_is_no_checkpoint(int8: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"found no config\.json, expected a Hugging Face checkpoint"):
        driver.export(ExportRequest(int8[1], tmp_path / "out", "gguf"))


def test_the_gate_says_what_it_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = llama(tmp_path / "llama")
    options: dict[str, Any] = {"calibration": requests(source), "gate": LOOSE}
    monkeypatch.setattr(Onnx, "runtime", lambda self: ABSENT)
    accuracy = export(source, "onnx", **options)[1]["accuracy"]
    version = ONNX_RUNTIME.version(None)
    assert accuracy["how"] == f"not run in ONNX Runtime GenAI, which is not installed here; run in ONNX Runtime {version}"
    assert accuracy["tokens"] > 0 and accuracy["kl"] < 0.05
    monkeypatch.setattr(Onnx, "stand_in", lambda self: ABSENT)
    accuracy = export(source, "onnx", **options)[1]["accuracy"]
    assert accuracy == {"how": "not measured, since it was not run in ONNX Runtime GenAI, which is not installed here"}


def test_the_gate_refuses_an_export_that_misses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Onnx, "runtime", lambda self: ABSENT)
    source = llama(tmp_path / "llama")
    with pytest.raises(CompileError, match=r"^gate: the export is too far from .* run in ONNX Runtime"):
        export(source, "onnx", calibration=requests(source), gate=Gate(min_top1=1.1))
    assert not [path for path in tmp_path.iterdir() if "-onnx-" in path.name and path.name[0] != "."]


def test_what_genai_cannot_read_is_noted(tmp_path: Path) -> None:
    """BLOOM's way to split texts, and generation defaults that it has no settings for."""
    record = driver.export(ExportRequest(FIXTURE, tmp_path / "out", "onnx", generation=("min_p=0.1", 'stop=["x"]')))
    assert "ONNX Runtime GenAI has no setting for min_p, stop: they are in generation_config.json only" in record["notes"]
    assert any("does not know the expression by which this one splits texts: give it token ids" in x for x in record["notes"])


def test_the_listing_names_what_the_format_carries() -> None:
    (entry,) = [entry for entry in base.listing() if entry["name"] == "onnx"]
    assert [name for name, reason in entry["presets"].items() if reason] == ["int4"]
    assert not any(entry["methods"].values())
