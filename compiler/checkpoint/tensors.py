"""A tensor of a checkpoint that stays on disk until it is read, and the canonical names tensors go by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families.family import Family

STAGE = "checkpoint"
FLOAT_DTYPES = frozenset({"float64", "float32", "float16", "bfloat16"})

# Recomputed from config.json by everybody; old LLaMA conversions still store them.
DERIVED_BUFFERS = ("rotary_emb.inv_freq",)
GPTQ_SUFFIXES = (".qweight", ".qzeros", ".g_idx")

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LazyTensor:
    """Name, shape and stored dtype of one tensor; `read` and `rows` fetch float32 values and keep nothing.

    `load(start, stop)` gives rows start..stop of axis 0 (the whole tensor when it is a scalar) in any float dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    load: Callable[[int, int], npt.NDArray[Any]] = field(repr=False, compare=False)

    def read(self) -> FloatArray:
        """The whole tensor: float32, C-contiguous."""
        return self._float32(0, self.shape[0] if self.shape else 1, self.shape)

    def rows(self, start: int, stop: int) -> FloatArray:
        """Rows start..stop of axis 0 as float32 [stop - start, ...]; only these are read from the file."""
        if not self.shape or not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows {start}..{stop} of {self.name} with shape {list(self.shape)}")
        return self._float32(start, stop, (stop - start, *self.shape[1:]))

    def _float32(self, start: int, stop: int, shape: tuple[int, ...]) -> FloatArray:
        values: FloatArray = np.ascontiguousarray(self.load(start, stop), dtype=np.float32).reshape(shape)
        return values


def require_float(tensor: LazyTensor) -> None:
    """Raise unless the tensor holds plain floating-point weights."""
    name, dtype, file = tensor.name, tensor.dtype, tensor.file
    if dtype in FLOAT_DTYPES:
        return
    if name.endswith(GPTQ_SUFFIXES):
        raise CompileError(
            STAGE,
            f"tensor {name} in {file}",
            found=f"{dtype}, a packed GPTQ weight",
            expected="float32, float16 or bfloat16 weights",
            remedy="quantised GPTQ checkpoints are not yet supported: give the checkpoint it was made from",
        )
    raise CompileError(
        STAGE,
        f"tensor {name} in {file}",
        found=f"dtype {dtype}",
        expected="float32, float16 or bfloat16",
        remedy="convert the checkpoint to one of these",
    )


def canonical(tensors: Iterable[LazyTensor], family: Family[Any]) -> dict[str, LazyTensor]:
    """Tensors under the names that the family's graph asks for, without derived buffers."""
    named: dict[str, LazyTensor] = {}
    for tensor in tensors:
        if tensor.name.endswith(DERIVED_BUFFERS):
            continue
        name = family.canonical_name(tensor.name)
        if name in named:
            raise CompileError(
                STAGE,
                f"tensor {name}",
                found=f"it twice, in {named[name].file.name} and in {tensor.file.name}",
                expected="every tensor once",
                remedy="download the checkpoint again",
            )
        named[name] = replace(tensor, name=name)
    return named
