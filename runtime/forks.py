"""What belongs to the process that made it: threads, child processes and devices, of which a fork has only a picture."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

from belle_compile.runtime.errors import EngineError


class Owner:
    """The process that made an object."""

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def here(self) -> bool:
        """Whether this process is the owner, not a fork of it."""
        return os.getpid() == self._process

    def check(self) -> None:
        """Raise `EngineError` in a fork: the threads that would answer do not exist in it."""
        if not self.here:
            remedy = (
                "load it in this process, after the fork, as with gunicorn without --preload or with the start method spawn"
            )
            raise EngineError("engine", "the engine was loaded before this process was forked", remedy=remedy)


def finalize(subject: Any, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """Do what `weakref.finalize` does, but nothing in a fork: that `function` ends what belongs to this process."""
    return weakref.finalize(subject, _call_here, Owner(), function, *arguments)


def _call_here(owner: Owner, function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments) if owner.here else None
