"""Find exact duplicates of earlier requests by digest, and near duplicates by MinHash and LSH."""

from __future__ import annotations

import hashlib
import unicodedata
from array import array
from collections.abc import Sequence

import rensa

from belle_compile.compiler.requests.request import Request

EXACT, NEAR = "exact duplicate", "near duplicate"

SHINGLE = 4  # characters or token ids of a shingle
# 20 bands of 12 rows compare 76% of the pairs with a similarity of 0.8, 95% at 0.85 and 99.9% at 0.9, but only 4% at 0.6, a
# similarity that requests made from one template often have. The standard deviation of the estimate is 0.02 at 0.9.
_PERMUTATIONS, _BANDS, _SEED = 240, 20, 1
_SHORTEST_SHARED = 32  # characters of a beginning that is left out of comparisons, at least
_FEWEST_SHARING = 64  # different texts that are needed to find such a beginning, at least


class Duplicates:
    """Compares requests, in order, with all earlier requests that were kept.

    Two requests are exact duplicates if their texts are equal up to width, case and white space (`normalized`), whatever
    their labels and answers. They are near duplicates if MinHash estimates the Jaccard similarity of their character 4-grams
    at `similarity` or more; 1 turns this off. Near duplicates are compared without system messages, and without a beginning of
    at least 32 characters that most requests of the first batch share: a common preamble does not make prompts duplicates.
    """

    def __init__(self, similarity: float) -> None:
        self._seen: set[bytes] = set()
        self._near = rensa.RMinHashDeduplicator(similarity, _PERMUTATIONS, True, _BANDS, _SEED) if similarity < 1 else None
        self._count = 0
        self.shared_beginning: str | None = None

    def judge(self, requests: Sequence[Request]) -> list[str | None]:
        """Judge each request of the next batch: EXACT, NEAR, or None for one to keep."""
        if self.shared_beginning is None and requests:
            self.shared_beginning = shared_beginning({_compared(request) for request in requests if request.token_ids is None})
        verdicts: list[str | None] = []
        unseen: list[tuple[int, tuple[str, Sequence[str] | Sequence[bytes]]]] = []
        for place, request in enumerate(requests):
            digest = content_digest(request)
            verdicts.append(EXACT if digest in self._seen else None)
            if digest not in self._seen:
                self._seen.add(digest)
                unseen.append((place, (str(self._count), self._shingles(request))))
                self._count += 1
        if self._near is not None and unseen:
            kept = self._near.add_pairs([pair for _, pair in unseen])
            for (place, _), is_new in zip(unseen, kept, strict=True):
                verdicts[place] = None if is_new else NEAR
        return verdicts

    def _shingles(self, request: Request) -> Sequence[str] | Sequence[bytes]:
        if request.token_ids is not None:
            ids, width = array("I", request.token_ids).tobytes(), 4 * SHINGLE
            return [ids[start : start + width] for start in range(0, max(len(ids) - width, 0) + 1, 4)]
        return shingles(_compared(request).removeprefix(self.shared_beginning or ""))


def content_digest(request: Request) -> bytes:
    """The digest of a request's content, 16 bytes, which is equal for exact duplicates."""
    if request.token_ids is not None:
        return hashlib.blake2b(array("I", request.token_ids).tobytes(), digest_size=16, person=b"token ids").digest()
    return hashlib.blake2b(normalized(request.written()).encode(), digest_size=16).digest()


def normalized(text: str) -> str:
    """The text without differences in width, case and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def shingles(text: str) -> list[str]:
    """All 4-grams of characters; a shorter text is one shingle."""
    return [text[start : start + SHINGLE] for start in range(max(len(text) - SHINGLE, 0) + 1)]


def shared_beginning(texts: set[str]) -> str:
    """The longest prefix that more than half of the texts share; empty if it has fewer than 32 characters or there are fewer
    than 64 texts."""
    ordered = sorted(texts)
    if len(ordered) < _FEWEST_SHARING:
        return ""
    # In sorted order, texts with a common prefix are neighbours; a prefix of more than half of them is one of the median's.
    median = ordered[len(ordered) // 2]
    shortest, longest = 0, len(median)
    while shortest < longest:
        length = (shortest + longest + 1) // 2
        if 2 * sum(text.startswith(median[:length]) for text in ordered) > len(ordered):
            shortest = length
        else:
            longest = length - 1
    return median[:shortest] if shortest >= _SHORTEST_SHARED else ""


def _compared(request: Request) -> str:
    """The normalized text that near duplicates are compared by."""
    if request.messages is None:
        return normalized(request.text or "")
    contents = [message["content"] for message in request.messages if message["role"] != "system"]
    return normalized("\n".join(contents) if contents else request.written())
