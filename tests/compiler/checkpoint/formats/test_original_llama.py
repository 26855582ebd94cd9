"""Original LLaMA releases: the model that Transformers has from its own conversion, from any number of parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import build_graph
from belle_compile.runtime.sentencepiece_rule import load
from tests.compiler.checkpoint.models import Attack
from tests.parity.stepping import Stepper, relative_error
from tests.parity.variants import hf_logits, random_ids
from tests.releases import MULTIPLE_OF, TEXT, belle_llama, hugging_face_tensors, original_llama


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return belle_llama(tmp_path_factory.mktemp("source") / "hugging-face")


@pytest.fixture
def release(source: Path, tmp_path: Path) -> Path:
    return original_llama(source, tmp_path / "13B", parts=2)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize(
    ("config", "params"),
    [
        ({}, {}),
        ({"num_key_value_heads": 4, "num_attention_heads": 8, "rms_norm_eps": 1e-5}, {"vocab_size": 420}),
        (  # as Llama-2 70B: 1.3 * (2 / 3 * 4 * 64) = 221, rounded up; and as Code Llama
            {"intermediate_size": 224, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            {"ffn_dim_multiplier": 1.3, "rope_theta": 1000000},
        ),
    ],
    ids=["llama", "shared heads", "ffn and theta"],
)
def test_values_and_logits(tmp_path: Path, parts: int, config: dict[str, Any], params: dict[str, Any]) -> None:
    source = belle_llama(tmp_path / "hugging-face", **config)
    opened = open_checkpoint(original_llama(source, tmp_path / "original", parts=parts, **params))
    expected = hugging_face_tensors(source)
    assert set(opened.tensors) == set(expected)
    for name, values in expected.items():
        tensor = opened.tensors[name]
        assert (tensor.shape, tensor.dtype) == (tuple(values.shape), "float16")
        np.testing.assert_array_equal(tensor.read(), values.float().numpy(), err_msg=name)
        np.testing.assert_array_equal(tensor.rows(3, 31), values[3:31].float().numpy(), err_msg=name)
    ids = random_ids(source, 21)
    assert relative_error(Stepper(build_graph(opened)).step({0: ids})[0], hf_logits(source, ids)) < 1e-5


def test_tokenizer_template_and_special_tokens(source: Path, release: Path) -> None:
    opened = open_checkpoint(release)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(release / "tokenizer.model"))
    tokenizer = load(opened.tokenizer_json)
    assert all(tokenizer.encode(text, add_special_tokens=False).ids == reference.encode(text) for text in TEXT)
    special = opened.special
    assert (special["bos_token"], special["eos_token"], special["eos_token_ids"]) == ("<s>", "</s>", [2])
    assert special["add_bos"] is False and special["add_bos_raw"] is True
    assert (opened.template.name, opened.config["max_position_embeddings"]) == ("belle-llama", 2048)
    assert "params.json states no context length: 2048, that of the LLaMA release with these dimensions" in opened.notes
    assert set(opened.digests()) == {"params.json", "consolidated.00.pth", "consolidated.01.pth", "tokenizer.model"}
    assert open_checkpoint(source).tokenizer_json == opened.tokenizer_json


@pytest.mark.parametrize(
    ("params", "length"),
    [
        ({"norm_eps": 1e-5}, 4096),
        ({"norm_eps": 1e-6}, 2048),
        ({"rope_theta": 1e6}, 16384),
        ({"norm_eps": 1e-5, "rope_theta": 500000.0}, 8192),
    ],
)
def test_context_lengths(release: Path, params: dict[str, Any], length: int) -> None:
    change_params(release, **params)
    assert open_checkpoint(release).config["max_position_embeddings"] == length


def test_a_tokenizer_in_the_directory_above(release: Path) -> None:
    """As in LLaMA's first release, where the models of all sizes share one."""
    shutil.move(release / "tokenizer.model", release.parent)
    assert "tokenizer.model" in open_checkpoint(release).digests()
    (release.parent / "tokenizer.model").unlink()
    with pytest.raises(CompileError, match=r"tokenizer of \S+13B: found neither tokenizer.json nor tokenizer.model"):
        open_checkpoint(release)


