"""Convert the tokenizer in a GGUF file's metadata to a tokenizer.json."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from belle_compile.compiler.checkpoint.formats.gguf_rules import LLAMA3, SENTENCEPIECE, TEKKEN, ends_answer, special_id
from belle_compile.compiler.checkpoint.sentencepiece_model import CONTROL, NORMAL, USER_DEFINED, spm_tokenizer, with_ranks
from belle_compile.compiler.checkpoint.tensors import STAGE
from belle_compile.compiler.checkpoint.tokenizers import check_merges
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.stored_path import StoredPath
from belle_compile.compiler.untrusted import explained

# Values of tokenizer.ggml.pre, grouped by how llama.cpp splits texts for them (src/llama-vocab.cpp).
GPT2 = {"gpt-2", "gpt2", "phi-2", "mpt", "olmo"}
DIGITS_GPT2 = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
BLOOM = {"bloom"}
QWEN2 = {"qwen2", "deepseek-r1-qwen"}
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


BLOOM_SPLIT = r" ?[^(\s|[.,!?…。，、।۔،])]+"
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")  # digits one by one
_ENDS_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_BEGINS_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
TEKKEN_SPLIT = rf"{_ENDS_LOWER}|{_BEGINS_UPPER}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The expression that splits texts for each value of tokenizer.ggml.pre that has one.
_SPLITS = {
    **dict.fromkeys(LLAMA3, LLAMA3_SPLIT), **dict.fromkeys(BLOOM, BLOOM_SPLIT), **dict.fromkeys(QWEN2, QWEN2_SPLIT),
    **dict.fromkeys(TEKKEN, TEKKEN_SPLIT),
}  # fmt: skip
_REMEDY = "put the tokenizer.json of the model beside it and give the directory"
_KNOWN = GPT2 | DIGITS_GPT2 | _SPLITS.keys()


def gguf_tokenizer(file: StoredPath, get: Any) -> str:
    """Return the text of a tokenizer.json for the metadata, which `get(key, default)` reads; raises CompileError for a
    tokenizer that is not supported."""
    tokens, kind = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.model")
    if not tokens:
        raise _unsupported(file, "no tokenizer.ggml.tokens in its metadata", "a tokenizer")
    if kind not in {"gpt2", SENTENCEPIECE}:
        raise _unsupported(file, f"tokenizer.ggml.model {kind!r}", f"gpt2 or {SENTENCEPIECE}")
    pre = get("tokenizer.ggml.pre", "gpt-2")  # a wrong split would give wrong ids without any error
    if kind == "gpt2" and pre not in _KNOWN:
        raise _unsupported(file, f"tokenizer.ggml.pre {pre!r}", ", ".join(sorted(_KNOWN)))
    stated = get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    found, expected = "metadata that makes no tokenizer", "tokens and merges that fit together"
    with explained(STAGE, f"tokenizer of {file}", found=found, expected=expected, remedy=_REMEDY):
        types = [CONTROL if ends_answer(token) else kind for token, kind in zip(tokens, stated, strict=True)]
        return str(_byte_level(tokens, types, pre, get).to_str()) if kind == "gpt2" else _sentencepiece(tokens, types, get)


def _sentencepiece(tokens: list[str], types: list[int], get: Any) -> str:
    scores = get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    unknown = tokens[special_id(get, "unknown") or 0]
    pieces = list(zip(tokens, scores, types, strict=True))
    tokenizer = spm_tokenizer(
        pieces,
        unknown=unknown,
        byte_fallback=True,
        prefix_space=get("tokenizer.ggml.add_space_prefix", True),
        legacy=True,
    )
    return with_ranks(str(tokenizer.to_str()), pieces)


def _byte_level(tokens: list[str], types: list[int], pre: str, get: Any) -> Tokenizer:
    """Make a byte-level BPE tokenizer that splits texts as the pre-tokenizer `pre` of llama.cpp does."""
    merges = [tuple(merge.split(" ", 1)) for merge in get("tokenizer.ggml.merges", [])]
    vocab = {token: index for index, token in enumerate(tokens)}
    check_merges(vocab, merges)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in LLAMA3 | TEKKEN))
    if pre in _SPLITS:
        split: list[Any] = [
            pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if pre in DIGITS_GPT2 else []
        split = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == CONTROL)
            for token, kind in zip(tokens, types, strict=True)
            if kind in {CONTROL, USER_DEFINED}
        ]
    )
    return tokenizer


def _unsupported(file: StoredPath, found: str, expected: str) -> CompileError:
    return CompileError(
        STAGE,
        f"tokenizer of {file}",
        found=found,
        expected=expected,
        remedy=_REMEDY,
    )
