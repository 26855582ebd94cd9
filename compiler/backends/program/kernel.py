"""What every backend's kernels are: frozen descriptions of shapes, with names and pointers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

ROW_ALIGNMENT = 64  # activation rows start at multiples of 64 elements

_Self = TypeVar("_Self", bound="Kernel")


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple not below `value`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class View:
    """Where row i of an activation starts: element i * stride + offset of its buffer."""

    stride: int
    offset: int = 0

    @classmethod
    def of_width(cls, width: int) -> View:
        """A buffer of its own for rows of `width` elements."""
        return cls(round_up(width, ROW_ALIGNMENT))

    def row(self, row: Any) -> Any:
        """The index of the first element of a row."""
        return row * self.stride + self.offset

    def __str__(self) -> str:
        return f"{self.stride}" + (f"at{self.offset}" if self.offset else "")


@dataclass(frozen=True)
class Workspace:
    """Memory that a kernel needs beside its operands. What is not `zeroed` holds anything before and after; what is holds zeros
    before each call, and the kernel leaves it so."""

    bytes: int
    zeroed: bool


@dataclass(frozen=True)
class Kernel(ABC):
    """Kernels with equal fields are one function of the engine; its name spells the fields out, but for those marked
    `named: False`, which say how to compute and differ from one instruction set to another."""

    kind: ClassVar[str]

    @property
    def name(self) -> str:
        """A C identifier, unique per description."""
        parts = [self.kind]
        for field in fields(self):
            value = getattr(self, field.name)
            short = "".join(word[0] for word in field.name.split("_"))
            if value is None or value is False or not field.metadata.get("named", True):
                continue
            parts.append(short if value is True else f"{short}{value}")
        return "_".join(parts).replace(".", "p").replace("-", "m").replace("+", "")

    @abstractmethod
    def pointers(self) -> tuple[tuple[str, str], ...]:
        """(name, dtype) of every argument in order, workspaces last; all are pointers."""

    def workspaces(self) -> tuple[Workspace, ...]:
        """Those of the last pointers."""
        return ()

    def variants(self: _Self) -> Sequence[tuple[int | None, _Self]]:
        """(largest number of rows or None for any, kernel), ascending: what computes this best for so many rows. All have the
        same pointers."""
        return ((None, self),)
