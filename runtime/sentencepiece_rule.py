"""The order in which sentencepiece merges pieces of equal scores, which a tokenizer.json cannot express.

Sentencepiece merges the pair whose piece has the best score and, of equal ones, the leftmost in the text. The tokenizers
library knows one order for all pairs instead. Vocabularies that were extended with pieces of one score, as LLaMA's was with
Chinese ones, therefore get other ids from it. A tokenizer.json whose model has `RANKS_KEY` is encoded with sentencepiece's
rule: the rank of each id is the position of its score among all scores, best first, or null if nothing merges to it.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers.pre_tokenizers import PreTokenizer, Sequence

RANKS_KEY = "sentencepiece_ranks"


def load(text: str) -> tokenizers.Tokenizer:
    """Load the text of a tokenizer.json, with sentencepiece's rule if it has ranks; raises what the library raises."""
    plain = json.loads(text) if RANKS_KEY in text else {}
    ranks = plain.get("model", {}).get(RANKS_KEY)
    if ranks is None:
        return tokenizers.Tokenizer.from_str(text)
    del plain["model"][RANKS_KEY]
    plain["model"]["ignore_merges"] = True  # the pre-tokenizer below leaves whole pieces
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(plain))
    pieces = {piece: ranks[index] for piece, index in plain["model"]["vocab"].items() if ranks[index] is not None}
    rule = PreTokenizer.custom(_Segments(pieces, frozenset(plain["model"]["vocab"])))
    tokenizer.pre_tokenizer = rule if tokenizer.pre_tokenizer is None else Sequence([tokenizer.pre_tokenizer, rule])
    return tokenizer


def segments(text: str, ranks: Mapping[str, int]) -> list[str]:
    """Split a text as sentencepiece's BPE does: characters merge to the piece of the least rank, the leftmost of equal ones."""
    symbols = list(text)
    following = [*range(1, len(text)), -1]
    preceding = list(range(-1, len(text) - 1))
    agenda: list[tuple[int, int, str]] = []

    def consider(left: int, right: int) -> None:
        if left >= 0 and right >= 0 and (rank := ranks.get(piece := symbols[left] + symbols[right])) is not None:
            heapq.heappush(agenda, (rank, left, piece))

    for left in range(len(text) - 1):
        consider(left, left + 1)
    while agenda:
        _, left, piece = heapq.heappop(agenda)
        right = following[left] if symbols[left] else -1
        if right < 0 or symbols[left] + symbols[right] != piece:
            continue  # one of both has merged with another symbol since
        symbols[left], symbols[right] = piece, ""
        following[left] = following[right]
        if following[left] >= 0:
            preceding[following[left]] = left
        consider(preceding[left], left)
        consider(left, following[left])
    return [symbol for symbol in symbols if symbol]


class _Segments:
    """A pre-tokenizer for the tokenizers library that splits a text into pieces; characters without one stay together, so that
    the model fuses them as sentencepiece does."""

    def __init__(self, ranks: Mapping[str, int], vocabulary: frozenset[str]) -> None:
        self._ranks, self._vocabulary = ranks, vocabulary

    def pre_tokenize(self, text: Any) -> None:
        text.split(self._split)

    def _split(self, number: int, text: Any) -> list[Any]:
        parts, start, end, unknown = [], 0, 0, False
        for segment in segments(str(text), self._ranks):
            known = segment in self._vocabulary
            if end > start and not (unknown and not known):
                parts.append(text[start:end])
                start = end
            end, unknown = end + len(segment), not known
        return [*parts, text[start:end]] if end > start else parts
