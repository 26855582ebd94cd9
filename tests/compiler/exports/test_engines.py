"""Exports of engines: their integers as they are, and engines that a format cannot carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.exports import driver
from belle_compile.compiler.exports.request import ExportRequest
from belle_compile.compiler.families.rope import read_rope
from belle_compile.compiler.reading import Reading
from tests.compiler.exports.models import bloom, export, llama, requests
from tests.parity.variants import VARIANTS, hf_logits, load_hf, random_ids

pytestmark = pytest.mark.usefixtures("no_kernels")


def engine(source: Path, *methods: str, **options: Any) -> Path:
    options = {"methods": methods, "gate": None, "target": "cpux2" if "calibration" in options else "cpu"} | options
    return build(BuildRequest(source, source.parent / f"engine-{len(list(source.parent.iterdir()))}", **options))


@pytest.mark.parametrize("format", ["compressed-tensors", "gguf"])
def test_an_engine_has_the_weights_of_its_checkpoint(format: str, tmp_path: Path) -> None:
    """The same passes run in builds and exports, so that a LLaMA's export from an engine has the same bytes of weights; an
    engine of two ranks is put together again."""
    source = llama(tmp_path / "llama", rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0})
    options: dict[str, Any] = {"calibration": requests(source)} if format == "gguf" else {}
    methods = ("rotate", "gptq") if options else ("rotate",)
    made = engine(source, *methods, **options)
    out, record = export(made, format)
    expected, _ = export(source, format, methods=methods, granularity="channel", gate=None, **options)
    assert record["accuracy"] == {"how": "not measured: made from an engine, without the model's own logits"}
    assert record["quantization"]["scheme"] == "w8a8" and record["model"]["name"] == "llama"
    if format == "gguf":
        plain = [export(path, "safetensors", quantization="none")[0] for path in (out, expected)]
        ids = random_ids(source, 24)
        assert np.array_equal(*(hf_logits(path, ids) for path in plain))
        return
    ours, theirs = (load_file(path / "model.safetensors") for path in (out, expected))
    tables = {"model.embed_tokens.weight", "lm_head.weight"}  # INT8 in engines, floats in exports
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - tables:
        assert ours[name].equal(theirs[name]), name
    for name in tables:
        assert float((ours[name].float() - theirs[name].float()).abs().max()) < 0.03


@pytest.mark.parametrize("variant", ["bloom", "qwen2_window", "qwen3", "mistral", "internlm2", "minicpm"])
def test_an_unquantized_engine_is_its_checkpoint(variant: str, tmp_path: Path) -> None:
    (tmp_path / variant).mkdir()
    source = VARIANTS[variant](tmp_path / variant)
    out, record = export(engine(source, quantization="none", methods=None), "safetensors")
    ids = random_ids(source, 24)
    assert np.abs(hf_logits(out, ids) - hf_logits(source, ids)).max() < 1e-4
    assert (record["head"] == "tied to the embedding") == load_hf(source).config.tie_word_embeddings


USUAL = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("changes", "stated"),
    [
        ({}, USUAL),
        ({"original_max_position_embeddings": 16}, None),  # no pair keeps its frequency, from which the base could be told
        ({"attention_factor": 1.5}, None),
        ({"beta_fast": 4.0}, None),
    ],
)
def test_an_engine_keeps_the_frequencies_of_yarn(changes: dict[str, Any], stated: Any, tmp_path: Path) -> None:
    source = llama(tmp_path / "llama", rope_parameters={**USUAL, "rope_theta": 10000.0, **changes})
    out, _ = export(engine(source, "rotate"), "gguf")
    config = open_checkpoint(out).config
    assert config["rope_scaling"] == stated and ("rope_divisors" in config) == (stated is None)
    got, expected = (read_rope(each, 16) for each in (config, open_checkpoint(source).config))
    assert np.allclose(got.inv_freq, expected.inv_freq, rtol=1e-6) and got.max_position == expected.max_position
    assert got.attention_scaling == pytest.approx(expected.attention_scaling, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "format", "found"),
    [
        (
            {"methods": None},
            "gguf",
            r"found the method rotate-online, which llama\.cpp does not compute; export its checkpoint",
        ),
        ({"methods": None, "quantization": "int8-accurate"}, "gguf", "found 16-bit activations"),
        ({"methods": None, "quantization": "int4"}, "compressed-tensors", r"found int4 in groups of 128"),
        ({"methods": ("rotate",)}, "safetensors", "found integers, and the format holds floats"),
        (
            {"methods": ("rotate",)},
            "compressed-tensors",
            r"found the op RMSNormalization, which the architecture does not have",
        ),
    ],
)
def test_an_engine_that_a_format_cannot_carry_is_refused(
    options: dict[str, Any], format: str, found: str, tmp_path: Path
) -> None:
    made = engine(bloom(tmp_path / "bloom"), **options)
    with pytest.raises(CompileError, match=found):
        export(made, format)
    assert not [path for path in tmp_path.iterdir() if format in path.name]


def test_options_that_change_a_model_are_refused(tmp_path: Path) -> None:
    made = engine(llama(tmp_path / "llama"))
    with pytest.raises(CompileError, match=r"option --quant, --methods: found the engine .* exported as they are"):
        driver.export(ExportRequest(made, tmp_path / "out", "gguf", quantization="int8-plain", methods=("rotate",)))
    with pytest.raises(CompileError, match=r"option --ignore-config-key, --ignore-adapter: found the engine"):
        driver.export(ExportRequest(made, tmp_path / "out", "gguf", reading=Reading(("a",), ignore_adapter=True)))
