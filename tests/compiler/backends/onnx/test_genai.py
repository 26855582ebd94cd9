"""The folder for ONNX Runtime GenAI: the config says what the model has; where GenAI is installed, its answers are checked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("onnxruntime")

from belle_compile.compiler.backends.onnx.genai import CONFIG_NAME, genai_config, genai_folder
from belle_compile.runtime.artifact import GenerationDefaults, SpecialTokens
from tests.compiler.backends.onnx.test_translate import graph
from tests.parity.engines import Builder
from tests.parity.variants import hf_greedy, random_ids

TOKENS = SpecialTokens(bos=1, eos=(2, 5), pad=None, add_bos=False)
GENERATION = GenerationDefaults(max_new_tokens=9, temperature=0.35, top_k=30, top_p=0.85, repetition_penalty=1.2)
FILES = {"tokenizer.json": "{}", "tokenizer_config.json": "{}"}


@pytest.fixture(params=["bloom", "llama_gqa"])
def folder(request: pytest.FixtureRequest, builder: Builder, tmp_path: Path) -> tuple[Path, Path]:
    """A variant's checkpoint, and the folder of its float32 model."""
    checkpoint = builder.checkpoint(request.param)
    genai_folder(tmp_path, graph(checkpoint, "none"), TOKENS, GENERATION, FILES)
    return checkpoint, tmp_path


def test_the_config_says_what_the_model_has(folder: tuple[Path, Path]) -> None:
    path = folder[1]
    assert {file.name for file in path.iterdir()} == {"model.onnx", "weights.safetensors", CONFIG_NAME, *FILES}
    onnx.checker.check_model(str(path / "model.onnx"))
    model, config = onnx.load(path / "model.onnx", load_external_data=False), json.loads((path / CONFIG_NAME).read_text())
    decoder = config["model"]["decoder"]
    layers = range(decoder["num_hidden_layers"])
    for names, values in ((decoder["inputs"], model.graph.input), (decoder["outputs"], model.graph.output)):
        told = {pattern % layer if "%d" in pattern else pattern for pattern in names.values() for layer in layers}
        assert told == {value.name for value in values}
    (past,) = [value for value in model.graph.input if value.name == decoder["inputs"]["past_key_names"] % 0]
    _, heads, _, size = past.type.tensor_type.shape.dim
    assert (heads.dim_value, size.dim_value) == (decoder["num_key_value_heads"], decoder["head_size"])
    assert config["model"]["eos_token_id"] == [2, 5] and config["model"]["pad_token_id"] == 2
    search = config["search"]
    assert (search["do_sample"], search["temperature"], search["top_k"]) == (True, 0.35, 30)


def test_greedy_and_no_special_tokens() -> None:
    facts = dict.fromkeys(
        ("head_dim", "hidden_size", "num_heads", "num_layers", "num_kv_heads", "vocab_size", "max_position"), 8
    )
    config = genai_config(facts, SpecialTokens(None, (), None, False), GenerationDefaults())
    assert config["search"]["do_sample"] is False and config["search"]["temperature"] == 1.0
    assert {config["model"][name] for name in ("bos_token_id", "pad_token_id")} == {0}


def test_genai_answers_as_transformers(folder: tuple[Path, Path]) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    checkpoint, path = folder
    ids = random_ids(checkpoint, 21)
    model = genai.Model(str(path))
    params = genai.GeneratorParams(model)
    length = len(ids) + 16
    params.set_search_options(do_sample=False, max_length=length, min_length=length, repetition_penalty=1.0)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array(ids, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0)[len(ids) :].tolist() == hf_greedy(checkpoint, ids, 16)
