"""What a file format has to deliver for a checkpoint to be opened."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from belle_compile.compiler.checkpoint.templates import PromptTemplate
from belle_compile.compiler.checkpoint.tensors import STAGE, LazyTensor
from belle_compile.compiler.errors import CompileError


@dataclass
class Contents:
    """Everything found in a Hugging Face directory or a GGUF file, under the names stored there."""

    config: dict[str, Any]
    tensors: list[LazyTensor]
    tokenizer_json: str
    tokenizer_config: dict[str, Any] = field(default_factory=dict)
    tokens_map: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    template: PromptTemplate | None = None
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in this file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CompileError(
            STAGE,
            f"file {file}",
            found=f"text that is not JSON ({e})" if isinstance(e, ValueError) else str(e),
            expected="a JSON object",
            remedy="download the file again",
        ) from e
    if not isinstance(value, dict):
        raise CompileError(
            STAGE,
            f"file {file}",
            found=f"a JSON {type(value).__name__}",
            expected="a JSON object",
            remedy="download the file again",
        )
    return value
