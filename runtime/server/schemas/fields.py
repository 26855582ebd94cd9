"""Types of fields: they take what JSON has, and refuse what the server does not do by the field's name."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, WithJsonSchema
from pydantic_core import PydanticCustomError

from belle_compile.runtime.server.errors import kind_of


class Body(BaseModel):
    """A JSON object whose fields have exactly their types, and no other fields."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def _whole(value: Any) -> Any:
    return int(value) if type(value) is float and value.is_integer() else value


# JSON has one type of numbers: 1.0 is a whole number.
Whole = Annotated[int, BeforeValidator(_whole)]


def only(*values: Any, because: str = "") -> Any:
    """The type of a field that the server knows and does not support: only values that ask for nothing pass."""

    def check(value: Any) -> Any:
        if any(type(value) is type(accepted) and value == accepted for accepted in values):
            return value
        accepted = " or ".join(json.dumps(accepted) for accepted in values)
        raise unsupported(because or f"expected {accepted}")

    return Annotated[Any, BeforeValidator(check), WithJsonSchema({"enum": list(values)})]


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


def text_or_texts(most: int, longest: int) -> Any:
    """The type of a string or a list of at most `most` strings of at most `longest` characters, read as a tuple or None."""
    text = {"type": "string", "minLength": 1, "maxLength": longest}
    schema = {"anyOf": [text, {"type": "array", "items": text, "maxItems": most}, {"type": "null"}]}
    return Annotated[Any, BeforeValidator(_text_or_texts), WithJsonSchema(schema)]
