"""A checkpoint without weights: enough to build and partition its graph and to estimate its memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from belle_compile.compiler.checkpoint import Checkpoint, open_checkpoint
from belle_compile.compiler.checkpoint.packed.registry import packed_by, without_statements
from belle_compile.compiler.checkpoint.templates import RAW, choose_template
from belle_compile.compiler.checkpoint.tensors import LazyTensor
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import registry
from belle_compile.compiler.families.config import without_keys
from belle_compile.compiler.families.layers import HEAD
from belle_compile.compiler.reading import PLAIN, Reading
from belle_compile.compiler.stored_path import StoredPath


class Outline(Checkpoint):
    """A checkpoint without values: it has every tensor that the family's graph asks for, in the shape asked for."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> LazyTensor:
        """A tensor of this name and shape; reading its values raises CompileError."""
        return _unread(name, shape, self.path)


def outline(path: str | Path, reading: Reading = PLAIN) -> Checkpoint:
    """Open a checkpoint for a plan; `path` may be its config.json alone. A plan renders no prompts, so the template is RAW.
    An adapter beside the weights, which would not change a plan, is not looked for."""
    path = Path(path)
    if path.suffix != ".json":
        return open_checkpoint(path, template=RAW, reading=replace(reading, ignore_adapter=reading.ignore_adapter or None))
    for option, what, given in (("--adapter", "adapters", reading.adapters), ("--key", "a key", reading.key)):
        if given:
            found, remedy = "a config.json alone", f"give the directory of the model, or leave {option} out"
            raise CompileError("plan", f"a plan with {what}", found=found, expected="a checkpoint", remedy=remedy)
    config = _read(path)
    packed_by(config, path)  # raises for weights that no build reads
    config = without_statements(config)
    family = registry.by_config(config, path)
    config, _ = without_keys(config, reading.ignored_config_keys, family.keys.used)
    head = {} if family.read_config(config).tied_head else {HEAD: _unread(HEAD, (), path)}
    template = choose_template(RAW, None, family, config)
    return Outline(path, family.name, config, head, "", {}, template, {}, ())


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


def _unread(name: str, shape: tuple[int, ...], path: StoredPath) -> LazyTensor:
    def load(start: int, stop: int) -> NoReturn:
        raise CompileError(
            "plan", f"values of {name}", found=f"only dimensions, in {path}", expected="a checkpoint with weights"
        )

    return LazyTensor(name, shape, "float16", path, load)
