"""API keys: who may call the server, and how much."""

from __future__ import annotations

import hashlib
import hmac
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.scheduling import LARGEST_PRIORITY, LONGEST_CLIENT
from belle_compile.runtime.toml import read_table

STAGE = "API keys"
_SCHEME = "bearer"


@dataclass(frozen=True)
class ApiKey:
    """A key's name, the SHA-256 of its text, the priority of its requests (lower is earlier) and its limits (None: none)."""

    name: str
    digest: bytes = field(repr=False)
    priority: int = 0
    max_concurrent: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    @classmethod
    def of(cls, name: str, text: str) -> ApiKey:
        """The key with this text."""
        return cls(name, _digest(text))


# What a request without a key is counted under, where the server needs none.
ANONYMOUS = ApiKey("", b"")
ADMIN_NAME = "admin"
_LIMITS = ("max_concurrent", "requests_per_minute", "tokens_per_minute")
_TEXTS = ("name", "key", "sha256")
_FIELDS = {
    **dict.fromkeys(_TEXTS, f"1 to {LONGEST_CLIENT} characters"),
    "priority": "a whole number",
    **dict.fromkeys(_LIMITS, "a whole number, 1 or more"),
}


class RateLimited(EngineError):
    """A key is over one of its limits; `retry_after_s` is when it no longer will be, as far as that is known."""

    def __init__(self, key: str, limit: str, most: int, retry_after_s: float) -> None:
        super().__init__("request", f"the key {key!r} is over its limit {limit}", expected=f"{most} at most")
        self.retry_after_s = retry_after_s


@dataclass
class _Allowance:
    """What a key may still use: `capacity` a minute, refilled steadily. It may be overdrawn, by answers of unknown length."""

    capacity: int
    left: float
    filled_at: float

    def wait_s(self, needed: float, now: float) -> float:
        """Seconds until `needed` are left; 0 where they are now."""
        self.left = min(self.capacity, self.left + (now - self.filled_at) * self.capacity / 60)
        self.filled_at = now
        return max(0.0, needed - self.left) * 60 / self.capacity


@dataclass
class _Use:
    """How much a key is used."""

    running: int = 0
    allowances: dict[str, _Allowance] = field(default_factory=dict)

    def allowance(self, limit: str, capacity: int, now: float) -> _Allowance:
        """The allowance under a limit, a new one where the limit has changed."""
        known = self.allowances.get(limit)
        if known is None or known.capacity != capacity:
            known = self.allowances[limit] = _Allowance(capacity, capacity, now)
        return known


