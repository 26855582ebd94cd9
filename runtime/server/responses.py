"""Responses of JSON."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response


def to_json(value: Any) -> bytes:
    """Return the JSON of a value without spaces."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def json_response(value: Any) -> Response:
    """Return a response with the JSON of a value."""
    return Response(to_json(value), media_type="application/json")
