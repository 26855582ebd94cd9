"""A checkpoint of which only the dimensions are known: its graph can be divided and weighed, its weights not be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from belle_compile.compiler.checkpoint import Checkpoint, open_checkpoint
from belle_compile.compiler.checkpoint.open import family_of
from belle_compile.compiler.checkpoint.templates import choose_template
from belle_compile.compiler.checkpoint.tensors import LazyTensor
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import bloom, llama
from belle_compile.compiler.families.layers import HEAD


class Outline(Checkpoint):
    """Has every tensor that a frontend asks for, in the shape that it expects."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> LazyTensor:
        """The tensor, of no values."""
        return _unread(name, shape, self.path)


def outline(path: str | Path) -> Checkpoint:
    """A checkpoint whose headers are read, or for a config.json alone one of its dimensions."""
    path = Path(path)
    if path.suffix != ".json":
        return open_checkpoint(path)
    config = _read(path)
    family = family_of(config, path)
    tied = (bloom.read_config(config) if family == "bloom" else llama.read_config(config)).tied_head
    head = {} if tied else {HEAD: _unread(HEAD, (), path)}
    template = choose_template(None, None, family, config)
    return Outline(path, family, config, head, "", {}, template, {}, ())


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CompileError("plan", f"file {path}", found=error.strerror or str(error), expected="a config.json") from None
    except ValueError as error:
        raise CompileError("plan", f"file {path} is not JSON", found=str(error), expected="a config.json") from None
    if not isinstance(config, dict):
        raise CompileError("plan", f"file {path}", found="no object", expected="a config.json")
    return config


def _unread(name: str, shape: tuple[int, ...], path: Path) -> LazyTensor:
    def load(start: int, stop: int) -> NoReturn:
        raise CompileError(
            "plan", f"values of {name}", found=f"only dimensions, in {path}", expected="a checkpoint with weights"
        )

    return LazyTensor(name, shape, "float16", path, load)
