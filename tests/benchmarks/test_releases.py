"""The release of BELLE-7B's shape that a benchmark writes, and the comparison of token ids, both small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.families import build_graph
from belle_compile.compiler.reading import AdapterChoice, Reading
from benchmarks import belle_7b, checkpoints, tokenizer_ids
from tests.releases import TEXT, sentencepiece_model


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases of a small shape."""
    sizes = {"hidden_size": 128, "n_head": 4, "vocab_size": 500}
    monkeypatch.setitem(checkpoints.SHAPES, "bloom-7b1", checkpoints.SHAPES["bloom-7b1"] | sizes)


def test_the_pickle_is_one_that_pytorch_reads(tmp_path: Path) -> None:
    file = belle_7b.write_release(tmp_path / "release", layers=2)
    state = torch.load(file, weights_only=True)
    assert state["lm_head.weight"].data_ptr() == state["transformer.word_embeddings.weight"].data_ptr()
    assert state["transformer.h.1.mlp.dense_4h_to_h.weight"].std().item() == pytest.approx(checkpoints.STD, rel=0.1)
    assert state["transformer.ln_f.weight"].tolist() == [1] * 128 and not state["transformer.ln_f.bias"].any()
    checkpoint = open_checkpoint(file.parent)
    build_graph(checkpoint)


def test_the_adapter_changes_queries_keys_and_values_of_each_layer(tmp_path: Path) -> None:
    base = belle_7b.write_release(tmp_path / "release", layers=2).parent
    adapter = belle_7b.write_adapter(tmp_path / "adapter", base)
    with_adapter = open_checkpoint(base, reading=Reading(adapters=(AdapterChoice(str(adapter)),)))
    plain = open_checkpoint(base)
    changed = {name for name, tensor in plain.tensors.items() if (with_adapter.tensors[name].read() != tensor.read()).any()}
    assert changed == {name for name in plain.tensors if name.endswith("query_key_value.weight")} and len(changed) == 2


def test_the_integers_of_gptq_stand_for_weights_of_the_usual_size(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(belle_7b.write_gptq(tmp_path / "release", layers=1))
    build_graph(checkpoint)
    weight = next(tensor for name, tensor in checkpoint.tensors.items() if name.endswith("dense_4h_to_h.weight")).read()
    assert weight.shape == (128, 512) and abs(weight.mean()) < 0.002
    assert weight.std() == pytest.approx(256 / 12**0.5 * checkpoints.STD / 64, rel=0.05)


def test_ids_of_a_model_and_of_its_extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_ids, "EXTENDED", 440)
    model, texts = sentencepiece_model(tmp_path / "tokenizer.model"), list(dict.fromkeys(TEXT))
    made = dict(tokenizer_ids.variants(model, texts, tmp_path))
    assert len(made) == 3
    for what, directory in made.items():
        others = {"sentencepiece": tokenizer_ids.of_sentencepiece(directory)}
        found = tokenizer_ids.agreement(texts, tokenizer_ids.ours_of(directory), others)
        assert found["same ids as sentencepiece"] == found["of these, same ids"] == len(texts), what


def test_only_texts_on_which_the_others_agree_count() -> None:
    others = {"sentencepiece": lambda text: [len(text)], "Transformers": lambda text: [min(len(text), 2)]}
    found = tokenizer_ids.agreement(["a", "bb", "ccc"], lambda text: [1, 2, 9][len(text) - 1 : len(text)], others)
    assert (found["texts on which the others agree"], found["of these, same ids"]) == (2, 2)
    assert (found["same ids as sentencepiece"], found["same ids as Transformers"]) == (2, 2)
