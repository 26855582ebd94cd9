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
    """How a kernel is started: `grid` blocks, times one for every `rows` rows along the first axis (0: rows do not matter), of
    `warps` warps; loads of `stages` iterations are under way at once."""

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


def power_of_two(value: int) -> int:
    """The smallest not below `value`."""
    return 1 << max(value - 1, 0).bit_length()


def warps_for(elements: int, each: int = 8) -> int:
    """Of a program that holds so many elements: about `each` a thread, 1 to 16 warps."""
    return min(max(power_of_two(elements) // (32 * each), 1), 16)
