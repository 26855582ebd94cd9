"""What the parts of the server tell each other about an HTTP request: middleware before the route, the route to middleware."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, cast

from starlette.types import Scope

_KEY = "belle"  # in ASGI's `state`
_random = random.Random()


def new_request_id() -> str:
    """A random name of a request: no secret, so it needs no call of the system, after which threads wait for each other."""
    return f"{_random.getrandbits(128):032x}"


@dataclass
class RequestContext:
    """One HTTP request.

    `client` is the name of its API key, and `priority` that key's priority, which is added to the request's own. The route
    counts in `tokens` those of prompt and answers, and sets `model` once it is known. It adds to `details` what is logged and
    traced, and to `texts` what is only logged with --log-prompts.
    """

    request_id: str = field(default_factory=new_request_id)
    client: str = ""
    priority: int = 0
    tokens: int = 0
    model: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, Any] = field(default_factory=dict)


def context_of(scope: Scope) -> RequestContext:
    """Return the context of a request, which the first caller makes."""
    state = scope.setdefault("state", {})
    return cast(RequestContext, state.get(_KEY) or state.setdefault(_KEY, RequestContext()))
