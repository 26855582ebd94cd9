"""Frontends: a checkpoint's config and tensors -> the graph. One architecture is one file and one line in FRONTENDS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import onnx_ir as ir

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import bloom, llama

if TYPE_CHECKING:
    from belle_compile.compiler.checkpoint import Checkpoint

__all__ = ["FRONTENDS", "build_graph"]

FRONTENDS: Mapping[str, Callable[[Checkpoint], ir.Model]] = {
    "bloom": bloom.build,
    "llama": llama.build,
}


def build_graph(checkpoint: Checkpoint) -> ir.Model:
    """The verified float32 graph of a checkpoint; its weights are lazy and none but a tied head is read here.

    Raises CompileError where a config key asks for something the graph would not compute, and where tensors are missing,
    misshapen or left over.
    """
    frontend = FRONTENDS.get(checkpoint.family)
    if frontend is None:
        what, expected = f"architecture of {checkpoint.path}", f"one of {', '.join(FRONTENDS)}"
        raise CompileError("frontend", what, found=repr(checkpoint.family), expected=expected)
    return frontend(checkpoint)