def test_llama_3_divides_the_vocabulary(source: Path, tmp_path: Path) -> None:
    release = original_llama(source, tmp_path / "8B", parts=2)
    table = hugging_face_tensors(source)["model.embed_tokens.weight"]
    for file, rows in zip(sorted(release.glob("*.pth")), table.chunk(2), strict=True):
        torch.save(torch.load(file, weights_only=True) | {"tok_embeddings.weight": rows.clone()}, file)
    read = open_checkpoint(release).tensors["model.embed_tokens.weight"]
    np.testing.assert_array_equal(read.rows(205, 215), table[205:215].float().numpy())


def change_params(release: Path, **params: Any) -> None:
    file = release / "params.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | params))


def change_output(release: Path, value: torch.Tensor) -> None:
    change_part(release, **{"output.weight": value})


def change_part(release: Path, **tensors: Any) -> None:
    file = release / "consolidated.01.pth"
    kept = torch.load(file, weights_only=True) | tensors
    torch.save({name: value for name, value in kept.items() if value is not None}, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: (r / "consolidated.01.pth").unlink(), "found no consolidated.01.pth, expected the 2 parts that"),
        (lambda r: (r / "consolidated.00.pth").unlink(), "found no consolidated.00.pth, expected the 2 parts that"),
        (lambda r: shutil.copy(r / "consolidated.01.pth", r / "consolidated.02.pth"), "found 3 files, expected the 2 parts"),
        (lambda r: (r / "params.json").unlink(), "found only consolidated.00.pth, original LLaMA weights, .*put params.json"),
        (lambda r: change_params(r, n_experts=8), "params.json: found the key n_experts, expected the keys of LLaMA"),
        (lambda r: change_params(r, use_scaled_rope=True), "use_scaled_rope, of Llama 3.1 or later"),
        (lambda r: change_params(r, n_heads="32"), "params.json: found n_heads 32, expected a positive whole number"),
        (lambda r: change_params(r, n_heads=5), "found dim 64, n_heads 5 and n_kv_heads 5, expected heads of one even size"),
        (lambda r: change_params(r, vocab_size=32000), "found 420 rows, expected an embedding of 32000 rows, as params.json"),
        (lambda r: change_params(r, dim=68), "without rows of layers.0.attention.wq.weight|heads of one"),
        (lambda r: change_params(r, multiple_of=2 * MULTIPLE_OF + 1), "mlp.gate_proj.weight .*found shape"),
        (lambda r: change_part(r, **{"norm.weight": None}), "norm.weight in one of consolidated.00.pth and consolidated.01"),
        (lambda r: change_output(r, torch.ones(7, 64).half()), r"output.weight in .*01.pth: found shape \[7, 64\]"),
        (lambda r: change_output(r, torch.ones(210, 64).int()), "output.weight in .*01.pth: found dtype int32"),
        (lambda r: change_output(r, torch.ones(()).half()), r"output.weight in .*01.pth: found shape \[\]"),
        (lambda r: (r / "tokenizer.model").write_text("IQ== 0\nIg== 1\n"), "found tokens of tiktoken, as in Llama 3"),
        (lambda r: (r / "tokenizer.model").write_bytes(b"\x0a\xff"), "tokenizer .*found a file that sentencepiece cannot read"),
        (lambda r: (r / "consolidated.01.pth").write_bytes(b"PK\x03\x04"), "found a file of 4 bytes that does not load"),
    ],
)  # fmt: skip
def test_wrong_releases(release: Path, change: Callable[[Path], None], message: str) -> None:
    change(release)
    with pytest.raises(CompileError, match=message):
        build_graph(open_checkpoint(release))


def test_unknown_tensors(release: Path) -> None:
    for file in release.glob("*.pth"):
        torch.save(torch.load(file, weights_only=True) | {"layers.0.feed_forward.w4.weight": torch.ones(3)}, file)
    with pytest.raises(CompileError, match=r"tensor layers\.0\.feed_forward\.w4\.weight in .*: found an unknown name"):
        open_checkpoint(release)


def test_code_does_not_run(release: Path, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    torch.save({"a": Attack(trace)}, release / "consolidated.01.pth")
    with pytest.raises(CompileError, match=r"consolidated\.01\.pth: found a pickle that holds more than tensors"):
        open_checkpoint(release)
    assert not trace.exists()


def test_weights_of_hugging_face_beside_them_are_preferred(source: Path, tmp_path: Path) -> None:
    release = Path(shutil.copytree(source, tmp_path / "both"))
    shutil.copytree(original_llama(source, tmp_path / "original"), release, dirs_exist_ok=True)
    opened = open_checkpoint(release)
    assert any("passed over: consolidated.00.pth (original LLaMA weights)" in note for note in opened.notes)
