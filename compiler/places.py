"""Places that a user names: of checkpoints and of files. They are looked at before anything that takes time."""

from __future__ import annotations

import math
import re
from pathlib import Path

from belle_compile.compiler.engine_directory import is_engine
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.reading import Reading

# Owner and name and, for one of several models in a repository, the path of its file: owner/name/q4/model.gguf.
_HUB_NAME = re.compile(r"(?P<model>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(/(?P<file>([\w.+-]+/)*[\w.+-]+\.(gguf|pt)))?")
CHECKPOINT_STAGE = "checkpoint"
MODEL_SUFFIXES = (".gguf", ".pt")  # a file with one is a model
JINJA_SUFFIXES = (".jinja", ".jinja2", ".j2")  # a prompt template with one is a file


def hub_name(name: str) -> re.Match[str] | None:
    """The name of a model on the Hugging Face Hub in its parts `model` and `file`; None for other text, and for a path into a
    directory of this host whose file is missing."""
    match = _HUB_NAME.fullmatch(name)
    return None if match is None or (match["file"] and Path(Path(name).parts[0]).exists()) else match


def checkpoint_name(path: Path) -> str:
    """The name of the model in a checkpoint: that of its directory, or of its file without the suffix."""
    return (path.stem if path.suffix in MODEL_SUFFIXES else path.name) or path.resolve().name


def check_checkpoint(name: str | Path) -> None:
    """Raise CompileError where there is nothing at a checkpoint's path, or an engine; a model on the Hub is not looked up."""
    path = Path(name).expanduser()
    if not path.exists():
        if hub_name(str(name)) is None:
            raise no_checkpoint(name)
    elif is_engine(path):
        remedy = "give the checkpoint that it was built from; belle-compile repartition makes one for other ranks from it"
        expected = "a checkpoint"
        raise CompileError(CHECKPOINT_STAGE, f"path {path}", found="an engine directory", expected=expected, remedy=remedy)


def check_reading(reading: Reading) -> None:
    """Raise CompileError for a file or directory that does not exist, for one to be written that does, and for an adapter's
    scale that is no number."""
    check_file(CHECKPOINT_STAGE, reading.key, "the key of an encrypted release")
    if (out := reading.save_decrypted) is not None and (reading.key is None or out.exists()):
        found = "no key to decrypt with" if reading.key is None else "something there already"
        remedy = "give the key of the release with --key" if reading.key is None else "give another one"
        raise CompileError(CHECKPOINT_STAGE, f"--save-decrypted {out}", found=found, expected="a new directory", remedy=remedy)
    for adapter in reading.adapters:
        path = Path(adapter.place).expanduser()
        if not math.isfinite(adapter.scale):
            found, expected = f"{adapter.scale}", "a number"
            raise CompileError(CHECKPOINT_STAGE, f"scale of adapter {path}", found=found, expected=expected)
        if path.exists() or hub_name(adapter.place) is None:
            check_file(CHECKPOINT_STAGE, path, "the directory of an adapter, or its name on the Hugging Face Hub")


def no_checkpoint(name: str | Path) -> CompileError:
    """The error for a place that no checkpoint is at."""
    return CompileError(
        CHECKPOINT_STAGE,
        f"path {Path(name).expanduser()}",
        found="nothing there",
        expected="a checkpoint directory, a .gguf or .pt file or a Hub name",
        remedy="check the path",
    )


def check_file(stage: str, path: Path | None, expected: str) -> None:
    """Raise CompileError where a path was given and there is nothing."""
    if path is not None and not path.exists():
        raise CompileError(stage, f"path {path}", found="nothing there", expected=expected, remedy="check the path")


def check_template(template: str | None) -> None:
    """Raise CompileError where a prompt template is named as a file and there is nothing."""
    if template is not None and "{" not in template and template.endswith(JINJA_SUFFIXES):
        check_file(CHECKPOINT_STAGE, Path(template), "a Jinja file")
