"""Read requests from JSON Lines, in the shapes that logs and data sets use, or from plain text."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.requests.request import STAGE, Message, Request
from belle_compile.compiler.requests.source import Progress, Source

# Names of the fields that may hold a request, in order of preference, and of those that may hold its answer.
REQUEST_FIELDS = (
    "text", "prompt", "question", "instruction", "input", "messages", "conversations", "token_ids", "input_ids",
)  # fmt: skip
ANSWER_FIELDS = ("std_answer", "answer", "expected", "output")
NO_LABEL = "(none)"
# Names of roles in data sets -> the names in OpenAI's messages.
_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "chatgpt": "assistant", "model": "assistant", "bot": "assistant", "tool": "tool", "function": "tool",
}  # fmt: skip
_TEXT_PARTS = ("text", "input_text", "output_text")
_MOST_TOKEN = 1 << 31
_MOST_BLANK = 100_000  # lines in a row, of which a small compressed file may hold any number
_MOST_LISTS = 1 << 20  # lists and objects of a line, each of which costs 20 times its text
_NAMES_SHOWN = 12
_JQ_LIST = "'.[]'"


@dataclass(frozen=True)
class Fields:
    """Names of the fields of a JSON line; a name that is not given is looked up in `REQUEST_FIELDS` or `ANSWER_FIELDS`."""

    request: str | None = None
    answer: str | None = None
    labels: tuple[str, ...] = ()


_USUAL = Fields()


def read_requests(
    path: str | Path, field: str | None = None, answer: str | None = None, labels: Sequence[str] = ()
) -> Iterator[Request]:
    """Iterate over the requests of a file; see `RequestFile`."""
    return iter(RequestFile(path, Fields(field, answer, tuple(labels))))


class RequestFile:
    """The requests of a file, in order: JSON Lines, or text with one request per line; either may be compressed.

    A request is a text, a list of messages (`role` and `content`, or `from` and `value`) or a list of token ids. An answer at
    the end of a chat becomes the request's `answer`. A blank line and null are requests with an empty text. `.txt` is text;
    `.jsonl`, `.ndjson` and `.json` are JSON Lines; the format of other files follows from their first character. Raises
    CompileError with the number of a line that is not a request, and never quotes the line, because it may hold personal data.
    `sha256` and `bytes` describe the file once the last request has been read.
    """

    def __init__(self, path: str | Path, fields: Fields = _USUAL, on_progress: Progress = lambda done, total: None) -> None:
        self._source, self._fields = Source(path, on_progress), fields
        self._missing = {name for name in (fields.answer, *fields.labels) if name is not None}
        self._first_record: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return self._source.path.name

    @property
    def sha256(self) -> str:
        return self._source.sha256

    @property
    def bytes(self) -> int:
        return self._source.bytes

    def __iter__(self) -> Iterator[Request]:
        is_json: bool | None = {".txt": False, ".jsonl": True, ".ndjson": True, ".json": True}.get(self._source.suffix)
        count = blank = 0
        for number, line in self._source.lines():
            where = f"line {number} of {self._source.path}"
            text = _decoded(line, where)
            blank = 0 if text.strip() else blank + 1
            if blank > _MOST_BLANK:
                raise CompileError(STAGE, where, found=f"more than {_MOST_BLANK} blank lines", expected="a request a line")
            count += not blank
            if is_json is None and text.strip():
                is_json = text.lstrip()[0] in "{["
            if not text.strip():
                yield Request(text="", labels=dict.fromkeys(self._fields.labels, NO_LABEL), line=number)
            elif is_json:
                yield self._from_json(text, number, where)
            else:
                self._check_plain(where)
                yield Request(text=text, line=number)
        path = str(self._source.path)
        if not count:
            raise CompileError(STAGE, path, found="an empty file", expected="a request a line", remedy="check the path")
        if self._missing:
            names = ", ".join(sorted(self._missing))
            raise CompileError(
                STAGE,
                f"no request of {path} has the field {names}",
                found=_names(self._first_record),
                remedy="name one of them",
            )

    def _check_plain(self, where: str) -> None:
        named = next((name for name in (self._fields.request, self._fields.answer, *self._fields.labels) if name), None)
        if named is not None:
            raise CompileError(
                STAGE, where, found="plain text", expected=f"JSON with the field {named}", remedy="leave the field out"
            )

    def _from_json(self, text: str, number: int, where: str) -> Request:
        record = _record(text, where)
        self._first_record = self._first_record or record
        self._missing.difference_update(record)
        shape, chat_answer = _shape(record, self._fields, where)
        labels = {name: _label(record.get(name), name, where) for name in self._fields.labels}
        request = Request(**shape, answer=_answer(record, self._fields, where) or chat_answer, labels=labels, line=number)
        if "\\ud" in text or "\\uD" in text:
            _check_unicode(request, where)
        return request


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise CompileError(
            STAGE,
            where,
            found=f"byte 0x{line[error.start]:02x} at position {error.start + 1}",
            expected="UTF-8",
            remedy="convert the file, with iconv -f gb18030 -t utf-8 for example",
        ) from None


def _record(text: str, where: str) -> dict[str, Any]:
    try:
        if text.count("[") + text.count("{") > _MOST_LISTS:
            raise ValueError
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at position {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else "out of bounds"
        found = f"invalid JSON ({reason})"
    else:
        if isinstance(record, dict):
            return record
        found = "a list" if isinstance(record, list) else "a single value"
    remedy = f"write one object a line, with jq -c {_JQ_LIST if text.lstrip()[0] == '[' else '.'} for example"
    raise CompileError(STAGE, where, found=found, expected="a JSON object", remedy=remedy)


def _shape(record: Mapping[str, Any], fields: Fields, where: str) -> tuple[dict[str, Any], str]:
    """Return the text, messages or token ids of a record as arguments of Request, and the answer at the end of the chat."""
    if fields.request is not None:
        if fields.request in record and record[fields.request] is None:
            return {"text": ""}, ""
        if fields.request not in record:
            remedy = "name a field that all requests have"
            raise CompileError(STAGE, where, found=_names(record), expected=f"the field {fields.request}", remedy=remedy)
        return _value(record[fields.request], fields.request, where)
    name = next((name for name in REQUEST_FIELDS if record.get(name) is not None), None)
    if name is None and any(name in record for name in REQUEST_FIELDS):
        return {"text": ""}, ""  # a request that is null
    if name is None:
        expected = f"one of {', '.join(REQUEST_FIELDS)}"
        remedy = "name the field with the request (calibrate-set --field)"
        raise CompileError(STAGE, where, found=_names(record), expected=expected, remedy=remedy)
    shape, answer = _value(record[name], name, where)
    if name == "instruction" and "text" in shape and isinstance(record.get("input"), str):
        shape["text"] += record["input"]  # as BELLE's train/scripts/convert_to_conv_data.py joins them
    return shape, answer


def _value(value: Any, name: str, where: str) -> tuple[dict[str, Any], str]:
    if isinstance(value, str):
        return {"text": value}, ""
    if isinstance(value, list):
        if not value:
            return {"text": ""}, ""
        if all(type(item) is int for item in value):
            if any(not 0 <= item < _MOST_TOKEN for item in value):
                expected = "ids from 0 to 2147483647"
                raise CompileError(STAGE, f"{where}, field {name}", found="a number that is no token id", expected=expected)
            return {"token_ids": tuple(value)}, ""
        if all(isinstance(item, dict) for item in value):
            return _chat([_message(item, f"{where}, field {name}, message {i}") for i, item in enumerate(value, 1)])
    raise CompileError(
        STAGE,
        f"{where}, field {name}",
        found="a list of something else" if isinstance(value, list) else "another value",
        expected="a text, a list of messages or a list of token ids",
        remedy="name another field (calibrate-set --field)",
    )


def _chat(messages: list[Message]) -> tuple[dict[str, Any], str]:
    answer = ""
    if len(messages) > 1 and messages[-1]["role"] == "assistant":
        answer = messages.pop()["content"]
    return {"messages": tuple(messages)}, answer


def _message(message: Mapping[str, Any], where: str) -> Message:
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role.lower() not in _ROLES:
        found = "another role" if isinstance(role, str) else f"{_names(message)}"
        expected = f"a role (or from) among {', '.join(_ROLES)}"
        raise CompileError(STAGE, where, found=found, expected=expected)
    content = message.get("content", message.get("value"))
    if content is None:
        content = ""  # a call of a tool
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") in _TEXT_PARTS for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        expected = "a text or a list of text parts as content (or value)"
        raise CompileError(STAGE, where, found="other content", expected=expected, remedy="leave such requests out")
    return {"role": _ROLES[role.lower()], "content": content}


def _answer(record: Mapping[str, Any], fields: Fields, where: str) -> str:
    if fields.answer is not None:
        value = record.get(fields.answer)
        if value is not None and not isinstance(value, str):
            raise CompileError(STAGE, f"{where}, field {fields.answer}", found="no text", expected="the answer as a text")
        return value or ""
    return next((record[name] for name in ANSWER_FIELDS if isinstance(record.get(name), str)), "")


def _label(value: Any, name: str, where: str) -> str:
    """The value of a label with no-break and repeated spaces replaced by single spaces."""
    if value is None:
        return NO_LABEL
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFKC", value).split()) or NO_LABEL
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    raise CompileError(STAGE, f"{where}, field {name}", found="a list or an object", expected="one value as a label")


def _check_unicode(request: Request, where: str) -> None:
    """Raise CompileError for half of a surrogate pair (\\ud83d), which JSON can spell and UTF-8 cannot encode."""
    try:
        request.to_json().encode()
    except UnicodeEncodeError:
        remedy = "leave the line out, or write it again with the program that made it"
        raise CompileError(STAGE, where, found="half of a \\ud800 pair", expected="whole characters", remedy=remedy) from None


def _names(record: Mapping[str, Any]) -> str:
    names = [*record][:_NAMES_SHOWN]
    more = ", ..." if len(record) > len(names) else ""
    return f"the fields {', '.join(names)}{more}" if record else "no fields"
