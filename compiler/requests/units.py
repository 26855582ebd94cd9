"""The units in which requests are measured: tokens, or characters if no tokenizer is given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from belle_compile.compiler.engine_directory import is_engine
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.reading import PLAIN, Reading
from belle_compile.compiler.requests.request import STAGE, Request
from belle_compile.runtime.sentencepiece_rule import load

Unit = str | int  # a character or a token id


class Units(Protocol):
    """Splits requests into units. `name` is the plural of the unit; `source` identifies the tokenizer, None for characters."""

    name: str
    source: dict[str, str] | None

    def split(self, requests: Sequence[Request]) -> list[Sequence[Unit]]:
        """The units of each request, in order."""

    def spelled(self, unit: Unit) -> str:
        """The text of a unit in reports."""


class Characters:
    """Units that are the characters of texts and messages, or the ids of a request of token ids."""

    name = "characters"
    source: dict[str, str] | None = None

    def split(self, requests: Sequence[Request]) -> list[Sequence[Unit]]:
        return [request.written() if request.token_ids is None else request.token_ids for request in requests]

    def spelled(self, unit: Unit) -> str:
        return unit if isinstance(unit, str) else f"token {unit}"


class Tokens:
    """Units that are the tokens of texts and of message contents, without special tokens and prompt template."""

    name = "tokens"

    def __init__(self, text: str, name: str) -> None:
        self._tokenizer = load(text)
        self._vocabulary = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self.source: dict[str, str] | None = {"name": name, "sha256": hashlib.sha256(text.encode()).hexdigest()}

    def split(self, requests: Sequence[Request]) -> list[Sequence[Unit]]:
        texts = [request.written() for request in requests if request.token_ids is None]
        encoded = iter(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        return [next(encoded).ids if request.token_ids is None else self._checked(request) for request in requests]

    def spelled(self, unit: Unit) -> str:
        assert isinstance(unit, int)
        text: str = self._tokenizer.decode([unit], skip_special_tokens=False)
        return text if text.strip("\ufffd ") else str(self._tokenizer.id_to_token(unit))

    def _checked(self, request: Request) -> Sequence[int]:
        ids = request.token_ids or ()
        if max(ids, default=0) >= self._vocabulary:
            raise CompileError(
                STAGE,
                f"line {request.line}",
                found=f"token id {max(ids)}",
                expected=f"ids of the tokenizer, below {self._vocabulary}",
                remedy="give the tokenizer the ids were made with",
            )
        return ids


def open_units(
    tokenizer: str | Path | None,
    reading: Reading = PLAIN,
    on_decrypted: Callable[[int, int], None] = lambda done, total: None,
) -> Units:
    """Open the tokenizer at a path (a tokenizer.json, a checkpoint or an engine) for `Tokens`; return `Characters` for None.

    `reading` says how a checkpoint is read, and `on_decrypted` is that of `open_checkpoint`. Raises CompileError for a reading
    where there is no checkpoint.
    """
    path = None if tokenizer is None else Path(tokenizer).expanduser()
    if reading.options and (path is None or path.suffix == ".json" or is_engine(path)):
        what, found = (
            f"{', '.join(reading.options)} of calibrate-set",
            "no --tokenizer" if path is None else f"--tokenizer {path}",
        )
        raise CompileError(STAGE, what, found=found, expected="--tokenizer with a checkpoint", remedy="leave the option out")
    if path is None:
        return Characters()
    from belle_compile.compiler.checkpoint.tokenizers import check_tokenizer, load_tokenizer
    from belle_compile.compiler.json_files import read_json

    if path.is_file() and path.suffix == ".json":
        return Tokens(check_tokenizer(json.dumps(read_json(path), ensure_ascii=False), str(path)), path.name)
    if not reading.options and any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return Tokens(load_tokenizer(path)[0], path.resolve().name)
    from belle_compile.compiler.checkpoint import open_checkpoint
    from belle_compile.compiler.checkpoint.templates import RAW

    reading = replace(reading, ignore_adapter=reading.ignore_adapter or None)
    return Tokens(open_checkpoint(path, template=RAW, reading=reading, on_decrypted=on_decrypted).tokenizer_json, path.name)
