"""The registry of families, which are found by name, by config.json, or by a GGUF file's architecture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families.family import Family
from belle_compile.compiler.families.gguf import GgufLayout
from belle_compile.compiler.families.model_config import STAGE
from belle_compile.compiler.stored_path import StoredPath

REGISTRY: dict[str, Family[Any]] = {}


def register(family: Family[Any]) -> None:
    """Add a family; raises ValueError if one of its names or GGUF architectures belongs to another."""
    for other in REGISTRY.values():
        taken = family.names & other.names | set(_gguf_architectures(family)) & set(_gguf_architectures(other))
        if taken:
            raise ValueError(f"family {family.name}: {', '.join(sorted(taken))} belongs to {other.name} already")
    REGISTRY[family.name] = family


def by_name(name: str, path: StoredPath) -> Family[Any]:
    """The family called `name`; raises CompileError, which names the checkpoint at `path`, if there is none."""
    if name not in REGISTRY:
        raise CompileError(STAGE, f"architecture of {path}", found=repr(name), expected=f"one of {', '.join(REGISTRY)}")
    return REGISTRY[name]


def by_config(config: Mapping[str, Any], path: StoredPath) -> Family[Any]:
    """The family that a config.json states as its model_type or, in old releases, as its architecture; raises CompileError if
    there is none."""
    stated = config.get("model_type") or (config.get("architectures") or [""])[0]
    for family in REGISTRY.values():
        if str(stated).lower() in family.names:
            return family
    titles = _alternatives(family.title for family in REGISTRY.values())
    raise CompileError(
        STAGE,
        f"model_type of {path}",
        found=repr(stated) if stated else "none",
        expected=_alternatives(REGISTRY),
        remedy=f"give a BELLE checkpoint, or another of the {titles} family",
    )


def by_gguf(architecture: Any, file: StoredPath) -> tuple[Family[Any], GgufLayout]:
    """The family with a GGUF file's general.architecture, and its layout of GGUF files; raises CompileError if there is
    none."""
    for family in REGISTRY.values():
        if family.gguf is not None and architecture in family.gguf.architectures:
            return family, family.gguf
    known = [name for family in REGISTRY.values() for name in _gguf_architectures(family)]
    without = _alternatives(family.title for family in REGISTRY.values() if family.gguf is None)
    raise CompileError(
        STAGE,
        f"GGUF {file}",
        found=f"architecture {architecture}",
        expected=_alternatives(known),
        remedy=f"give the Hugging Face checkpoint of this model, if it is of the {without} family" if without else "",
    )


def _gguf_architectures(family: Family[Any]) -> tuple[str, ...]:
    return family.gguf.architectures if family.gguf else ()


def _alternatives(words: Iterable[str]) -> str:
    """`a, b or c`."""
    *first, last = [*words] or [""]
    return f"{', '.join(first)} or {last}" if first else last
