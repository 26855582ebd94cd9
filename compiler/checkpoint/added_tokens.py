"""Tokens that the files beside a tokenizer.json add to it, as Transformers does (TokenizersBackend.__init__)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer

from belle_compile.compiler.checkpoint.sentencepiece_model import carry_ranks, ranks_of
from belle_compile.compiler.checkpoint.special_tokens import word_of
from belle_compile.compiler.checkpoint.tensors import STAGE
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.json_files import read_json
from belle_compile.compiler.stored_path import StoredPath
from belle_compile.compiler.untrusted import explained

ADDED_TOKENS, TOKENIZER_CONFIG, TOKENS_MAP = "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"
_NAMED = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_EXTRA = ("extra_special_tokens", "additional_special_tokens")  # the names of Transformers 5 and 4
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def with_added_tokens(text: str, directory: StoredPath, rows: int | None) -> tuple[str, list[StoredPath], list[str]]:
    """The text of a tokenizer.json with the tokens of the files beside it, the files that added some, and notes.

    Those are the tokens of added_tokens_decoder in tokenizer_config.json or, if it has none, of added_tokens.json, and the
    special tokens that tokenizer_config.json and special_tokens_map.json name. A token that the tokenizer knows keeps its id.
    New ones get the next ids in the order of their stated ones. Those for which an embedding of `rows` rows (None: not known)
    has none are left out: the model could not read them. Raises CompileError for tokens that are not in Transformers' form.
    """
    form = "ids and tokens as save_pretrained writes them"
    with explained(STAGE, f"added tokens of {directory}", expected=form, remedy="download its tokenizer files again"):
        return _with_added_tokens(text, directory, rows)


def _with_added_tokens(text: str, directory: StoredPath, rows: int | None) -> tuple[str, list[StoredPath], list[str]]:
    tokenizer = Tokenizer.from_str(text)
    config, tokens_map = (_optional(directory / name) for name in (TOKENIZER_CONFIG, TOKENS_MAP))
    old = config.get("added_tokens_decoder") is None
    mapped = {key: value for key, value in tokens_map.items() if word_of(value) or (key in _EXTRA and value)}
    specials = _special_tokens({**config, **mapped} if old else config)
    decoder = config.get("added_tokens_decoder") or {}
    source = TOKENIZER_CONFIG
    if old and (directory / ADDED_TOKENS).is_file():
        source = ADDED_TOKENS
        decoder = _as_decoder(read_json(directory / ADDED_TOKENS), {token.content for token in specials})
    stated = _decoded(decoder, directory / source)
    have = {_key(token) for token in tokenizer.get_added_tokens_decoder().values()}
    contents = {content for content, *_ in have}
    tokens = [token for _, token in stated if _key(token) not in have]
    listed = contents | {token.content for token in tokens}
    tokens += [token for token in specials if token.content not in listed]
    if not tokens:
        return text, [], []
    usable, beyond = _fitting(tokenizer, tokens, rows)
    tokenizer.add_tokens(usable)
    files = [directory / source] if source == ADDED_TOKENS and any(token in usable for _, token in stated) else []
    notes = [*_left_out(beyond, rows), *_moved(tokenizer, stated, source)]
    return carry_ranks(str(tokenizer.to_str()), ranks_of(text)), files, notes


def _optional(file: StoredPath) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _special_tokens(words: Mapping[str, Any]) -> list[AddedToken]:
    """The special tokens that tokenizer_config.json names, each once; empty words count as absent."""
    extra: Any = next((words[key] for key in _EXTRA if words.get(key)), [])
    own = [value for key, value in words.items() if key.endswith("_token") and key not in _NAMED]
    listed = list(extra.values()) if isinstance(extra, dict) else extra if isinstance(extra, list) else []
    stated = [*(words.get(name) for name in _NAMED), *own, *listed]
    tokens: dict[str, AddedToken] = {}
    for token in (_token(value, special=True) for value in stated if word_of(value)):
        tokens.setdefault(token.content, token)
    return list(tokens.values())


def _as_decoder(encoder: Mapping[str, Any], special: set[str]) -> dict[str, Any]:
    """added_tokens.json, which maps words to ids, in the form of added_tokens_decoder."""
    return {
        str(index): {"content": word, "special": word in special, "normalized": word not in special}
        for word, index in encoder.items()
    }


def _decoded(decoder: Any, file: StoredPath) -> list[tuple[int, AddedToken]]:
    """The tokens of an added_tokens_decoder with their stated ids, in the order of these."""
    try:
        return sorted(((int(index), _token(token)) for index, token in decoder.items()), key=lambda item: item[0])
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise CompileError(
            STAGE,
            f"added tokens of {file}",
            found=f"tokens that cannot be read ({type(e).__name__}: {e})",
            expected="ids and tokens as save_pretrained writes them",
            remedy="download the file again",
        ) from e


def _token(stated: Any, **flags: bool) -> AddedToken:
    if isinstance(stated, str):
        return AddedToken(stated, **{"normalized": False, **flags})
    return AddedToken(str(stated["content"]), **{**{key: bool(stated[key]) for key in _FLAGS if key in stated}, **flags})


def _key(token: AddedToken) -> tuple[str, bool, bool, bool, bool, bool]:
    return token.content, token.single_word, token.lstrip, token.rstrip, token.normalized, token.special


def _fitting(tokenizer: Tokenizer, tokens: Iterable[AddedToken], rows: int | None) -> tuple[list[AddedToken], list[AddedToken]]:
    """The tokens whose ids are rows of the embedding, and the others."""
    tokens = list(tokens)
    if rows is None:
        return tokens, []
    trial = Tokenizer.from_str(tokenizer.to_str())
    trial.add_tokens(tokens)
    fits = [(index := trial.token_to_id(token.content)) is not None and index < rows for token in tokens]
    return (
        [token for token, fit in zip(tokens, fits, strict=True) if fit],
        [token for token, fit in zip(tokens, fits, strict=True) if not fit],
    )


def _left_out(tokens: Iterable[AddedToken], rows: int | None) -> list[str]:
    words = ", ".join(repr(token.content) for token in tokens)
    return [f"{words}: not in the tokenizer, and the embedding of {rows} rows has none for them; left out"] if words else []


def _moved(tokenizer: Tokenizer, stated: Iterable[tuple[int, AddedToken]], source: str) -> list[str]:
    """A note on tokens whose id in the tokenizer is another than the stated one."""
    moved = [
        f"{token.content!r} is {index}, not {wanted}"
        for wanted, token in stated
        if (index := tokenizer.token_to_id(token.content)) not in (None, wanted)
    ]
    return [f"ids of tokenizer.json, as in Transformers, and not of {source}: {', '.join(moved)}"] if moved else []
