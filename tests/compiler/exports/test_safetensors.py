"""The format safetensors: a transformed float model that computes the logits of its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from belle_compile.compiler.exports import shards
from tests.compiler.exports.models import bloom, content, export, llama, requests
from tests.parity.variants import VARIANTS, hf_logits, load_hf, random_ids

CHOSEN = ("llama_gqa", "llama_tied", "llama_biases", "llama3_rope", "llama_head_dim", "bloom", "bloom_3_heads", "bloom_untied",
          "qwen2_window", "qwen3", "mistral", "internlm2", "minicpm")  # fmt: skip


@pytest.mark.parametrize("name", CHOSEN)
def test_logits_are_those_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    source = VARIANTS[name](tmp_path / name)
    out, record = export(source, "safetensors")
    ids = random_ids(source, 24)
    assert np.abs(hf_logits(out, ids) - hf_logits(source, ids)).max() < 1e-4
    assert record["quantization"]["rotations"].startswith("residual stream and values")
    assert record["quantization"]["scheme"] == "none" and record["head"] == "of its own"
    weights, before = (load_hf(path).state_dict() for path in (out, source))
    changed = [key for key in weights if key in before and not np.array_equal(weights[key], before[key])]
    assert any(key.endswith(("q_proj.weight", "query_key_value.weight")) for key in changed), "the weights are rotated"


def test_smoothing_and_a_tied_head_are_kept(tmp_path: Path) -> None:
    source = llama(tmp_path / "llama", tie_word_embeddings=True)
    out, record = export(
        source, "safetensors", methods=("smooth", "rotate"), keep_tied=True, calibration=requests(source), gate=None
    )
    ids = random_ids(source, 24)
    assert np.abs(hf_logits(out, ids) - hf_logits(source, ids)).max() < 1e-4
    assert record["head"] == "tied to the embedding" and "smoothing" not in record["quantization"]
    assert any("--keep-tied" in note for note in record["notes"])
    with safe_open(out / "model.safetensors", framework="np") as file:
        assert "lm_head.weight" not in file.keys()


def test_the_residual_connection_after_the_norm_keeps_its_stream(tmp_path: Path) -> None:
    source = bloom(tmp_path / "bloom", apply_residual_connection_post_layernorm=True)
    out, record = export(source, "safetensors")
    ids = random_ids(source, 24)
    assert np.abs(hf_logits(out, ids) - hf_logits(source, ids)).max() < 1e-4
    assert any(note.startswith("rotate-centered-residual: h.0") for note in record["notes"])


def test_the_same_export_has_the_same_bytes(tmp_path: Path) -> None:
    source = bloom(tmp_path / "bloom")
    assert content(export(source, "safetensors")[0]) == content(export(source, "safetensors")[0])


def test_large_models_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = llama(tmp_path / "llama")
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    out, record = export(source, "safetensors")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    parts = sorted(set(index["weight_map"].values()))
    assert len(parts) > 2 and record["weights"] == [*parts, "model.safetensors.index.json"]
    sizes = [(out / part).stat().st_size for part in parts]
    assert max(sizes) < 110_000 and index["metadata"]["total_size"] <= sum(sizes)
    ids = random_ids(source, 24)
    assert np.abs(hf_logits(out, ids) - hf_logits(source, ids)).max() < 1e-4


def test_a_gguf_file_becomes_a_release_that_adds_bos_where_it_does(tmp_path: Path) -> None:
    source = llama(tmp_path / "llama")
    (source / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    plain = json.loads((source / "tokenizer.json").read_text())
    plain["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (source / "tokenizer.json").write_text(json.dumps(plain))
    file, _ = export(source, "gguf", quantization="int8-plain")
    out, _ = export(file, "safetensors", quantization="none")
    ours, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(source)
    assert ours.encode("the helo") == theirs.encode("the helo") and ours.encode("the")[0] == 1
    chat = [{"role": "user", "content": "helo"}]
    assert (
        ours.apply_chat_template(chat, return_dict=True)["input_ids"]
        == theirs.apply_chat_template(chat, return_dict=True)["input_ids"]
    )


@pytest.mark.parametrize("make", [llama, bloom])
def test_transformers_loads_tokenizer_template_and_generation(make: object, tmp_path: Path) -> None:
    source = make(tmp_path / "model")  # type: ignore[operator]
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    (source / "chat_template.jinja").write_text(template)
    (source / "generation_config.json").write_text(
        json.dumps(
            {
                "do_sample": True,
                "temperature": 0.5,
                "top_p": 0.9,
                "max_new_tokens": 7,
                "eos_token_id": [2, 3],
                "min_p": 0.1,
                "stop_strings": ["END"],
            }
        )
    )
    out, _ = export(source, "safetensors")
    ours, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(source)
    for text in ("the and ing helo", "  你好 世界, x.\n", "<s> the </s>"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    chat = [{"role": "user", "content": "helo"}, {"role": "assistant", "content": "世界"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<s>", "</s>", "<pad>")
    generation = load_hf(out).generation_config
    assert (generation.do_sample, generation.temperature, generation.top_p) == (True, 0.5, 0.9)
    assert generation.eos_token_id == [2, 3] and generation.max_new_tokens == 7
    assert generation.min_p == 0.1 and generation.stop_strings == ["END"]
