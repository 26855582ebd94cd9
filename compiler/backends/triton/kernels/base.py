"""What a GPU kernel is: a description that names a Triton function, its constants and how it is started."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from belle_compile.compiler.backends.program import kernel
from belle_compile.compiler.backends.program.kernel import View
from belle_compile.compiler.backends.program.lowering import StepSizes

Grid = tuple[int, int, int]
OVERLAP = "OVERLAP"  # a constant of every function: it starts before the kernel before has ended, and waits for it
STEP = StepSizes(tokens=2048, rows=256, sequences=256)


@dataclass(frozen=True)
class Start:
    """How a kernel is started: `grid` blocks, times one for every `rows` rows along the first axis (0: rows do not matter), of
    `warps` warps; loads of `stages` iterations are under way at once."""

    grid: Grid
    rows: int
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Kernel(kernel.Kernel):
    """A kernel in Triton. The function's pointers are called as in `pointers`, in their order; all else is constant. The first
    thing it does is `device.begin`."""

    byte = "int8"
    function: ClassVar[Any]  # what `triton.jit` made

    @abstractmethod
    def constants(self) -> Mapping[str, Any]:
        """Its constants; None for a pointer that this kernel does not have."""

    @abstractmethod
    def start(self) -> Start:
        """How it is started."""

    def alternatives(self) -> tuple[Kernel, ...]:
        """Kernels that compute the same in another way: a host measures which is the fastest."""
        return ()

    def stack(self) -> int:
        """Bytes of local memory that its arithmetic needs; what machine code takes beyond that are spilled registers."""
        return 0

    def tensor_cores(self) -> bool:
        """Whether it must use them: a build refuses machine code that does not."""
        return False


def of_view(name: str, view: View) -> dict[str, int]:
    """The constants of a view: NAME_STRIDE and NAME_OFFSET."""
    return {f"{name}_STRIDE": view.stride, f"{name}_OFFSET": view.offset}


def power_of_two(value: int) -> int:
    """The smallest not below `value`."""
    return 1 << max(value - 1, 0).bit_length()


def warps_for(elements: int, each: int = 8) -> int:
    """Of a program that holds so many elements: about `each` a thread, 1 to 16 warps."""
    return min(max(power_of_two(elements) // (32 * each), 1), 16)
