"""The body of POST /admin/engine."""

from __future__ import annotations

from pydantic import Field

from belle_compile.runtime.server.schemas.fields import Body


class ReplaceEngineBody(Body):
    """An engine directory of the server's disk. Without one, the directory that the running engine came from."""

    path: str | None = Field(default=None, min_length=1, max_length=4096)
