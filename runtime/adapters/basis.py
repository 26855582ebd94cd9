"""The basis of an engine's linears: what compiling did to their inputs and outputs, which adapters must follow.

An engine that takes adapters has the file `adapters.safetensors`. Its metadata has one entry `linears`: JSON with the changes
of each linear in order, and in them the names of tensors of the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.adapters.factors import Factors, Floats
from belle_compile.runtime.adapters.targets import STAGE
from belle_compile.runtime.adapters.tensors import parse_tensors, read_file
from belle_compile.runtime.artifact import Manifest
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.schema import from_plain, parse_json, refuse_from, to_plain

BASIS_NAME = "adapters.safetensors"
_ENTRY = "linears"
_REMEDY = "copy the engine again or rebuild it"


@dataclass(frozen=True)
class Step:
    """A change of the inputs or outputs of a linear, as `compiler/ir/basis.py` describes it; `arrays` names its tensors."""

    side: str
    kind: str
    start: int = 0
    stop: int | None = None
    arrays: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LinearBasis:
    """A linear that takes adapters: its inputs and outputs in the checkpoint, and the steps from there to the engine."""

    inputs: int
    outputs: int
    steps: tuple[Step, ...]


class EngineBasis:
    """The linears that take adapters, by name, and the tensors of their steps."""

    def __init__(self, linears: Mapping[str, LinearBasis], tensors: Mapping[str, NDArray[Any]]) -> None:
        self.linears, self.tensors = linears, tensors

    @classmethod
    def read(cls, engine: Path) -> EngineBasis:
        """Read the file of an engine; raises `EngineError` if it is damaged."""
        path = engine / BASIS_NAME
        tensors, metadata = parse_tensors(read_file(path), path)
        refuse = refuse_from(f"engine: {path}", _REMEDY)
        try:
            plain = parse_json(metadata[_ENTRY])
            linears = {name: from_plain(LinearBasis, entry, refuse, name) for name, entry in plain.items()}
        except (KeyError, ValueError, AttributeError) as error:
            raise EngineError("engine", f"file {path}", found=f"no valid {_ENTRY}: {error}", remedy=_REMEDY) from None
        lacking = {name for linear in linears.values() for step in linear.steps for name in step.arrays.values()} - {*tensors}
        if lacking:
            raise EngineError("engine", f"file {path}", found=f"no tensor {min(lacking)}", remedy=_REMEDY)
        return cls(linears, tensors)

    def metadata(self) -> dict[str, str]:
        """The metadata of the file."""
        return {_ENTRY: json.dumps({name: to_plain(linear) for name, linear in self.linears.items()}, sort_keys=True)}

    def factors(self, name: str, a: Floats, b: Floats) -> Factors:
        """The change b @ a of a linear, a [rank, inputs] and b [outputs, rank] as in the checkpoint, for the engine's."""
        rows, columns, addend = a, np.ascontiguousarray(b.T), np.zeros(len(a), np.float32)
        for step in self.linears[name].steps:
            arrays = {key: self.tensors[tensor] for key, tensor in step.arrays.items()}
            if step.kind == "shift":
                addend = addend + rows @ arrays["vector"]
            elif step.side == "inputs":
                rows = _changed(rows, step, arrays)
            else:
                columns = _changed(columns, step, arrays)
        return Factors(np.ascontiguousarray(rows), addend, np.ascontiguousarray(columns.T))


def check_takes_adapters(manifest: Manifest) -> None:
    """Raise `EngineError` for an engine that was built without room for adapters."""
    if BASIS_NAME not in manifest.files:
        remedy = "build it with belle-compile build --lora-rank"
        raise EngineError(STAGE, "this engine takes no adapters", found=f"no {BASIS_NAME}", remedy=remedy)


def _changed(rows: Floats, step: Step, arrays: Mapping[str, NDArray[Any]]) -> Floats:
    """Rows [count, width] after a step."""
    if step.kind == "center":
        centered: Floats = rows - rows.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
        return centered
    if step.kind == "reorder":
        ordered: Floats = rows[:, arrays["order"]]
        return ordered
    result: Floats = rows.copy()
    part = slice(step.start, step.stop)
    if step.kind == "scale":
        result[:, part] *= arrays["factors"]
    else:
        assert step.kind == "rotate", step.kind
        selected = result[:, part]
        result[:, part] = _rotated(selected.reshape(-1, len(arrays["signs"])), **arrays).reshape(selected.shape)
    return result


def _rotated(x: Floats, signs: Floats, mixer: Floats) -> Floats:
    """x times signs, then the normalized Hadamard transform of each of len(mixer) blocks of a row, which are then mixed."""
    blocks = len(mixer)
    width = len(signs) // blocks
    y = (x * signs).reshape(-1, width).astype(np.float64)
    stride = 1
    while stride < width:
        pairs = y.reshape(-1, 2, stride)
        y = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
        stride *= 2
    y = y.reshape(-1, blocks, width) * width**-0.5
    mixed: Floats = np.matmul(mixer, y).reshape(x.shape).astype(np.float32)
    return mixed
