"""The interface of the kernels of all program backends: a frozen description with a name, pointers and workspaces."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

ROW_ALIGNMENT = 64  # activation rows start at multiples of 64 elements

Pointer = tuple[str, str]  # name and dtype of an argument
Pointers = tuple[Pointer, ...]

_Self = TypeVar("_Self", bound="Kernel")


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def optional(present: object, name: str, dtype: str = "float32") -> Pointers:
    """A pointer that a kernel has only if `present` is true."""
    return ((name, dtype),) if present else ()


@dataclass(frozen=True)
class View:
    """The placement of an activation in its buffer: row i starts at element i * stride + offset."""

    stride: int
    offset: int = 0

    @classmethod
    def of_width(cls, width: int) -> View:
        """The view of rows of `width` elements that fill a buffer."""
        return cls(round_up(width, ROW_ALIGNMENT))

    def row(self, row: Any) -> Any:
        """The index of the first element of a row."""
        return row * self.stride + self.offset

    def __str__(self) -> str:
        return f"{self.stride}" + (f"at{self.offset}" if self.offset else "")


@dataclass(frozen=True)
class Workspace:
    """Memory that a kernel needs beside its operands. If `zeroed`, it holds zeros before each call and the kernel leaves zeros
    behind; otherwise its content is arbitrary before and after."""

    bytes: int
    zeroed: bool


@dataclass(frozen=True)
class Kernel(ABC):
    """The description of one function of an engine. Kernels with equal fields are the same function.

    The name spells out the fields, except those marked `named: False`: these choose how the kernel computes, not what, and
    may differ from one instruction set to another.
    """

    kind: ClassVar[str]
    initials: ClassVar[Mapping[str, str]] = {}  # by field: its mark in the name, where that is not its words' first letters
    byte: ClassVar[str]  # dtype in which the backend stores 8-bit activations

    @property
    def name(self) -> str:
        """A C identifier, unique per description."""
        parts = [self.kind]
        for field in fields(self):
            value = getattr(self, field.name)
            short = self.initials.get(field.name) or "".join(word[0] for word in field.name.split("_"))
            if value is None or value is False or not field.metadata.get("named", True):
                continue
            parts.append(short if value is True else f"{short}{value}")
        return "_".join(parts).replace(".", "p").replace("-", "m").replace("+", "")

    @abstractmethod
    def pointers(self) -> Pointers:
        """Every argument in order, workspaces last; all are pointers."""

    def workspaces(self) -> tuple[Workspace, ...]:
        """The workspaces that the last pointers point to."""
        return ()

    def variants(self: _Self) -> Sequence[tuple[int | None, _Self]]:
        """Pairs (largest number of rows or None for any, kernel), ascending: the kernel that is fastest up to that number of
        rows. All have the same pointers."""
        return ((None, self),)
