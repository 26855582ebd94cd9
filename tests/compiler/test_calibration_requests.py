"""Requests that a checkpoint cannot run: left out, or cut, and counted by reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken

from belle_compile.compiler.calibration import read_calibration
from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.errors import CompileError
from tests.compiler.checkpoint.models import LLAMA_CONFIG, byte_tokenizer, write_json, write_llama


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A model of 260 rows and 64 positions, whose tokenizer knows [PAD] and <extra> beyond."""
    folder = write_llama(tmp_path / "llama")
    write_json(folder / "config.json", LLAMA_CONFIG | {"vocab_size": 260, "max_position_embeddings": 64})
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken("[PAD]", special=True), AddedToken("<extra>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def written(folder: Path, texts: list[str]) -> Path:
    file = folder / "requests.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def text(number: int) -> str:
    """Texts that are no near duplicates of each other."""
    return " ".join(str(number * factor) for factor in (7919, 104729, 1299709))


def test_tokens_without_a_row_of_the_embedding(checkpoint: Path, tmp_path: Path) -> None:
    texts = [text(i) + {3: " [PAD]", 5: " <extra>[PAD]", 8: "[PAD]"}.get(i, "") for i in range(1, 31)]
    calibration = read_calibration(written(tmp_path, texts), open_checkpoint(checkpoint), raw=True)
    assert len(calibration.calibration) + len(calibration.holdout) == 27
    assert all(max(sample.tokens) < 260 for sample in (*calibration.calibration, *calibration.holdout))
    assert calibration.notes == (
        "1 calibration requests were left out: with <extra>, which the embedding has no row for",
        "2 calibration requests were left out: with [PAD], which the embedding has no row for",
    )


def test_requests_longer_than_the_context_are_cut(checkpoint: Path, tmp_path: Path) -> None:
    texts = [text(i) * (6 if i % 3 == 0 else 1) for i in range(1, 31)]
    calibration = read_calibration(written(tmp_path, texts), open_checkpoint(checkpoint), raw=True)
    lengths = [len(sample.tokens) for sample in (*calibration.calibration, *calibration.holdout)]
    assert len(lengths) == 30 and max(lengths) == 64
    assert calibration.notes == ("10 calibration requests were cut to 64 tokens, the model's context",)


def test_nothing_left_says_why(checkpoint: Path, tmp_path: Path) -> None:
    file = written(tmp_path, [text(i) + "[PAD]" for i in range(1, 9)])
    message = r"found 0 requests to calibrate with and 0 held out; 8 calibration requests were left out: with \[PAD\]"
    with pytest.raises(CompileError, match=message):
        read_calibration(file, open_checkpoint(checkpoint), raw=True)


def test_requests_that_all_fit_give_no_note(checkpoint: Path, tmp_path: Path) -> None:
    file = written(tmp_path, [text(i) for i in range(1, 31)])
    assert read_calibration(file, open_checkpoint(checkpoint), raw=True).notes == ()


def test_null_requests_are_dropped_as_empty_ones(checkpoint: Path, tmp_path: Path) -> None:
    file = written(tmp_path, [text(i) for i in range(1, 31)])
    with file.open("a") as lines:
        lines.write('{"text": null}\n{"messages": null}\n\n')
    calibration = read_calibration(file, open_checkpoint(checkpoint), raw=True)
    assert len(calibration.calibration) + len(calibration.holdout) == 30


def test_a_json_array_is_named_before_any_work(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "requests.json"
    file.write_text(json.dumps([{"text": "a"}, {"text": "b"}]))
    with pytest.raises(CompileError, match=r"found a list, expected a JSON object; write one object a line, with jq -c"):
        read_calibration(file, open_checkpoint(checkpoint))
