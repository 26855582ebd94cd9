"""The server's log: one line an event, as JSON or as text, with the id of the request that it is about."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TextIO

from belle_compile.runtime.server.access import ANONYMOUS, ApiKey
from belle_compile.runtime.server.context import RequestContext
from belle_compile.runtime.server.options import ServerOptions

_PLAIN = re.compile(r"[\w./:@%+-]+", re.ASCII)  # what a value in text needs no quotes for
_FIELDS = "fields"  # the attribute of log records that has what `log` was given


@dataclass
class Exchange:
    """A request over HTTP and its response: what is logged, counted and traced of it."""

    context: RequestContext
    method: str
    path: str
    address: str = ""
    key: ApiKey = ANONYMOUS
    started: float = field(default_factory=time.perf_counter)
    route: str = "none"  # the path of the route, with names in place of what varies
    status: int = 0
    first_byte_s: float | None = None
    complete: bool = False  # whether the response was sent to its end

    @property
    def seconds(self) -> float:
        """The time since the request's headers arrived."""
        return time.perf_counter() - self.started

    def fields(self, *, prompts: bool) -> dict[str, Any]:
        """What is logged at its end. `prompts` are for those who asked for them."""
        values = {
            "method": self.method,
            "path": self.path,
            "route": self.route,
            "status": self.status,
            "complete": self.complete,
            "duration_s": round(self.seconds, 6),
            "first_byte_s": None if self.first_byte_s is None else round(self.first_byte_s, 6),
            "client": self.address,
            "key": self.key.name or None,
            "model": self.context.model,
            "tokens": self.context.tokens or None,
            **self.context.details,
            **(self.context.texts if prompts else {}),
        }
        return {name: value for name, value in values.items() if value is not None}


# The exchange that the running task belongs to.
current: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


def log(logger: logging.Logger, level: int, message: str, /, **fields: Any) -> None:
    """Log a message, which has no variable part, with values that have names."""
    logger.log(level, message, extra={_FIELDS: fields})


class _Formatter(logging.Formatter):
    """Collects what a line says."""

    def values(self, record: logging.LogRecord) -> dict[str, Any]:
        """The line's values: time, level, logger, message, then the request's id and the event's own."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        values: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        exchange = current.get()
        if exchange is not None:
            values["request_id"] = exchange.context.request_id
        fields: Mapping[str, Any] = getattr(record, _FIELDS, {})
        values |= {name: value for name, value in fields.items() if name not in values}
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return values


class JsonFormatter(_Formatter):
    """One JSON object a line, in ASCII: whatever a client sent, it cannot begin a line or be taken for a field."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(self.values(record), default=str, separators=(",", ":"))


class TextFormatter(_Formatter):
    """`TIME LEVEL message name=value …`. Values with anything but letters, digits and simple signs are quoted as in JSON."""

    def format(self, record: logging.LogRecord) -> str:
        values = self.values(record)
        head = f"{values.pop('time')} {values.pop('level').upper():7} {_printable(values.pop('message'))}"
        del values["logger"]
        exception = values.pop("exception", "")
        line = " ".join([head, *(f"{name}={_quoted(value)}" for name, value in values.items())])
        return "\n    ".join([line, *map(_printable, exception.splitlines())])


def _quoted(value: Any) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(value, default=str)


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def configure(options: ServerOptions, stream: TextIO | None = None) -> None:
    """Let all loggers write to `stream`, by default stderr, in the form that the options say."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if options.log_format == "json" else TextFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(options.log_level.upper())
    # Uvicorn reports its start and end as information, which the server's own messages say in its stead.
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, root.level))