class Access:
    """The keys of the server. All methods may be called on any thread."""

    def __init__(
        self,
        texts: Sequence[str] = (),
        file: Path | None = None,
        admin: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`texts` are keys without a file, named api-key-1 and so on. `admin` is the key of administrators, which is none of
        these. Raises `EngineError` for a file that does not fit."""
        self._given = [ApiKey.of(f"api-key-{number}", text) for number, text in enumerate(texts, 1)]
        self.admin = None if admin is None else ApiKey.of(ADMIN_NAME, admin)
        self._file, self._clock = file, clock
        self._lock = threading.Lock()
        self._uses: dict[str, _Use] = {}
        self._keys = self._read()

    @property
    def open(self) -> bool:
        """Whether requests need no key. A key file without keys lets nobody in."""
        return not self._given and self._file is None

    def reload(self) -> int:
        """Read the file again; returns the number of keys. After an error the keys stay as they were."""
        self._keys = self._read()
        return len(self._keys)

    def identify(self, authorization: str | None) -> ApiKey | None:
        """The key in a header `Authorization: Bearer KEY`; None for none or an unknown one.

        The time that this takes does not depend on the keys: digests are compared, in constant time, and with all of them.
        """
        digest, found = _digest_of_bearer(authorization), None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def is_admin(self, authorization: str | None) -> bool:
        """Whether a header has the key of administrators."""
        return self.admin is not None and hmac.compare_digest(self.admin.digest, _digest_of_bearer(authorization))

    def enter(self, key: ApiKey) -> None:
        """Count a request that begins, which must `leave`; raises `RateLimited`, and counts nothing, over a limit."""
        with self._lock:
            use, now = self._uses.setdefault(key.name, _Use()), self._clock()
            if key.max_concurrent is not None and use.running >= key.max_concurrent:
                raise RateLimited(key.name, "max_concurrent", key.max_concurrent, 1.0)
            for limit in ("requests_per_minute", "tokens_per_minute"):
                capacity = getattr(key, limit)
                if capacity is not None and (wait_s := use.allowance(limit, capacity, now).wait_s(1, now)):
                    raise RateLimited(key.name, limit, capacity, wait_s)
            if key.requests_per_minute is not None:
                use.allowance("requests_per_minute", key.requests_per_minute, now).left -= 1
            use.running += 1

    def leave(self, key: ApiKey, tokens: int) -> None:
        """Count the end of a request and the tokens of its prompt and answer."""
        with self._lock:
            use = self._uses[key.name]
            use.running -= 1
            if key.tokens_per_minute is not None:
                use.allowance("tokens_per_minute", key.tokens_per_minute, self._clock()).left -= tokens

    def _read(self) -> list[ApiKey]:
        keys = self._given + (read_key_file(self._file) if self._file else [])
        named = keys + ([self.admin] if self.admin else [])
        for what, values in (("name", [key.name for key in named]), ("key", [key.digest for key in named])):
            if len(set(values)) < len(values):
                twice = next(key.name for index, key in enumerate(named) if values[index] in values[:index])
                raise EngineError(STAGE, f"the {what} of {twice!r}", found="another key with the same", expected="one")
        return keys


def read_key_file(path: Path) -> list[ApiKey]:
    """Return the keys of a file of TOML (`[[keys]]` tables) or JSON (`{"keys": [...]}`), which one its name's end says."""
    table = read_table(path, STAGE)
    if set(table) != {"keys"} or not isinstance(table["keys"], list):
        raise EngineError(STAGE, f"the content of {path}", found=", ".join(table) or "nothing", expected='a list "keys" alone')
    return [_parse(entry, f"key {number} of {path}") for number, entry in enumerate(table["keys"], 1)]


def _parse(entry: Any, where: str) -> ApiKey:
    if not isinstance(entry, Mapping):
        raise EngineError(STAGE, where, found=type(entry).__name__, expected="a table with name and key")
    for name, value in entry.items():
        _check_field(name, value, where)
    if "name" not in entry or ("key" in entry) == ("sha256" in entry):
        found = ", ".join(entry) or "nothing"
        raise EngineError(STAGE, where, found=found, expected='"name", and either "key" or "sha256"')
    digest = _digest(entry["key"]) if "key" in entry else _parse_digest(entry["sha256"], where)
    limits = {name: entry.get(name) for name in _LIMITS}
    return ApiKey(entry["name"], digest, entry.get("priority", 0), **limits)


def _check_field(name: str, value: Any, where: str) -> None:
    if name not in _FIELDS:
        raise EngineError(STAGE, f"{where}: unknown field {name!r}", expected=f"one of {', '.join(_FIELDS)}")
    expected = _FIELDS[name]
    if name in _TEXTS:
        fits = isinstance(value, str) and 0 < len(value) <= LONGEST_CLIENT
    else:
        least = -LARGEST_PRIORITY if name == "priority" else 1
        fits = type(value) is int and least <= value <= LARGEST_PRIORITY
    if not fits:
        found = type(value).__name__ if name in _TEXTS else repr(value)  # texts may be keys, which are not printed
        found = f"{len(value)} characters" if isinstance(value, str) else found
        raise EngineError(STAGE, f"{where}: {name}", found=found, expected=expected)


def _parse_digest(text: str, where: str) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise EngineError(STAGE, f"{where}: sha256", found=f"{len(text)} characters", expected="64 hexadecimal digits")
    return digest


def _digest_of_bearer(authorization: str | None) -> bytes:
    """The digest of the key in a header `Authorization: Bearer KEY`; that of no key for another header."""
    scheme, _, text = (authorization or "").strip().partition(" ")
    return _digest(text.strip()) if scheme.lower() == _SCHEME else b""


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
