"""The class of the routes that answer prompts."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request as HttpRequest
from starlette.responses import Response


class DirectRoute(APIRoute):
    """A route whose endpoint takes the HTTP request alone and returns the response: FastAPI documents it, and has nothing to
    find out, to validate or to convert when it is called."""

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        handler: Callable[[HttpRequest], Coroutine[Any, Any, Response]] = self.endpoint
        return handler
