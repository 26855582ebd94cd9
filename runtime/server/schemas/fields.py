"""Types of fields: they take what JSON has, and refuse what the server does not do by the field's name."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, WithJsonSchema
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from belle_compile.runtime.server.errors import kind_of


class Body(BaseModel):
    """A JSON object whose fields have exactly their types, and no other fields."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Whole:
    """Annotates a whole number of a range. JSON has one type of numbers: 1.0 is a whole number."""

    def __init__(self, least: int | None = None, most: int | None = None) -> None:
        self._least, self._most = least, most

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        number = core_schema.int_schema(ge=self._least, le=self._most, strict=True)
        return core_schema.no_info_before_validator_function(_whole, number)


def _whole(value: Any) -> Any:
    return int(value) if type(value) is float and value.is_integer() else value


class Only:
    """Annotates a field that the server knows and does not support: only values that ask for nothing pass."""

    def __init__(self, *values: Any, because: str = "") -> None:
        """`because` is the reason that an error gives in place of the `values`."""
        self._values = values
        self._reason = because or "expected " + " or ".join(json.dumps(value) for value in values)

    def _check(self, value: Any) -> Any:
        if any(type(value) is type(accepted) and value == accepted for accepted in self._values):
            return value
        raise unsupported(self._reason)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self._values)}


def conflict(message: str, param: str) -> PydanticCustomError:
    """The error of fields that do not go together, reported for `param`."""
    return PydanticCustomError("conflict", "{message}", {"message": message, "param": param})  # noqa: RUF027


def bad_value(expected: str) -> PydanticCustomError:
    """The error of a value of the right type that its field cannot have."""
    return PydanticCustomError("bad_value", "{message}", {"message": f"expected {expected}"})


def unsupported(reason: str, param: str = "") -> PydanticCustomError:
    """The error of a value that asks for what the server does not do; `param` names the field, if it is not this one."""
    return PydanticCustomError("unsupported_parameter", "{reason}", {"reason": reason, "param": param})  # noqa: RUF027


def wrong_type(expected: str) -> PydanticCustomError:
    """The error of a value that has none of the types that its field may have."""
    return PydanticCustomError("wrong_type", "{message}", {"message": f"expected {expected}"})


def _object_or_text(value: Any) -> Any:
    if value is not None and not isinstance(value, (dict, str)):
        raise wrong_type("a JSON schema, as an object or as its text")
    return value


# A JSON schema, or its text.
SchemaOrText = Annotated[
    Any,
    BeforeValidator(_object_or_text),
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}, {"type": "null"}]}),
]


def _text_or_texts(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise wrong_type("a string or a list of strings")
    for text in texts:
        if not isinstance(text, str):
            raise wrong_type(f"strings only, there is {kind_of(text)}")
    return tuple(texts)


def text_or_texts_schema(most: int, longest: int) -> dict[str, Any]:
    """The JSON schema of `TextOrTexts` with at most `most` strings of at most `longest` characters."""
    text = {"type": "string", "minLength": 1, "maxLength": longest}
    return {"anyOf": [text, {"type": "array", "items": text, "maxItems": most}, {"type": "null"}]}


# A string or a list of strings, read as a tuple or None.
TextOrTexts = Annotated[Any, BeforeValidator(_text_or_texts)]
