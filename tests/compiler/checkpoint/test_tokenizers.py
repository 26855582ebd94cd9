"""tokenizer.json as the checkpoint has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.errors import CompileError
from tests.compiler.checkpoint.models import byte_tokenizer, write_json


def test_truncation_and_padding_are_taken_out(llama: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(llama / "tokenizer.json"))
    stored = Tokenizer.from_str(open_checkpoint(llama).tokenizer_json)
    assert len(stored.encode("hello world").ids) == 11


def test_no_tokenizer(llama: Path) -> None:
    (llama / "tokenizer.json").unlink()
    message = r"tokenizer of .*: found neither tokenizer\.json nor tokenizer\.model, expected one"
    with pytest.raises(CompileError, match=message):
        open_checkpoint(llama)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"type": "Nonsense"}, ""),
        ({"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}, "the merge of 'a' and 'b' is not"),
    ],
)
def test_unreadable_tokenizer(llama: Path, model: dict[str, Any], reason: str) -> None:
    write_json(llama / "tokenizer.json", {"version": "1.0", "model": model})
    with pytest.raises(CompileError, match=rf"a file that the tokenizers library cannot read \({reason}.*; download it again"):
        open_checkpoint(llama)
