"""Opening Hugging Face directories, whatever their format, and refusing wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.errors import CompileError
from tests.compiler.checkpoint.models import (
    BLOOM_CONFIG,
    LLAMA_CONFIG,
    bloom_tensors,
    llama_tensors,
    write_json,
    write_sharded,
    write_small_files,
    write_weights,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_formats(tmp_path: Path, dtype: torch.dtype, suffix: str, sharded: bool) -> None:
    directory = write_small_files(tmp_path, LLAMA_CONFIG)
    tensors = llama_tensors(dtype)
    if sharded:
        write_sharded(directory, tensors, suffix)
    else:
        write_weights(directory / ("model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"), tensors)
    checkpoint = open_checkpoint(directory)
    assert checkpoint.family == "llama"
    assert set(checkpoint.tensors) == set(tensors)
    for name, expected in tensors.items():
        tensor = checkpoint.tensors[name]
        values = tensor.read()
        assert (tensor.name, tensor.shape, tensor.dtype) == (name, tuple(expected.shape), str(dtype).removeprefix("torch."))
        assert values.dtype == np.float32 and values.flags.c_contiguous and values.flags.writeable
        np.testing.assert_array_equal(values, expected.float().numpy())
        np.testing.assert_array_equal(tensor.rows(3, 9), expected[3:9].float().numpy())


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_bloom_names_lose_their_prefix(tmp_path: Path, prefix: str) -> None:
    write_weights(write_small_files(tmp_path, BLOOM_CONFIG) / "pytorch_model.bin", bloom_tensors(prefix))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.family == "bloom"
    assert set(checkpoint.tensors) == set(bloom_tensors())
    assert checkpoint.tensors["ln_f.weight"].name == "ln_f.weight"
    np.testing.assert_array_equal(checkpoint.tensors["ln_f.weight"].read(), bloom_tensors()["ln_f.weight"].numpy())


def test_bare_llama_model_gets_its_prefix_and_loses_its_buffers(tmp_path: Path) -> None:
    tensors = {name.removeprefix("model."): value for name, value in llama_tensors().items() if name != "lm_head.weight"}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    write_weights(write_small_files(tmp_path, LLAMA_CONFIG) / "model.safetensors", tensors)
    assert set(open_checkpoint(tmp_path).tensors) == set(llama_tensors()) - {"lm_head.weight"}


def test_the_same_tensor_twice_is_refused(tmp_path: Path) -> None:
    tensors = bloom_tensors() | {"transformer.ln_f.weight": torch.ones(4)}
    write_weights(write_small_files(tmp_path, BLOOM_CONFIG) / "model.safetensors", tensors)
    with pytest.raises(CompileError, match=r"tensor ln_f\.weight: found it twice, .* expected every tensor once"):
        open_checkpoint(tmp_path)


def test_safetensors_are_preferred_to_pickles_and_that_is_noted(llama: Path) -> None:
    write_weights(llama / "pytorch_model.bin", {})
    checkpoint = open_checkpoint(llama)
    assert set(checkpoint.tensors) == set(llama_tensors())
    assert checkpoint.notes == ("the weights are those of model.safetensors; passed over: pytorch_model.bin",)


def test_family_of_old_releases_comes_from_their_architecture(llama: Path) -> None:
    write_json(llama / "config.json", {"architectures": ["LLaMAForCausalLM"], "vocab_size": 300})
    assert open_checkpoint(llama).family == "llama"


def test_a_tokenizer_larger_than_the_embedding_is_noted(llama: Path) -> None:
    write_json(llama / "config.json", LLAMA_CONFIG | {"vocab_size": 200})
    assert "the tokenizer knows ids up to 259 and the embedding has 200 rows" in open_checkpoint(llama).notes[0]


def test_own_chat_template_outranks_the_family(llama: Path) -> None:
    assert open_checkpoint(llama).template.name == "belle-llama"
    own = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    write_json(
        llama / "tokenizer_config.json",
        {"chat_template": [{"name": "tool", "template": "x"}, {"name": "default", "template": own}]},
    )
    assert open_checkpoint(llama).template.jinja == own
    (llama / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    assert open_checkpoint(llama).template.name == "chat_template.jinja"
    assert open_checkpoint(llama, template="belle-bloom").template.name == "belle-bloom"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "model_type": (
        {"model_type": "gpt2"},
        r"model_type of .*: found 'gpt2', expected bloom, llama.*; give a BELLE",
    ),
    "no model_type": ({"model_type": "", "architectures": []}, r"found none, expected bloom, llama"),
    "quantised": (
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        r"found a checkpoint quantised with BITSANDBYTES, expected floats, or integers of GPTQ, AWQ, ",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_config(llama: Path, name: str) -> None:
    change, message = WRONG[name]
    write_json(llama / "config.json", LLAMA_CONFIG | change)
    with pytest.raises(CompileError, match=message):
        open_checkpoint(llama)


def test_config_that_is_not_json(llama: Path) -> None:
    (llama / "config.json").write_text("{")
    with pytest.raises(CompileError, match=r"config\.json: found text that is not JSON .*expected a JSON object; download"):
        open_checkpoint(llama)
    (llama / "config.json").write_text("[]")
    with pytest.raises(CompileError, match=r"config\.json: found a JSON list, expected a JSON object"):
        open_checkpoint(llama)


def test_no_config(llama: Path) -> None:
    (llama / "config.json").unlink()
    with pytest.raises(CompileError, match=r"found no config\.json, expected a Hugging Face checkpoint .*; give the directory"):
        open_checkpoint(llama)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "model.layers.0.self_attn.q_proj.qweight",
            r"integers of model\.layers\.0\.self_attn\.q_proj in .*: found no qzeros, ",
        ),
        ("model.norm.weight", r"tensor model\.norm\.weight in .*: found dtype int32, expected float32, float16 or bfloat16"),
    ],
)
def test_tensors_that_are_not_floating_point(llama: Path, name: str, message: str) -> None:
    write_weights(llama / "model.safetensors", llama_tensors() | {name: torch.ones(4, 4, dtype=torch.int32)})
    with pytest.raises(CompileError, match=message):
        open_checkpoint(llama)
