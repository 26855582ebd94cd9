"""An entry of the result cache: what an answer is made from again, as bytes with a version and a checksum.

An entry holds token ids and no text, so that a hit is detokenized, streamed and counted by the code that does it for answers
that are computed.

Bytes: `belR`, the format's version as one byte, the SHA-256 of key, version and payload, and the payload: the reason of the
end as one byte, the number of tokens as little-endian uint32, the token ids as int32, and the log probabilities of answer and
prompt. Of these, 0 stands for none; 1 is followed by the number of tokens, how many likely tokens each has in a byte (255: the
token has no log probability), all token ids as int32, and all values as float32. The key is in the checksum, so that an entry
in another's place is noticed.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from belle_compile.runtime.serving.generation import FinishReason, Generation
from belle_compile.runtime.serving.logprobs import TokenLogprob
from belle_compile.runtime.serving.request import Request

ENTRY_VERSION = 1
# Where the fields of a `Result` come from on a hit. A new field belongs into one of these, and into entries if it is stored.
STORED = frozenset({"token_ids", "finish_reason", "logprobs", "prompt_logprobs"})
DERIVED = frozenset({"prompt_token_ids", "text", "timings", "drafted", "accepted", "cached", "cached_tokens"})

_MAGIC = b"belR" + bytes([ENTRY_VERSION])
_HEADER = len(_MAGIC) + hashlib.sha256().digest_size
_NONE = 255  # in place of a number of likely tokens: there is no log probability
_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)


class DamagedEntry(Exception):
    """Bytes that are no entry of this version for this key."""


@dataclass(frozen=True)
class Entry:
    """The tokens of a finished answer, why it ended, and the log probabilities that were asked for."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    @classmethod
    def of(cls, generation: Generation, finish_reason: FinishReason) -> Entry:
        """The entry of an answer that has ended."""
        return cls(tuple(generation.sequence.generated), finish_reason, generation.logprobs, generation.prompt_logprobs)

    def replay(self, generation: Generation) -> None:
        """Add the tokens to a generation that has none."""
        generation.replay_prompt(self.prompt_logprobs)
        for token, logprob in zip(self.token_ids, self.logprobs or (None,) * len(self.token_ids), strict=True):
            generation.replay(token, logprob)

    def encode(self, key: str) -> bytes:
        """Return the bytes that `decode` reads."""
        parts = [
            struct.pack("<BI", _REASONS.index(self.finish_reason), len(self.token_ids)),
            np.asarray(self.token_ids, "<i4").tobytes(),
            _encode_logprobs(self.logprobs),
            _encode_logprobs(self.prompt_logprobs),
        ]
        payload = b"".join(parts)
        return _MAGIC + _checksum(key, payload) + payload

    @classmethod
    def decode(cls, key: str, data: bytes) -> Entry:
        """Read an entry; raises `DamagedEntry` for bytes that `encode` did not write for this key."""
        payload = data[_HEADER:]
        if not data.startswith(_MAGIC) or data[len(_MAGIC) : _HEADER] != _checksum(key, payload):
            raise DamagedEntry(key)
        reason, count = struct.unpack_from("<BI", payload)
        start = struct.calcsize("<BI")
        tokens: list[int] = np.frombuffer(payload, "<i4", count, start).tolist()
        logprobs, start = _decode_logprobs(payload, start + 4 * count)
        prompt_logprobs, _ = _decode_logprobs(payload, start)
        answer = None if logprobs is None else tuple(scored for scored in logprobs if scored)
        return cls(tuple(tokens), _REASONS[reason], answer, prompt_logprobs)

    def fits(self, request: Request) -> bool:
        """Whether these tokens can be the whole answer to a request: they end where it must end, and not before."""
        count = len(self.token_ids)
        if not 0 < count <= request.max_new_tokens or set(self.token_ids[:-1]) & set(request.end_ids):
            return False
        if (self.logprobs is None, self.prompt_logprobs is None) != (request.logprobs is None, request.prompt_logprobs is None):
            return False
        at_end_id = self.token_ids[-1] in request.end_ids
        if self.finish_reason == "length":
            return not at_end_id and count == request.max_new_tokens
        return at_end_id or bool(request.stop)


def _checksum(key: str, payload: bytes) -> bytes:
    return hashlib.sha256(b"\0".join((_MAGIC, key.encode(), payload))).digest()


def _encode_logprobs(logprobs: Sequence[TokenLogprob | None] | None) -> bytes:
    if logprobs is None:
        return b"\0"
    sizes = bytes(_NONE if scored is None else len(scored.top) for scored in logprobs)
    pairs = [pair for scored in logprobs if scored for pair in ((scored.token_id, scored.logprob), *scored.top)]
    ids, values = np.array([pair[0] for pair in pairs], "<i4"), np.array([pair[1] for pair in pairs], "<f4")
    return b"\1" + struct.pack("<I", len(sizes)) + sizes + ids.tobytes() + values.tobytes()


def _decode_logprobs(payload: bytes, start: int) -> tuple[tuple[TokenLogprob | None, ...] | None, int]:
    """Read what `_encode_logprobs` wrote; returns it and the place behind it."""
    if not payload[start]:
        return None, start + 1
    (count,) = struct.unpack_from("<I", payload, start + 1)
    start += 1 + struct.calcsize("<I")
    sizes = payload[start : start + count]
    total = sum(1 + size for size in sizes if size != _NONE)
    ids = np.frombuffer(payload, "<i4", total, start + count).tolist()
    values = np.frombuffer(payload, "<f4", total, start + count + 4 * total).tolist()
    pairs = iter(zip(ids, values, strict=True))
    logprobs = tuple(
        None if size == _NONE else TokenLogprob(*next(pairs), tuple(itertools.islice(pairs, size))) for size in sizes
    )
    return logprobs, start + count + 8 * total
