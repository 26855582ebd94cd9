"""Characters, and tokens of a tokenizer from a file, a checkpoint or an engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.reading import Reading
from belle_compile.compiler.requests.request import Request
from belle_compile.compiler.requests.units import open_units

REQUESTS = [Request(text="a b a"), Request(token_ids=(2, 1)), Request(messages=({"role": "user", "content": "b"},))]


def write_tokenizer(path: Path) -> Path:
    """Words a, b, c and an unknown one; saved with a truncation that must not count."""
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "b": 2, "c": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.save(str(path))
    return path


def test_characters() -> None:
    units = open_units(None)
    assert [list(parts) for parts in units.split(REQUESTS)] == [list("a b a"), [2, 1], ["b"]]
    assert (units.name, units.source, units.spelled("你"), units.spelled(3)) == ("characters", None, "你", "token 3")


def test_tokens(tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path / "tokenizer.json")
    units = open_units(file)
    assert [list(parts) for parts in units.split(REQUESTS)] == [[1, 2, 1], [2, 1], [2]]
    assert units.name == "tokens" and units.spelled(2) == "b"
    in_directory = open_units(tmp_path)
    assert units.source is not None and in_directory.source is not None
    assert units.source["sha256"] == in_directory.source["sha256"] and units.source["name"] == "tokenizer.json"


def test_token_ids_of_another_tokenizer(tmp_path: Path) -> None:
    units = open_units(write_tokenizer(tmp_path / "tokenizer.json"))
    with pytest.raises(CompileError, match=r"line 5: found token id 4, expected ids of the tokenizer, below 4"):
        units.split([Request(token_ids=(3, 4), line=5)])


def test_options_of_reading_are_those_of_a_checkpoint(tmp_path: Path) -> None:
    reading = Reading(ignored_config_keys=("a",), key=tmp_path / "key")
    for tokenizer, found in (
        (None, "no --tokenizer"),
        (write_tokenizer(tmp_path / "tokenizer.json"), r"--tokenizer \S+\.json"),
    ):
        message = (
            f"--ignore-config-key, --key of calibrate-set: found {found}, expected --tokenizer with a checkpoint; leave the"
        )
        with pytest.raises(CompileError, match=message):
            open_units(tokenizer, reading)


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CompileError, match=r"expected a tokenizer\.json"):
        open_units(tmp_path / "tokenizer.json")
    with pytest.raises(CompileError, match="found nothing there"):
        open_units(tmp_path / "missing")
