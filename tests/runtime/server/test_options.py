"""The records of options: ranges, and what is kept out of sight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.server.options import EngineOptions, ServerOptions, all_options, option_name


@pytest.mark.parametrize(
    ("record", "changes", "message"),
    [
        (ServerOptions, {"port": 65536}, "server options: port: found 65536, expected 0 to 65535."),
        (ServerOptions, {"drain_timeout_s": -1.0}, "server options: drain-timeout: found -1.0, expected 0 or more."),
        (ServerOptions, {"request_timeout_s": 0.0}, "request-timeout: found 0.0, expected more than 0."),
        (ServerOptions, {"header_timeout_s": float("nan")}, "header-timeout: found nan, expected more than 0."),
        (ServerOptions, {"keep_alive_timeout_s": float("inf")}, "keep-alive-timeout: found inf"),
        (ServerOptions, {"root_path": "belle/"}, "root-path: found 'belle/'"),
        (ServerOptions, {"ssl_keyfile": Path("key.pem")}, "give ssl-certfile"),
        (ServerOptions, {"api_keys": ("",)}, "api-key: found an empty text"),
        (EngineOptions, {"audit_cache": 1.5}, "audit-cache: found 1.5, expected 0 to 1."),
        (EngineOptions, {"max_num_seqs": 0}, "max-num-seqs: found 0, expected 1 or more."),
    ],
)
def test_values_out_of_range_are_refused_by_name(record: type[Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError) as refusal:
        record(**changes)
    assert message in str(refusal.value)


def test_names_are_unique_and_of_the_command_line() -> None:
    names = [option_name(option) for option in all_options()]
    assert len(names) == len(set(names))
    assert {"host", "api-key", "served-model-name", "drain-timeout", "kv-cache-memory", "result-cache-ttl"} <= set(names)


def test_keys_are_not_shown() -> None:
    assert "secret" not in repr(ServerOptions(api_keys=("secret",)))


def test_adapters_are_named_once() -> None:
    options = EngineOptions(lora=("law=/models/law", "chat=a=b"))
    assert options.arguments()["lora"] == {"law": Path("/models/law"), "chat": Path("a=b")}
    for texts in (("/models/law",), ("=x",), ("a=",), ("a=x", "a=y")):
        with pytest.raises(EngineError, match=r"option lora: found .*expected NAME=DIR, each name once"):
            EngineOptions(lora=texts)
