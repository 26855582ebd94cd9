"""How llama.cpp's convert_hf_to_gguf.py stores a family: names of tensors, and metadata in the place of config.json."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families.family import STAGE

TENSOR_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)")


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file states before the values of its tensors.

    `get(key, default)` reads a value of the metadata. Keys of the architecture start with its name, which `value` and `number`
    add. `shapes` are those of the tensors, under their names in the file; `title` names the family in errors.
    """

    file: Path
    architecture: str
    title: str
    get: Callable[..., Any]
    shapes: Mapping[str, tuple[int, ...]]

    def value(self, key: str, default: Any = None) -> Any:
        """A value of the architecture."""
        return self.get(f"{self.architecture}.{key}", default)

    def number(self, key: str, default: float | None = None) -> Any:
        """A number of the architecture; raises CompileError where it is missing or one for each layer."""
        value = self.value(key, default)
        if isinstance(value, list) or value is None:
            raise CompileError(
                STAGE,
                f"metadata {self.architecture}.{key} of {self.file}",
                found="nothing" if value is None else "one value per layer",
                expected="one number",
                remedy=f"this is not a plain {self.title}; give its Hugging Face checkpoint",
            )
        return float(str(np.float32(value))) if isinstance(value, float) else value  # 1e-05 and not 9.999999747378752e-06


@dataclass(frozen=True)
class GgufLayout:
    """How the GGUF files of a family map to its Hugging Face checkpoints.

    `architectures` are the values of general.architecture. `read_config(header)` gives config.json without model_type and
    architectures, which the family has. The tensor `blk.0.PART.weight` is the weight of the module `modules[PART]` in the
    layer `layers`.0; outside of layers the prefixes are left out. `interleaved_heads` names the parts whose rows are stored
    with the two halves of every head interleaved, each with the key of config.json that holds its number of heads.
    """

    architectures: tuple[str, ...]
    read_config: Callable[[GgufHeader], dict[str, Any]]
    modules: Mapping[str, str]
    layers: str
    interleaved_heads: Mapping[str, str] = field(default_factory=dict)

    def canonical_name(self, stored: str) -> str | None:
        """The canonical name of a tensor; None for one that the family does not have."""
        match = TENSOR_NAME.fullmatch(stored)
        if match is None or match["part"] not in self.modules:
            return None
        layer = f"{self.layers}.{match['layer']}." if match["layer"] else ""
        return f"{layer}{self.modules[match['part']]}.{match['kind']}"

    def interleaved(self, stored: str, config: Mapping[str, Any]) -> int:
        """The number of heads whose halves are interleaved in a tensor's rows; 0 where the rows are in order."""
        match = TENSOR_NAME.fullmatch(stored)
        key = self.interleaved_heads.get(match["part"]) if match else None
        return int(config[key]) if key else 0
