"""Strict JSON for the bodies of requests: errors name the field, and nothing that a reader might take two ways is accepted."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from belle_compile.runtime.server.errors import ApiError, invalid, kind_of

# Escapes that may stand for NUL or for half of a character; and what makes numbers that JSON does not have.
_SUSPECT_ESCAPE = re.compile(r"\\u(0000|[dD][89a-fA-F])")
_SUSPECT_NUMBER = re.compile(r"NaN|Infinity|[0-9][eE]\+?[0-9]{3}|[0-9]{309}")
_MOST_DIGITS = 4300  # Python reads no longer integers
_MOST_KEYS = 16384  # of an object: each key that does not fit is an error, of which only the first is told


class _Repeated(Exception):
    """A key is twice in an object."""


class _TooManyKeys(Exception):
    """An object has more keys than any field takes."""


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body. Raises `ApiError` for everything else.

    Refused are, besides what is not JSON: text that is not UTF-8, NUL characters and lone surrogates in strings, repeated
    keys, NaN and infinities, and numbers as large as those.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise _not_json(f"it is not UTF-8 at byte {error.start}") from None
    if not text.strip():
        raise _not_json("it is empty")
    try:
        value = _load(text)
        if _SUSPECT_ESCAPE.search(text) or _SUSPECT_NUMBER.search(text):
            for path, item in _leaves(value, ()):
                _check_leaf(path, item)
    except json.JSONDecodeError as error:
        message = error.msg.removesuffix(" at")  # of control characters
        raise _not_json(f"{message[:1].lower()}{message[1:]} at line {error.lineno}, column {error.colno}") from None
    except _Repeated as error:
        raise invalid(f"'{error}' is given twice.", str(error), "invalid_json") from None
    except _TooManyKeys as error:
        raise _not_json(f"it has an object of {error} keys, expected at most {_MOST_KEYS}") from None
    except RecursionError:
        raise nested_too_deeply() from None
    if not isinstance(value, dict):
        raise _not_json(f"expected an object, found {kind_of(value)}")
    return value


def nested_too_deeply() -> ApiError:
    """The error of a body whose lists and objects are nested too deeply to be read."""
    return _not_json("its lists and objects are nested too deeply")


def _load(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError:
        raise
    except ValueError:  # an integer that Python does not read: read it as infinite, so that its field can be named
        return json.loads(text, object_pairs_hook=_object, parse_int=lambda digits: _integer(digits))


def _integer(digits: str) -> float:
    return math.inf if len(digits) > _MOST_DIGITS else int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MOST_KEYS:
        raise _TooManyKeys(len(pairs))
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        raise _Repeated(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return fields


def _leaves(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield keys, strings and numbers with the paths to them."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield path, key
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from _leaves(item, (*path, place))
    else:
        yield path, value


def _check_leaf(path: tuple[str | int, ...], value: Any) -> None:
    param = ".".join(str(part) for part in path) or None
    where = f"Invalid value for '{param}': it" if param else "The body is not a JSON object that the server can read: a key"
    if isinstance(value, str):
        if "\0" in value:
            raise invalid(f"{where} has a NUL character.", param)
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise invalid(f"{where} has half of a surrogate pair, which is no character.", param)
    elif isinstance(value, float) and not math.isfinite(value):
        raise invalid(f"{where} is not a finite number that the server can read.", param)


def _not_json(reason: str) -> ApiError:
    return invalid(f"The body is not a JSON object: {reason}.", None, "invalid_json")
