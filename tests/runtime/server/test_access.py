"""API keys: their file, who is let in, limits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.server.access import Access, ApiKey, RateLimited, read_key_file

KEYS = """
[[keys]]
name = "ann"
key = "sk-ann"
priority = -1
max_concurrent = 2

[[keys]]
name = "bob"
sha256 = "{digest}"
requests_per_minute = 60
"""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def write(path: Path, text: str) -> Path:
    path.write_text(text.format(digest=hashlib.sha256(b"sk-bob").hexdigest()), encoding="utf-8")
    return path


def test_keys_are_read_from_toml_and_json(tmp_path: Path) -> None:
    from_toml = read_key_file(write(tmp_path / "keys.toml", KEYS))
    assert [(key.name, key.priority, key.max_concurrent, key.requests_per_minute) for key in from_toml] == [
        ("ann", -1, 2, None),
        ("bob", 0, None, 60),
    ]
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [{"name": "ann", "key": "sk-ann"}]}), encoding="utf-8")
    assert read_key_file(tmp_path / "keys.json") == [ApiKey.of("ann", "sk-ann")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keys = 3", 'expected a list "keys"'),
        ("[[keys]]\nname = 'a'", 'found name, expected "name", and either "key" or "sha256"'),
        ("[[keys]]\nname = 'a'\nkey = 'k'\nsha256 = 'k'", 'either "key" or "sha256"'),
        ("[[keys]]\nname = 'a'\nkey = 'k'\nrpm = 3", "keys.toml: unknown field 'rpm': expected one of name, key"),
        ("[[keys]]\nname = 'a'\nkey = 'k'\nmax_concurrent = 0", "max_concurrent: found 0, expected a whole number, 1 or more"),
        ("[[keys]]\nname = 'a'\nkey = 'k'\npriority = true", "priority: found True, expected a whole number"),
        ("[[keys]]\nname = ''\nkey = 'k'", "name: found 0 characters, expected 1 to 256 characters"),
        ("[[keys]]\nname = 'a'\nsha256 = 'abc'", "sha256: found 3 characters, expected 64 hexadecimal digits"),
        ("[[keys]", "cannot read"),
    ],
)
def test_files_that_do_not_fit_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(EngineError) as refusal:
        read_key_file(path)
    assert message in str(refusal.value)


def test_json_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(EngineError, match="found list, expected a table"):
        read_key_file(tmp_path / "keys.json")


def test_a_key_of_a_wrong_type_is_not_printed(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text('{"keys": [{"name": "a", "key": 123, "sha256": "00"}]}', encoding="utf-8")
    with pytest.raises(EngineError, match="key: found int, expected 1 to 256 characters"):
        read_key_file(path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"name": "a", "key": "1"}, {"name": "a", "key": "2"}], "the name of 'a': found another key with the same"),
        ([{"name": "a", "key": "1"}, {"name": "b", "key": "1"}], "the key of 'b': found another key with the same"),
        ([{"name": "a", "key": "given"}], "the key of 'a': found another key with the same"),
    ],
)
def test_names_and_keys_are_unique(entries: list[dict[str, str]], message: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": entries}), encoding="utf-8")
    with pytest.raises(EngineError, match=message):
        Access(["given"], path)


def test_who_is_let_in(tmp_path: Path) -> None:
    access = Access(["one", "twö"], write(tmp_path / "keys.toml", KEYS))
    assert not access.open
    names = {"one": "api-key-1", "twö": "api-key-2", "sk-ann": "ann", "sk-bob": "bob"}
    for text, name in names.items():
        key = access.identify(f"Bearer {text}")
        assert key is not None and key.name == name
    assert access.identify("bearer  one ") is not None, "schemes have no case"
    for header in (None, "", "one", "Bearer", "Bearer on", "Bearer one!", "Basic one", "Bearer sk-ann\udcff"):
        assert access.identify(header) is None


def test_access_without_keys_is_open() -> None:
    assert Access().open and Access().identify("Bearer x") is None


def test_a_file_without_keys_lets_nobody_in(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text('{"keys": []}', encoding="utf-8")
    assert not Access([], path).open


def test_reload_replaces_the_keys_or_keeps_them(tmp_path: Path) -> None:
    path = write(tmp_path / "keys.toml", KEYS)
    access = Access(["one"], path)
    path.write_text('[[keys]]\nname = "cyd"\nkey = "sk-cyd"\n', encoding="utf-8")
    assert access.reload() == 2
    assert access.identify("Bearer sk-cyd") and access.identify("Bearer one") and not access.identify("Bearer sk-ann")
    path.write_text("keys = [", encoding="utf-8")
    with pytest.raises(EngineError):
        access.reload()
    assert access.identify("Bearer sk-cyd")


def test_requests_at_the_same_time() -> None:
    access, key = Access(), ApiKey("ann", b"", max_concurrent=2)
    access.enter(key)
    access.enter(key)
    with pytest.raises(RateLimited, match="the key 'ann' is over its limit max_concurrent: expected 2 at most"):
        access.enter(key)
    access.enter(ApiKey("bob", b"", max_concurrent=1))
    access.leave(key, 0)
    access.enter(key)


def test_requests_a_minute() -> None:
    clock = Clock()
    access, key = Access(clock=clock), ApiKey("ann", b"", requests_per_minute=6)
    for _ in range(6):
        access.enter(key)
        access.leave(key, 0)
    with pytest.raises(RateLimited, match="requests_per_minute: expected 6 at most") as refusal:
        access.enter(key)
    assert refusal.value.retry_after_s == pytest.approx(10)
    clock.now += 10
    access.enter(key)
    with pytest.raises(RateLimited):
        access.enter(key)
    clock.now += 3600
    for _ in range(6):
        access.enter(key)
    with pytest.raises(RateLimited):
        access.enter(key)


def test_tokens_a_minute_may_be_overdrawn_by_one_answer() -> None:
    clock = Clock()
    access, key = Access(clock=clock), ApiKey("ann", b"", tokens_per_minute=60, requests_per_minute=5)
    access.enter(key)
    access.leave(key, 90)
    with pytest.raises(RateLimited, match="tokens_per_minute: expected 60 at most") as refusal:
        access.enter(key)
    assert refusal.value.retry_after_s == pytest.approx(31)
    clock.now += 31
    access.enter(key)
    clock.now -= 31 - 24  # the refused request took none of the five
    access.leave(key, 0)


def test_a_changed_limit_applies_at_once() -> None:
    access = Access(clock=Clock())
    access.enter(ApiKey("ann", b"", requests_per_minute=1))
    with pytest.raises(RateLimited):
        access.enter(ApiKey("ann", b"", requests_per_minute=1))
    access.enter(ApiKey("ann", b"", requests_per_minute=2))
