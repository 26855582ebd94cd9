"""A tensor of a checkpoint that stays on disk until it is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.places import CHECKPOINT_STAGE
from belle_compile.compiler.stored_path import StoredPath
from belle_compile.compiler.untrusted import explained

if TYPE_CHECKING:
    from belle_compile.compiler.ir.quantized import QuantizedTensor

STAGE = CHECKPOINT_STAGE
# Bytes of a value of each type that files store
ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
FLOAT_DTYPES = frozenset({"float64", "float32", "float16", "bfloat16"})

# Tensors that old LLaMA conversions store although they are computed from config.json
DERIVED_BUFFERS = ("rotary_emb.inv_freq",)
# Causal masks, which old releases store as buffers of their attention layers
MASKS = re.compile(r"(^|\.)(attention|attn|self_attention)\.(masked_)?bias$")
_AS_OPENED, _AGAIN = "the file the build began with", "start the build again"

FloatArray = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Load = Callable[[int, int], npt.NDArray[Any]]


@dataclass(frozen=True)
class LazyTensor:
    """Name, shape and stored dtype of one tensor; `read` and `rows` fetch float32 values and keep none.

    `load(start, stop)` returns rows start..stop of axis 0 (the whole tensor if it is a scalar) in any float dtype, or integers
    as they are stored. `steps` describe the origin of the values: the latest change first, the file and the name stored in it
    last (by default `file` and `name`). `quantized` is set if the file holds integers with scales in place of floats; `load`
    then dequantizes them. `spare` says that files have this tensor, filled with zeros, also for models without such a
    parameter.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: StoredPath
    load: Load = field(repr=False, compare=False)
    steps: tuple[str, ...] = ()
    quantized: QuantizedTensor | None = field(default=None, repr=False, compare=False)
    spare: bool = False

    def __post_init__(self) -> None:
        if not self.steps:
            object.__setattr__(self, "steps", (f"{self.file.name}: {self.name}",))

    def read(self) -> FloatArray:
        """The whole tensor as C-contiguous float32."""
        return self._float32(0, self.shape[0] if self.shape else 1, self.shape)

    def rows(self, start: int, stop: int) -> FloatArray:
        """Rows start..stop of axis 0 as float32 [stop - start, ...]; only these are read from the file."""
        if not self.shape or not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows {start}..{stop} of {self.name} with shape {list(self.shape)}")
        return self._float32(start, stop, (stop - start, *self.shape[1:]))

    def stored(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows start..stop of axis 0 as `load` returns them."""
        with self._reading():
            return self.load(start, stop)

    def describe(self) -> str:
        """The origin of the values, such as "adapter <- model-00001-of-00002.safetensors: lm_head.weight"."""
        return " <- ".join(self.steps)

    def changed(self, step: str, load: Load) -> LazyTensor:
        """The tensor with other float values of the same shape, whose dtype stays where it is one of floats; `step` names what
        changed them."""
        dtype = self.dtype if self.dtype in FLOAT_DTYPES else "float32"
        return replace(self, load=load, dtype=dtype, steps=(step, *self.steps), quantized=None)

    def _float32(self, start: int, stop: int, shape: tuple[int, ...]) -> FloatArray:
        with self._reading():
            values: FloatArray = np.ascontiguousarray(self.load(start, stop), dtype=np.float32).reshape(shape)
            return values

    def _reading(self) -> AbstractContextManager[None]:
        found = "a file that changed or cannot be read"
        return explained(STAGE, f"weights {self.file}", found=found, expected=_AS_OPENED, remedy=_AGAIN)


def changed(file: StoredPath, found: str) -> CompileError:
    """The error for a file that changed after the checkpoint was opened."""
    return CompileError(
        STAGE,
        f"weights {file}",
        found=found,
        expected=_AS_OPENED,
        remedy=_AGAIN,
    )


def read_bytes(file: StoredPath, start: int, count: int) -> Bytes:
    """Bytes start..start + count of a file, which stay with the caller alone; raises CompileError if the file has fewer."""
    data = np.empty(count, np.uint8)
    with file.open("rb") as opened:
        opened.seek(start)
        done, view = 0, memoryview(data.data)
        while done < count and (part := opened.readinto(view[done:])):  # type: ignore[attr-defined]  # IO[bytes] lacks it
            done += part
    if done < count:
        raise changed(file, "a file that became shorter")
    return data


def values_of(data: Bytes, dtype: str) -> npt.NDArray[Any]:
    """The values that little-endian bytes stand for: integers and numbers of 32 or 64 bits as they are, smaller ones as
    float32."""
    if dtype not in ITEM_BYTES:
        raise ValueError(f"values of type {dtype}")
    if dtype not in ("float16", "bfloat16") and not dtype.startswith("float8"):
        return data.view(dtype)
    if not data.size:
        return np.empty(0, np.float32)
    import torch

    values: FloatArray = torch.from_numpy(data).view(getattr(torch, dtype)).to(torch.float32).numpy()
    return values


@dataclass(frozen=True)
class StoredValues:
    """Reads rows of a tensor whose values lie in a file; `LazyTensor.load` of the formats that store plain numbers.

    Value (i, j, ...) of a tensor of `shape` is number i * strides[0] + j * strides[1] + ... of those that begin at byte
    `start`. The file is opened for each read only. `stamp` is what `stamp_of` returned for it when its header was read.
    """

    file: StoredPath
    stamp: tuple[int, int]
    start: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __call__(self, start: int, stop: int) -> npt.NDArray[Any]:
        if stamp_of(self.file) != self.stamp:
            raise changed(self.file, "a file that was written meanwhile")
        shape, first = self.shape, 0
        if shape:
            shape, first = (stop - start, *shape[1:]), start * self.strides[0]
        count = 0 if 0 in shape else 1 + sum((size - 1) * step for size, step in zip(shape, self.strides, strict=True))
        item_bytes = ITEM_BYTES[self.dtype]
        values = values_of(read_bytes(self.file, self.start + first * item_bytes, count * item_bytes), self.dtype)
        strides = [step * values.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(values, shape, strides)


def stamp_of(file: StoredPath) -> tuple[int, int]:
    """The size of a file and the time of its last change, by which `StoredValues` notices that another one took its place."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor whose values lie one after the other, in values."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def is_buffer(tensor: LazyTensor) -> bool:
    """Whether a tensor holds integers and is no weight by its name, such as position ids or a causal mask."""
    if tensor.dtype in FLOAT_DTYPES:
        return False
    return MASKS.search(tensor.name) is not None or not tensor.name.endswith((".weight", ".bias", ".scales"))


def require_float(tensor: LazyTensor) -> None:
    """Raise CompileError unless the tensor holds floats, or integers whose scales are known."""
    if tensor.dtype in FLOAT_DTYPES or tensor.quantized is not None:
        return
    raise CompileError(
        STAGE,
        f"tensor {tensor.name} in {tensor.file}",
        found=f"dtype {tensor.dtype}",
        expected="float32, float16 or bfloat16",
        remedy="convert the checkpoint to one of these",
    )
