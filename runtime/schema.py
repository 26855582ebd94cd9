"""Strict JSON for dataclasses: typed reading with errors that name the field, canonical writing, and JSON Schema."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from belle_compile.runtime.errors import EngineError

T = TypeVar("T")
SCALARS: dict[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}
_PHRASES = {
    "object": "an object",
    "array": "a list",
    "string": "a string",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
}

# Metadata of a field that is left out where it has its default, so that it may be added without another format: what was
# written before it was there is read, and written again, as it was.
OPTIONAL: Mapping[str, Any] = {"optional": True}

# Makes the caller's error for one field: (field, found, expected).
Refuse = Callable[[str, str, str], EngineError]


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, two-space indent, characters unescaped, a newline at the end."""
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def parse_json(text: str | bytes) -> Any:
    """Decode JSON in UTF-8; raises ValueError for text that is none, for numbers that are not finite, and for what is nested
    too deeply to be decoded."""
    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("lists or objects nested too deeply") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name}, which is no number of JSON")


def refuse_from(stage: str, remedy: str) -> Refuse:
    """The `Refuse` whose errors start with `stage` and end with `remedy`."""

    def refuse(field: str, found: str, expected: str) -> EngineError:
        return EngineError(stage, f"field {field} does not fit", found=found, expected=expected, remedy=remedy)

    return refuse


def to_plain(value: Any) -> Any:
    """Turn dataclasses, tuples and mappings into the dicts and lists of JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: to_plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if not (_is_optional(field) and getattr(value, field.name) == field.default)
        }
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def from_plain(cls: type[T], value: Any, refuse: Refuse, where: str = "") -> T:
    """Make a dataclass `cls` from decoded JSON. Every field but `OPTIONAL` ones must be present, and each of its type; no other
    field may be.

    At the first field that does not fit, raises what `refuse(field, found, expected)` returns. `where` prefixes the fields.
    """
    if not isinstance(value, dict):
        raise refuse(where or "(whole file)", _kind(value), "an object")
    hints = _hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    names = [field.name for field in fields]
    prefix = f"{where}." if where else ""
    for name in (field.name for field in fields if not _is_optional(field)):
        if name not in value:
            raise refuse(prefix + name, "nothing", _describe(hints[name]))
    for name in value:
        if name not in hints:
            raise refuse(prefix + name, "an unknown field", "one of " + ", ".join(names))
    return cls(**{name: _read(hints[name], value[name], refuse, prefix + name) for name in names if name in value})


def json_schema(cls: type, title: str = "") -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a dataclass, for documentation and other tools."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title or cls.__name__}
    return schema | _schema(cls)


def _is_optional(field: dataclasses.Field[Any]) -> bool:
    return bool(field.metadata.get("optional"))


def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _read(hint: Any, value: Any, refuse: Refuse, where: str) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        (only,) = [option for option in options if option is not type(None)]
        return _read(only, value, refuse, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise refuse(where, _kind(value), _describe(hint))
        return tuple(_read(typing.get_args(hint)[0], item, refuse, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise refuse(where, _kind(value), _describe(hint))
        return {key: _read(typing.get_args(hint)[1], item, refuse, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast("type[Any]", hint), value, refuse, where)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:  # bool is an int in Python and must not pass for one
        raise refuse(where, _kind(value), _describe(hint))
    return value


def _schema(hint: Any) -> dict[str, Any]:
    origin = typing.get_origin(hint)
    if hint is Any:
        return {}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [{"type": "null"} if option is type(None) else _schema(option) for option in typing.get_args(hint)]}
    if origin is tuple:
        return {"type": "array", "items": _schema(typing.get_args(hint)[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(typing.get_args(hint)[1])}
    if dataclasses.is_dataclass(hint):
        hints = _hints(typing.cast("type[Any]", hint))
        properties = {field.name: _schema(hints[field.name]) for field in dataclasses.fields(hint)}
        required = [field.name for field in dataclasses.fields(hint) if not _is_optional(field)]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": SCALARS[hint]}


def _describe(hint: Any) -> str:
    """A phrase for a type, such as "an integer"."""
    schema = _schema(hint)
    if "anyOf" in schema:
        return " or ".join("null" if option.get("type") == "null" else "a value" for option in reversed(schema["anyOf"]))
    return _PHRASES.get(schema.get("type", ""), "a value")


def _kind(value: Any) -> str:
    """A phrase for a value: its type, or its text where it is short."""
    if value is None:
        return "null"
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    return json.dumps(value, ensure_ascii=False)[:60]
