"""Errors that a user can act on: one sentence that says what was found, what was expected and what to do."""

from __future__ import annotations

from typing import Any

PROGRAM = "belle-run"  # what its errors begin with


class BelleError(Exception):
    """The user's input or host does not fit; the message is one sentence.

    `stage` is the part of the program that found this, `what` is what does not fit. `found`, `expected` and `remedy` are
    phrases without a full stop, which are left out of the sentence when empty. `node` names a graph node or a layer.
    """

    def __init__(self, stage: str, what: str, *, found: str = "", expected: str = "", remedy: str = "", node: str = "") -> None:
        self.stage, self.what, self.found, self.expected, self.remedy, self.node = stage, what, found, expected, remedy, node
        facts = [f"found {found}" if found else "", f"expected {expected}" if expected else ""]
        sentence = f"{stage}: {what}" + (f" (node {node})" if node else "")
        if any(facts):
            sentence += ": " + ", ".join(fact for fact in facts if fact)
        super().__init__(sentence + (f"; {remedy}" if remedy else "") + ".")

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle has the sentence and the fields: the constructors of subclasses take other arguments."""
        return _unpickled, (type(self), self.args), vars(self)

    def parts(self) -> dict[str, str]:
        """The arguments that make an equal error."""
        return {name: getattr(self, name) for name in ("stage", "what", "found", "expected", "remedy", "node")}

    def to_plain(self) -> dict[str, str]:
        """The parts of the sentence, those that are empty too, and the sentence as `message`."""
        return self.parts() | {"message": " ".join(str(self).split())}


def _unpickled(kind: type[BelleError], args: tuple[Any, ...]) -> BelleError:
    return kind.__new__(kind, *args)


class EngineError(BelleError):
    """An engine directory, its host or a request does not fit the runtime."""


def install(extra: str) -> str:
    """The command that installs an extra of this package from a checkout, with the versions that it is tested with."""
    return f"pip install -c constraints.txt '.[{extra}]'"
