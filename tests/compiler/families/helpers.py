"""A checkpoint without files, for what needs names and shapes only, and a change of one with files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from belle_compile.compiler.checkpoint import Checkpoint, LazyTensor, PromptTemplate


def fake_checkpoint(family: str, config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """Its tensors hold 0, 1, 2, ..."""

    def tensor(name: str, shape: tuple[int, ...]) -> LazyTensor:
        values = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
        return LazyTensor(name, shape, "float32", Path("model.safetensors"), lambda start, stop: values[start:stop])

    tensors = {name: tensor(name, shape) for name, shape in shapes.items()}
    return Checkpoint(path=Path("fake"), family=family, config=config, tensors=tensors, tokenizer_json="{}", special={},
                      template=PromptTemplate("raw", ""), generation={}, files=())  # fmt: skip


def rewrite_tensors(directory: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Let `change` edit the tensors of model.safetensors."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return directory


def rewrite_config(directory: Path, **changes: Any) -> Path:
    """Set keys of config.json."""
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return directory
