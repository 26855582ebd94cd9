"""A tensor of a checkpoint that stays on disk until it is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.places import CHECKPOINT_STAGE
from belle_compile.compiler.untrusted import explained

if TYPE_CHECKING:
    from belle_compile.compiler.ir.quantized import QuantizedTensor

STAGE = CHECKPOINT_STAGE
FLOAT_DTYPES = frozenset({"float64", "float32", "float16", "bfloat16"})

# Tensors that old LLaMA conversions store although they are computed from config.json
DERIVED_BUFFERS = ("rotary_emb.inv_freq",)
# Causal masks, which old releases store as buffers of their attention layers
MASKS = re.compile(r"(^|\.)(attention|attn|self_attention)\.(masked_)?bias$")
_AS_OPENED, _AGAIN = "the file the build began with", "start the build again"

FloatArray = npt.NDArray[np.float32]
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
    file: Path
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


def changed(file: Path, found: str) -> CompileError:
    """The error for a file that changed after the checkpoint was opened."""
    return CompileError(
        STAGE,
        f"weights {file}",
        found=found,
        expected=_AS_OPENED,
        remedy=_AGAIN,
    )


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
