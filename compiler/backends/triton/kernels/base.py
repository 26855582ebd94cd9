"""The base of GPU kernels: a description that names a Triton function, which reads its sizes from the description."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from belle_compile.compiler.backends.program import kernel
from belle_compile.compiler.backends.program.lowering import StepSizes

Grid = tuple[int, int, int]
# The constants that every function takes
SHAPE = "SHAPE"  # the description, whose fields and properties the function reads as constants
OVERLAP = "OVERLAP"  # whether the kernel starts before the previous one has ended, and waits for it
STEP = StepSizes(tokens=2048, rows=256, sequences=256)


@dataclass(frozen=True)
class Start:
    """The launch of a kernel: `grid` programs, the first axis multiplied by one for every `rows` rows of the step (0: not
    multiplied). A program has `warps` warps; loads of `stages` iterations of a loop are in flight."""

    grid: Grid
    rows: int
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Kernel(kernel.Kernel):
    """A kernel in Triton; quantized activations are int8.

    The function's parameters are the names of `pointers` with "_ptr" appended, in their order, and SHAPE and OVERLAP. It begins
    with `device.begin`, or with the two calls that this consists of.
    """

    byte = "int8"
    function: ClassVar[Any]  # the result of `triton.jit`

    def shape(self) -> Any:
        """The description that the function reads."""
        return self

    def constants(self) -> dict[str, Any]:
        """All constants except OVERLAP: SHAPE, and None for each pointer of the function that this kernel does not have."""
        own = {f"{name}_ptr" for name, _ in self.pointers()}
        absent = (name for name in self.function.arg_names if name.endswith("_ptr") and name not in own)
        return {SHAPE: self.shape(), **dict.fromkeys(absent)}

    @abstractmethod
    def start(self) -> Start:
        """The grid and the size of a program."""

    def alternatives(self) -> tuple[Kernel, ...]:
        """Kernels that compute the same result in another way. The serving host measures which is the fastest."""
        return ()

    def stack(self) -> int:
        """Bytes of local memory that the arithmetic needs; if the machine code uses more, registers spill."""
        return 0

    def tensor_cores(self) -> bool:
        """Whether the machine code must use tensor cores; a build refuses code that does not."""
        return False


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(value - 1, 0).bit_length()


def warps_for(elements: int, each: int = 8) -> int:
    """Warps of a program that holds `elements` elements, about `each` of them in a thread; 1 to 16 warps."""
    return min(max(power_of_two(elements) // (32 * each), 1), 16)
