"""What an answer must follow, as text: part of a request and of its key."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal, get_args

from belle_compile.runtime.errors import EngineError

Kind = Literal["json_object", "json_schema", "regex", "lark"]

MAX_SOURCE_BYTES = 65536


@dataclass(frozen=True)
class Grammar:
    """What the text of an answer must match as a whole.

    `kind` is "json_object" (any JSON object; `source` is empty), "json_schema" (`source` is a JSON Schema; properties come in
    its order, so the text is kept as it is), "regex" (the syntax of Rust's `regex` crate, without look-around) or "lark"
    (llguidance's dialect of Lark, which begins with the rule `start`).

    The syntax is checked by `Engine.resolve`, which also limits the time and the memory that it takes to compile the source.
    """

    kind: Kind
    source: str = ""

    def __post_init__(self) -> None:
        """Raise `EngineError` for an unknown kind, and for a source that is too long, not text, or no JSON where it must be."""
        if self.kind not in get_args(Kind):
            raise invalid(found=f"kind {self.kind!r}"[:80], expected=" or ".join(get_args(Kind)))
        if not isinstance(self.source, str):
            raise invalid(found=f"a source of type {type(self.source).__name__}", expected="text")
        try:
            size = len(self.source.encode())
        except UnicodeEncodeError:
            raise invalid(found="half of a surrogate pair in the source", expected="Unicode text") from None
        if size > MAX_SOURCE_BYTES:
            raise invalid(found=f"a source of {size} bytes", expected=f"at most {MAX_SOURCE_BYTES}")
        if self.kind == "json_object" and self.source:
            raise invalid(found="a source for any JSON object", expected="none", remedy="use the kind json_schema")
        if self.kind == "json_schema":
            _check_schema(self.source)


class GrammarFailure(EngineError):
    """An answer cannot go on as its grammar demands: a fault of the grammar, which shows only while it is followed."""

    def __init__(self, reason: str) -> None:
        super().__init__("sampling", "the answer cannot be held to its grammar", found=reason)


def invalid(*, found: str, expected: str = "", remedy: str = "") -> EngineError:
    """The error of a grammar that a request cannot have."""
    return EngineError("sampling", "grammar", found=found, expected=expected, remedy=remedy)


def _check_schema(source: str) -> None:
    try:
        schema = json.loads(source)
    except RecursionError:
        raise invalid(found="a JSON schema that nests too deeply") from None
    except ValueError as error:
        raise invalid(found=f"a JSON schema that is not JSON ({error})"[:200]) from None
    if not isinstance(schema, dict):
        raise invalid(found=f"a JSON schema of type {type(schema).__name__}", expected="an object")
