"""The log's lines."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from belle_compile.runtime.server.access import ApiKey
from belle_compile.runtime.server.context import RequestContext
from belle_compile.runtime.server.logs import Exchange, configure, current, log
from belle_compile.runtime.server.options import ServerOptions

LOGGER = logging.getLogger("belle_compile.test")
EVIL = 'a\nb\r\u2028"c\x1b[2J\udcff 你好'


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    root, uvicorn = logging.getLogger(), logging.getLogger("uvicorn.error")
    handlers, levels = list(root.handlers), (root.level, uvicorn.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    uvicorn.setLevel(levels[1])


def written(form: Literal["json", "text"], message: str, *, logger: logging.Logger = LOGGER, **fields: Any) -> str:
    stream = io.StringIO()
    configure(ServerOptions(log_format=form), stream)
    log(logger, logging.INFO, message, **fields)
    return stream.getvalue()


def test_a_line_of_json() -> None:
    token = current.set(Exchange(RequestContext("id-1"), "GET", "/health"))
    try:
        line = json.loads(written("json", "request", status=200, key="ann"))
    finally:
        current.reset(token)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info", "logger": "belle_compile.test", "message": "request", "request_id": "id-1", "status": 200,
        "key": "ann",
    }  # fmt: skip


def test_a_line_of_text() -> None:
    line = written("text", "request", status=200, path="/v1/models", key="ann's key")
    assert line.rstrip("\n").partition("Z ")[2] == 'INFO    request status=200 path=/v1/models key="ann\'s key"'


@pytest.mark.parametrize("form", ["json", "text"])
def test_nothing_that_a_client_sends_begins_a_line(form: Literal["json", "text"]) -> None:
    text = written(form, EVIL, path=EVIL)
    assert text.endswith("\n") and len(text.splitlines()) == 1 and "\x1b" not in text
    text.encode()
    if form == "json":
        assert json.loads(text)["message"] == json.loads(text)["path"] == EVIL


def test_fields_do_not_replace_what_all_lines_have() -> None:
    line = json.loads(written("json", "request", level="critical", time="never"))
    assert line["level"] == "info" and line["time"] != "never"


@pytest.mark.parametrize("form", ["json", "text"])
def test_exceptions_are_shown(form: Literal["json", "text"]) -> None:
    stream = io.StringIO()
    configure(ServerOptions(log_format=form), stream)
    try:
        raise ValueError("bad\n2026-01-01T00:00:00.000Z INFO    forged")
    except ValueError:
        LOGGER.exception("it failed")
    assert "ValueError: bad" in stream.getvalue()
    assert not any(line.startswith("2026-01-01") for line in stream.getvalue().splitlines())


def test_uvicorn_logs_in_the_same_form() -> None:
    stream = io.StringIO()
    configure(ServerOptions(), stream)
    logging.getLogger("uvicorn.error").info("Started server process [%d]", 1)
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    assert json.loads(stream.getvalue())["message"] == "Invalid HTTP request received."


def test_the_level_applies() -> None:
    stream = io.StringIO()
    configure(ServerOptions(log_level="error"), stream)
    log(LOGGER, logging.WARNING, "unseen")
    assert stream.getvalue() == ""


def test_prompts_are_logged_on_request_only() -> None:
    context = RequestContext("id", tokens=7, details={"finish_reasons": ["stop"]}, texts={"prompt": "my diary"})
    exchange = Exchange(context, "POST", "/v1/completions", "::1", ApiKey.of("ann", "secret"))
    without = exchange.fields(prompts=False)
    assert "diary" not in json.dumps(without) and "secret" not in json.dumps(without)
    assert without["key"] == "ann" and without["tokens"] == 7 and without["finish_reasons"] == ["stop"]
    assert exchange.fields(prompts=True)["prompt"] == "my diary"
