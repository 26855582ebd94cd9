"""The file by which an engine that takes adapters tells the runtime what the passes did to the basis of its linears."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from belle_compile.compiler.ir.basis import AdaptedLinear, Change
from belle_compile.runtime.adapters.basis import EngineBasis, LinearBasis, Step


def basis_of(linears: Iterable[AdaptedLinear]) -> EngineBasis:
    """The basis of an engine's linears; equal tensors are stored once."""
    tensors: dict[str, npt.NDArray[Any]] = {}
    return EngineBasis({linear.name: _linear(linear, tensors) for linear in linears}, tensors)


def basis_file(basis: EngineBasis) -> bytes:
    """The content of the engine's file."""
    content: bytes = save(dict(sorted(basis.tensors.items())), basis.metadata())
    return content


def _linear(linear: AdaptedLinear, tensors: dict[str, npt.NDArray[Any]]) -> LinearBasis:
    outputs, inputs = linear.sizes
    return LinearBasis(inputs, outputs, tuple(_steps(linear.changes, tensors)))


def _steps(changes: Iterable[Change], tensors: dict[str, npt.NDArray[Any]]) -> Iterable[Step]:
    for change in changes:
        names = {}
        for key, array in change.arrays.items():
            values = np.ascontiguousarray(array if isinstance(array, np.ndarray) else array.numpy())
            digest = hashlib.sha256(values.tobytes()).hexdigest()[:16]
            names[key] = f"{key}.{'x'.join(map(str, values.shape))}.{digest}"
            tensors[names[key]] = values
        yield Step(change.side, change.kind, change.start, change.stop, names)
