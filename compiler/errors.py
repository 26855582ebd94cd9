"""The error every stage of a build ends in when the input does not fit."""

from __future__ import annotations

from belle_compile.runtime.errors import BelleError


class CompileError(BelleError):
    """A build cannot go on; see `BelleError` for the fields."""
