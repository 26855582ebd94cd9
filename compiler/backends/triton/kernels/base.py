"""What a GPU kernel is: a description that names a Triton function, which reads the sizes it needs from the description."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from belle_compile.compiler.backends.program import kernel
from belle_compile.compiler.backends.program.lowering import StepSizes

Grid = tuple[int, int, int]
# Constants of every function.
SHAPE = "SHAPE"  # a description: fields and properties are read like any constant
OVERLAP = "OVERLAP"  # whether it starts before the kernel before has ended, and waits for it
STEP = StepSizes(tokens=2048, rows=256, sequences=256)


@dataclass(frozen=True)
class Start:
    """How a kernel is started: with `grid` programs, times one for every `rows` rows of the step along the first axis (0: the
    number of rows does not matter). A program has `warps` warps; loads of `stages` iterations of a loop are in flight."""

    grid: Grid
    rows: int
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Kernel(kernel.Kernel):
    """A kernel in Triton; bytes of activations are int8.

    The function's pointers are called as in `pointers`, with "_ptr" behind, in their order; beside them it takes SHAPE and
    OVERLAP. The first thing it does is `device.begin`.
    """

    byte = "int8"
    function: ClassVar[Any]  # what `triton.jit` made

    def shape(self) -> Any:
        """The description that the function reads."""
        return self

    def constants(self) -> dict[str, Any]:
        """All constants but OVERLAP: the shape, and None for each pointer of the function that this kernel does not have."""
        own = {f"{name}_ptr" for name, _ in self.pointers()}
        absent = (name for name in self.function.arg_names if name.endswith("_ptr") and name not in own)
        return {SHAPE: self.shape(), **dict.fromkeys(absent)}

    @abstractmethod
    def start(self) -> Start:
        """The grid and the size of a program."""

    def alternatives(self) -> tuple[Kernel, ...]:
        """Kernels that compute the same result in another way. The host that serves measures which is fastest."""
        return ()

    def stack(self) -> int:
        """Bytes of local memory that the arithmetic needs. More than that in machine code means spilled registers."""
        return 0

    def tensor_cores(self) -> bool:
        """Whether the machine code must use tensor cores; a build refuses it otherwise."""
        return False


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(value - 1, 0).bit_length()


def warps_for(elements: int, each: int = 8) -> int:
    """Warps of a program that holds so many elements: about `each` elements a thread, 1 to 16 warps."""
    return min(max(power_of_two(elements) // (32 * each), 1), 16)
