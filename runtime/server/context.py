"""What the parts of the server tell each other about an HTTP request: middleware before the route, the route to middleware."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from starlette.types import Scope

from belle_compile.runtime.serving.arrivals import Arrivals

_KEY, _WRITER = "belle", "belle.writer"  # in ASGI's `state`
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
    _settle: Callable[[], None] | None = None

    def announce(self, arrivals: Arrivals) -> None:
        """Announce the request, which was read whole, to the engine until `settle`."""
        end = arrivals.end
        arrivals.begin()
        self._settle = end

    def settle(self) -> None:
        """Take the announcement back: the request was submitted or refused, or it takes longer. A second call does nothing.

        It takes effect after the event loop has read what has arrived meanwhile, so that those requests are announced first.
        """
        settle, self._settle = self._settle, None
        if settle:
            event_loop = asyncio.get_running_loop()
            try:
                event_loop.call_soon(event_loop.call_soon, settle)
            except BaseException:
                settle()
                raise


def context_of(scope: Scope) -> RequestContext:
    """Return the context of a request, which the first caller makes."""
    state = scope.setdefault("state", {})
    return cast(RequestContext, state.get(_KEY) or state.setdefault(_KEY, RequestContext()))


class BodyWriter(Protocol):
    """Writes a part of a response's body at once, past the layers between route and connection."""

    def __call__(self, data: bytes) -> bool:
        """Write data that is not empty; returns False, with nothing written, where it must be sent or dropped as usual: the
        client reads too slowly or is gone."""
        ...


def offer_writer(scope: Scope, writer: BodyWriter) -> None:
    """Let the route of a request write the body after it has sent the response's start, and before it sends the end."""
    scope["state"][_WRITER] = writer


def writer_of(scope: Scope) -> BodyWriter | None:
    """Return what the connection offers; None where a server offers nothing, such as that of a test."""
    return cast(BodyWriter | None, scope["state"].get(_WRITER))
