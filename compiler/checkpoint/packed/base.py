"""The interface of packings, and what they share: a packing makes one weight of the tensors that a module stores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from belle_compile.compiler.checkpoint.tensors import FLOAT_DTYPES, STAGE, LazyTensor
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.quantized import QuantizedTensor
from belle_compile.compiler.stored_path import StoredPath

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.intp]

FLOATS = tuple(sorted(FLOAT_DTYPES))
_CHUNK_BYTES = 16 << 20  # read at a time from a tensor of which some columns are wanted
_AGAIN = "download the checkpoint again"


@dataclass(frozen=True)
class Statement:
    """What a checkpoint says of its integers: the settings of `quantization_config`, and the file that has them.

    `settings` are empty for a release that says nothing."""

    settings: Mapping[str, Any]
    file: StoredPath


class Packing(ABC):
    """One way of storing the weights of linear layers as integers.

    `method` is the quant_method of config.json, and `title` its name in messages. A module is stored so if it has a tensor
    called one of `marks`; `parts` are the names of all tensors that its weight is made of. With `spare_biases`, files have
    biases also for modules that have none.
    """

    method: str
    title: str
    marks: tuple[str, ...]
    parts: tuple[str, ...]
    spare_biases: bool

    @abstractmethod
    def check(self, stated: Statement) -> list[str]:
        """Raise CompileError for settings that mean another layout; return notes on settings that builds do not follow."""

    @abstractmethod
    def weight(self, module: Module, stated: Statement) -> QuantizedTensor:
        """The weight of a module; raises CompileError for tensors that do not belong together.

        Only shapes are looked at, and the order of the inputs where a file has one."""


@dataclass(frozen=True)
class Module:
    """The tensors of a module's weight, by their names in the module."""

    name: str
    tensors: Mapping[str, LazyTensor]

    def optional(self, part: str, dimensions: int, *dtypes: str) -> LazyTensor | None:
        """One of the tensors; None where there is none. Raises CompileError for one of other dimensions or types."""
        tensor = self.tensors.get(part)
        if tensor is None:
            return None
        if tensor.dtype not in dtypes or len(tensor.shape) != dimensions or 0 in tensor.shape:
            expected = f"{' or '.join(sorted(dtypes))} with {dimensions} dimension{'s' if dimensions > 1 else ''}"
            raise self.error(f"{part} of {tensor.dtype} and shape {list(tensor.shape)}", expected, tensor)
        return tensor

    def tensor(self, part: str, dimensions: int, *dtypes: str) -> LazyTensor:
        """One of the tensors; raises CompileError also where there is none."""
        tensor = self.optional(part, dimensions, *dtypes)
        if tensor is None:
            raise self.error(f"no {part}", f"{part} beside {', '.join(self.tensors)}")
        return tensor

    def error(self, found: str, expected: str, tensor: LazyTensor | None = None, remedy: str = _AGAIN) -> CompileError:
        """The error for tensors that do not belong together."""
        file = (tensor or next(iter(self.tensors.values()))).file
        return CompileError(STAGE, f"integers of {self.name} in {file}", found=found, expected=expected, remedy=remedy)

    def require(self, part: LazyTensor, shape: tuple[int, ...]) -> None:
        """Raise CompileError unless a tensor has the shape that the others imply."""
        if part.shape != shape:
            name = part.name.rsplit(".", 1)[-1]
            raise self.error(f"{name} of shape {list(part.shape)}", f"{list(shape)}, as the other tensors imply", part)


def refused(stated: Statement, title: str, found: str, expected: str, remedy: str = "") -> CompileError:
    """The error for settings of a layout that is not read."""
    return CompileError(
        STAGE,
        f"{title} settings in {stated.file}",
        found=found,
        expected=expected,
        remedy=remedy or "give the checkpoint that it was made from",
    )


def groups_of_inputs(module: Module, part: str, inputs: int, groups: int, stated: object) -> tuple[int | None, Indices | None]:
    """The number of neighbouring inputs in each of `groups` groups, and None; or None, and the group of each input where the
    groups are not equally many neighbours. The tensor `part` says which group an input is in, if a module has one.

    `stated` is the group_size of the settings: -1 for one group, None where they say nothing. Raises CompileError where it
    contradicts the number of groups, where that alone does not tell the size, and for groups that do not exist.
    """
    if inputs < groups:
        raise module.error(f"{groups} groups of {inputs} inputs", "an input or more in each")
    size = _group_size(module, inputs, groups, stated)
    neighbours = np.arange(inputs) // size
    tensor, order = module.optional(part, 1, "int32", "int64"), neighbours
    if tensor is not None:
        module.require(tensor, (inputs,))
        order = tensor.stored(0, inputs).astype(np.intp)
        if order.min() < 0 or order.max() >= groups:
            raise module.error(f"{part} with groups {order.min()} to {order.max()}", f"groups 0 to {groups - 1}", tensor)
    return (size, None) if not inputs % size and np.array_equal(order, neighbours) else (None, order)


def _group_size(module: Module, inputs: int, groups: int, stated: object) -> int:
    """The number of neighbouring inputs in a group; the last may have fewer."""
    if stated is None:
        if inputs % groups:
            raise module.error(f"{groups} groups of {inputs} inputs, and no group_size", "groups of equal size")
        return inputs // groups
    size = inputs if stated == -1 else stated
    if type(size) is not int or size < 1 or -(-inputs // size) != groups:
        raise module.error(f"{groups} groups of {inputs} inputs", f"group_size {stated}, which the settings state")
    return min(size, inputs)


def columns(tensor: LazyTensor, start: int, stop: int) -> Array:
    """Columns start..stop of a stored matrix as rows, C-contiguous [stop - start, rows]; parts of the file are read in turn."""
    count, width = tensor.shape
    step = max(1, _CHUNK_BYTES // (4 * width))
    parts = [tensor.stored(first, min(first + step, count))[:, start:stop].T for first in range(0, count, step)]
    return np.ascontiguousarray(parts[0]) if len(parts) == 1 else np.concatenate(parts, axis=1)
