"""The tokenizer of a checkpoint as the text of a tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer

from belle_compile.compiler.checkpoint.added_tokens import with_added_tokens
from belle_compile.compiler.checkpoint.sentencepiece_model import carry_ranks, convert, ranks_of, special_words
from belle_compile.compiler.checkpoint.tensors import STAGE
from belle_compile.compiler.checkpoint.tokenizer_trial import reason_against
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.json_files import read_json
from belle_compile.compiler.stored_path import StoredPath
from belle_compile.compiler.untrusted import explained, parse_bounded

_MOST_ID = 1 << 22  # ten times as many as the largest vocabularies have


def has_tokenizer(directory: StoredPath) -> bool:
    """Whether a directory has a tokenizer that `load_tokenizer` reads."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def load_tokenizer(directory: StoredPath, rows: int | None = None) -> tuple[str, list[StoredPath], list[str], dict[str, Any]]:
    """Return the text of tokenizer.json, the files read, notes, and the tokenizer_config that these files imply.

    The text includes the tokens that the files beside it add, as far as an embedding of `rows` rows has any for them (see
    `with_added_tokens`). A tokenizer.model is converted if there is no tokenizer.json. Raises CompileError if there is neither.
    """
    file = directory / "tokenizer.json"
    if file.is_file():
        text = check_tokenizer(json.dumps(read_json(file), ensure_ascii=False), str(file))
        text, files, notes = with_added_tokens(text, directory, rows)
        return text, [file, *files], notes, {}
    file = directory / "tokenizer.model"
    if file.is_file():
        return _from_sentencepiece(directory, file)
    raise CompileError(
        STAGE,
        f"tokenizer of {directory}",
        found="neither tokenizer.json nor tokenizer.model",
        expected="one of them beside the weights",
        remedy="copy it from the release the weights came from",
    )


def _from_sentencepiece(directory: StoredPath, file: StoredPath) -> tuple[str, list[StoredPath], list[str], dict[str, Any]]:
    """Convert tokenizer.model, with the tokens that fine-tuning added in tokenizer_config.json or added_tokens.json."""
    config_file, added_file = directory / "tokenizer_config.json", directory / "added_tokens.json"
    config = read_json(config_file) if config_file.is_file() else {}
    text, notes = convert(file, legacy=config.get("legacy") is not False)
    tokenizer = Tokenizer.from_str(text)
    files = [file, *([added_file] if added_file.is_file() else [])]
    with explained(STAGE, f"added tokens of {directory}", expected="ids and tokens as save_pretrained writes them"):
        added = {int(index): token for index, token in (config.get("added_tokens_decoder") or {}).items()}
        if added_file in files:
            added = {index: {"content": word} for word, index in read_json(added_file).items()} | added
        for index, token in sorted(added.items(), key=lambda item: item[0]):
            _add(tokenizer, index, token, directory)
    implied = {"add_bos_token": True, **special_words(file)}  # True is the default of these releases' slow LlamaTokenizer
    return carry_ranks(str(tokenizer.to_str()), ranks_of(text)), files, notes, implied


def _add(tokenizer: Tokenizer, index: int, token: Mapping[str, Any], directory: StoredPath) -> None:
    """Add a token to a converted tokenizer unless it has it; raises CompileError if its id is not the stated one."""
    word = token["content"]
    if tokenizer.token_to_id(word) is None:
        tokenizer.add_tokens([AddedToken(word, special=bool(token.get("special", True)), normalized=False)])
    if tokenizer.token_to_id(word) != index:
        raise CompileError(
            STAGE,
            f"added token {word!r} of {directory}",
            found=f"id {index} stated for it",
            expected=f"id {tokenizer.token_to_id(word)}, the next after tokenizer.model's",
            remedy="put a tokenizer.json beside it",
        )


def check_tokenizer(text: str, source: str) -> str:
    """Return the text of a tokenizer.json without truncation and padding, which would alter prompts.

    Raises CompileError, which names `source`, if the tokenizers library cannot read it, and for one that hostile texts would
    occupy for long (see `tokenizer_trial`).
    """
    found = "a file that the tokenizers library cannot read"
    with explained(STAGE, f"tokenizer {source}", found=found, expected="a tokenizer.json", remedy="download it again"):
        content = parse_bounded(text.encode())
        if reason := reason_against(content):
            expected, remedy = "one whose time and memory are in proportion to the text", "take that of the model's release"
            raise CompileError(STAGE, f"tokenizer {source}", found=f"that {reason}", expected=expected, remedy=remedy)
        model = content.get("model") or {}
        if model.get("type") == "BPE" and not model.get("continuing_subword_prefix"):
            merges = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
            check_merges(model["vocab"], merges)
        _check_ids(model.get("vocab"))
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return carry_ranks(str(tokenizer.to_str()), ranks_of(text))


def _check_ids(vocab: Any) -> None:
    """Raise ValueError for an id that no embedding has a row for: to write a vocabulary, the tokenizers library allocates for
    each number up to its largest id."""
    ids = vocab.values() if isinstance(vocab, dict) else ()
    if any(type(index) is not int or not 0 <= index <= _MOST_ID for index in ids):
        raise ValueError(f"ids other than whole numbers up to {_MOST_ID}")


def check_merges(vocab: Mapping[str, int], merges: Iterable[Sequence[str]]) -> None:
    """Raise ValueError for a merge outside of the vocabulary, which may make the tokenizers library end the process."""
    for left, right in merges:
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise ValueError(f"the merge of {left!r} and {right!r} is not in the vocabulary")
