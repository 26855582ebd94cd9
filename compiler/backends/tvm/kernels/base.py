"""What a kernel is: a frozen description of shapes that can write its TIR for one instruction set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import tvm

from compiler.backends.tvm.isa import Isa
from compiler.backends.tvm.tir import Buffer, prim_func

ROW_ALIGNMENT = 64  # activation rows start at multiples of 64 elements


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
class Kernel(ABC):
    """Kernels with equal fields are one function in the library; its name spells the fields out, but for those marked
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
        """(name, dtype) of every argument in order; all are pointers."""

    @abstractmethod
    def body(self, isa: Isa, *buffers: Buffer) -> None:
        """Emit the statements of the kernel."""

    def build(self, isa: Isa, name: str | None = None) -> tvm.tirx.PrimFunc:
        """The kernel's TIR for one instruction set, under its own name or another."""
        return prim_func(name or self.name, self.pointers(), lambda *buffers: self.body(isa, *buffers))


def describe(kernel: Kernel) -> dict[str, Any]:
    """The fields of a kernel for reports."""
    return {field.name: str(getattr(kernel, field.name)) for field in fields(kernel)}
