"""The canonical names of a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from belle_compile.compiler.checkpoint.tensors import DERIVED_BUFFERS, STAGE, LazyTensor
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families.family import Family


def canonical(tensors: Iterable[LazyTensor], family: Family[Any]) -> dict[str, LazyTensor]:
    """Tensors by the names that the family's graph asks for, without derived buffers; raises CompileError for a name that
    occurs twice."""
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
