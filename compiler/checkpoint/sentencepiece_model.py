"""Convert a sentencepiece `tokenizer.model` to a tokenizer.json that encodes to the same ids."""

from __future__ import annotations

import json
import re
from contextlib import AbstractContextManager
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from belle_compile.compiler.checkpoint.tensors import STAGE
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.lfs import refuse_pointer
from belle_compile.compiler.stored_path import StoredPath
from belle_compile.compiler.untrusted import explained, read_bounded
from belle_compile.runtime.sentencepiece_rule import RANKS_KEY, load

SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # ModelProto.SentencePiece.Type
BPE = 2  # TrainerSpec.ModelType
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")  # a token in base64 and its rank
_MOST_BYTES = 16 << 20  # of a model; three times the size of the largest one in use
_LONGEST_PIECE = 512  # characters; sentencepiece's trainer makes pieces of at most 16 unless it is told otherwise

# Texts that both tokenizers encode after the conversion. A difference means that the model has a feature that is not converted.
SAMPLES = (
    "Hello, world! The quick brown fox jumps over 13 lazy dogs.",
    "Human: \n写一首关于春天的诗，题目是《北京的春天》。\n\nAssistant: \n",
    "def f(x):\n    return x ** 2  # square\n\n\tprint(f(3))",
    "  two leading spaces, a   gap and a trailing space ",
    "naïve café — ½ ﬁ 🙂 한국어 عربى",
)


def convert(file: StoredPath, *, legacy: bool = True) -> tuple[str, list[str]]:
    """Return the text of a tokenizer.json that encodes as this model does, and notes.

    With `legacy`, as in sentencepiece and Transformers' LlamaTokenizer, a space is put before every text and after every
    special token; without, only before a first text that does not begin with a space.
    """
    with _readable(file):
        return _converted(file, _read(file), legacy)


def _converted(file: StoredPath, proto: Any, legacy: bool) -> tuple[str, list[str]]:
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    if proto.trainer_spec.model_type != BPE:
        raise CompileError(
            STAGE,
            f"tokenizer {file}",
            found="a sentencepiece model that is not BPE",
            expected="BPE, as in LLaMA releases",
            remedy="put a tokenizer.json beside it",
        )
    pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    spec = proto.normalizer_spec
    tokenizer = spm_tokenizer(
        pieces,
        unknown=proto.trainer_spec.unk_piece,
        byte_fallback=proto.trainer_spec.byte_fallback,
        prefix_space=spec.add_dummy_prefix,
        legacy=legacy,
        charsmap=spec.precompiled_charsmap,
        squeeze=spec.remove_extra_whitespaces,
    )
    text = with_ranks(tokenizer.to_str(), pieces)
    if legacy:
        _compare(file, text, reference)
    return text, []


def with_ranks(text: str, pieces: list[tuple[str, float, int]]) -> str:
    """The text of a tokenizer.json with the ranks of its pieces, if some share a score (see runtime/sentencepiece_rule.py)."""
    scores = [score for piece, score, kind in pieces if kind == NORMAL and len(piece) > 1]
    if len(set(scores)) == len(scores):
        return text
    ranks = {score: rank for rank, score in enumerate(sorted(set(scores), reverse=True))}
    stated = [ranks[score] if kind == NORMAL and len(piece) > 1 else None for piece, score, kind in pieces]
    return carry_ranks(text, stated)


def ranks_of(text: str) -> list[int | None] | None:
    """The ranks in the text of a tokenizer.json; None if it has none."""
    ranks: list[int | None] | None = (json.loads(text).get("model") or {}).get(RANKS_KEY) if RANKS_KEY in text else None
    return ranks


def carry_ranks(text: str, ranks: list[int | None] | None) -> str:
    """The text of a tokenizer.json with ranks, which the tokenizers library drops when it writes one."""
    if ranks is None:
        return text
    plain = json.loads(text)
    plain["model"][RANKS_KEY] = ranks
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":"))


def special_words(file: StoredPath) -> dict[str, str]:
    """The words of BOS and EOS in a sentencepiece model, in the keys of tokenizer_config.json; none that it has turned off."""
    with _readable(file):
        spec = _read(file).trainer_spec
    words = {"bos_token": (spec.bos_id, spec.bos_piece), "eos_token": (spec.eos_id, spec.eos_piece)}
    return {key: piece for key, (index, piece) in words.items() if index >= 0}


def _read(file: StoredPath) -> Any:
    """The ModelProto in a file; raises CompileError if there is none."""
    from sentencepiece import sentencepiece_model_pb2

    refuse_pointer(file)
    proto: Any = sentencepiece_model_pb2.ModelProto()
    content = read_bounded(STAGE, file, _MOST_BYTES)
    if _TIKTOKEN.match(content):
        raise CompileError(
            STAGE,
            f"tokenizer {file}",
            found="tokens of tiktoken, as in Llama 3",
            expected="a sentencepiece model",
            remedy="put the tokenizer.json of its Hugging Face release beside it",
        )
    proto.ParseFromString(content)
    return proto


def _readable(file: StoredPath) -> AbstractContextManager[None]:
    found = "a file that sentencepiece cannot read"
    return explained(STAGE, f"tokenizer {file}", found=found, expected="a sentencepiece model", remedy="download it again")


def spm_tokenizer(
    pieces: list[tuple[str, float, int]],
    *,
    unknown: str,
    byte_fallback: bool,
    prefix_space: bool,
    legacy: bool,
    charsmap: bytes = b"",
    squeeze: bool = False,
) -> Tokenizer:
    """Make a BPE tokenizer of pieces (text, score, type) in id order, whose merges follow the scores as in sentencepiece.

    `charsmap` is the precompiled normalization. With `squeeze`, each run of spaces becomes one.
    """
    vocab = {piece: index for index, (piece, _, _) in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=_merges(pieces, vocab), unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)
    )
    steps: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    if squeeze:
        steps += [normalizers.Strip(), normalizers.Replace(_regex(" {2,}"), " ")]
    if prefix_space and legacy:
        steps.append(normalizers.Prepend(SPACE))
    if legacy or not prefix_space:
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    else:
        tokenizer.normalizer = normalizers.Sequence(steps) if steps else None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    strip = [decoders.Strip(content=" ", left=1)] if prefix_space else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    tokenizer.add_tokens(
        [
            AddedToken(piece, normalized=False, special=kind != USER_DEFINED)
            for piece, _, kind in pieces
            if kind in {UNKNOWN, CONTROL, USER_DEFINED}
        ]
    )
    return tokenizer


def _merges(pieces: list[tuple[str, float, int]], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces that merge to another piece, those with the best score first; of equal scores, by the piece's id.
    Raises ValueError for a piece that is too long to look for its pairs."""
    mergeable = {piece for piece, _, kind in pieces if kind in {NORMAL, UNUSED}}
    merges = []
    for piece, score, kind in pieces:
        if kind != NORMAL:
            continue
        if len(piece) > _LONGEST_PIECE:
            raise ValueError(f"a piece of {len(piece)} characters")
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in mergeable and right in mergeable:
                merges.append((-score, vocab[piece], vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _compare(file: StoredPath, text: str, reference: Any) -> None:
    """Raise CompileError if a sample is encoded differently after the conversion."""
    tokenizer = load(text)
    for sample in SAMPLES:
        if tokenizer.encode(sample, add_special_tokens=False).ids != reference.encode(sample):
            raise CompileError(
                STAGE,
                f"tokenizer {file}",
                expected="a model that normalises as LLaMA's does",
                found=f"other ids than sentencepiece's for {sample!r} after conversion",
                remedy="put a tokenizer.json beside it",
            )


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)
