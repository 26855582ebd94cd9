"""The layout in which llama.cpp's convert_hf_to_gguf.py stores a family: tensor names, and metadata instead of config.json."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families.model_config import STAGE
from belle_compile.compiler.stored_path import StoredPath

TENSOR_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)")


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file: its metadata and the shapes of its tensors.

    `get(key, default)` reads a value of the metadata. Keys of the architecture start with its name, which `value` and `number`
    add. `shapes` are the tensors' shapes by their names in the file; `title` names the family in errors.
    """

    file: StoredPath
    architecture: str
    title: str
    get: Callable[..., Any]
    shapes: Mapping[str, tuple[int, ...]]

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a key of the architecture."""
        return self.get(f"{self.architecture}.{key}", default)

    def number(self, key: str, default: float | None = None) -> Any:
        """The number of a key of the architecture; raises CompileError if it is missing or a list with one number per layer."""
        value = self.value(key, default)
        if type(value) not in (int, float):
            found = "one value per layer" if isinstance(value, list) else "nothing" if value is None else repr(value)[:60]
            raise CompileError(
                STAGE,
                f"metadata {self.architecture}.{key} of {self.file}",
                found=found,
                expected="one number",
                remedy=f"this is not a plain {self.title}; give its Hugging Face checkpoint",
            )
        return float(str(np.float32(value))) if isinstance(value, float) else value  # 1e-05 and not 9.999999747378752e-06

    def count(self, key: str) -> int:
        """The whole number of a key of the architecture; raises CompileError if it is missing, another value, or below 1."""
        value = self.number(key)
        if type(value) is not int or value < 1:
            raise CompileError(
                STAGE,
                f"metadata {self.architecture}.{key} of {self.file}",
                found=str(value),
                expected="a whole number >= 1",
                remedy="download the file again",
            )
        return value

    def vocabulary(self, table: str) -> int:
        """The number of rows of the embedding table, a tensor of the file; raises CompileError if it is missing."""
        if table not in self.shapes:
            raise CompileError(
                STAGE,
                f"GGUF {self.file}",
                found=f"no tensor {table}",
                expected="a whole model",
                remedy="download the file again",
            )
        return self.shapes[table][0]


@dataclass(frozen=True)
class GgufLayout:
    """The mapping from the GGUF files of a family to its Hugging Face checkpoints.

    `architectures` are the values of general.architecture. `read_config(header)` returns config.json without model_type and
    architectures, which the family adds. The tensor `blk.0.PART.weight` is the weight of the module `modules[PART]` in the
    layer `layers`.0; tensors outside of layers have neither prefix. `interleaved_heads` maps the parts whose rows are stored
    with the two halves of every head interleaved to the key of config.json that holds their number of heads. `separated_heads`
    does so for parts that hold q, k and v of one head after another in Hugging Face checkpoints, and all q, all k, all v here.
    `rope_divisors` names a tensor that divides the rotary frequencies; its values become `rope_divisors` of config.json.

    For exports, `write_config(config)` returns the metadata of a config.json, without the architecture before its keys, and
    `write_divisors` the divisors of its rotary frequencies (none: they are not divided); both raise CompileError for a config
    that llama.cpp does not compute.
    """

    architectures: tuple[str, ...]
    read_config: Callable[[GgufHeader], dict[str, Any]]
    modules: Mapping[str, str]
    layers: str
    interleaved_heads: Mapping[str, str] = field(default_factory=dict)
    separated_heads: Mapping[str, str] = field(default_factory=dict)
    rope_divisors: str = ""
    write_config: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
    write_divisors: Callable[[Mapping[str, Any]], Sequence[float]] = lambda config: ()

    def canonical_name(self, stored: str) -> str | None:
        """The canonical name of a stored tensor; None if the family has no such tensor."""
        match = TENSOR_NAME.fullmatch(stored)
        if match is None or match["part"] not in self.modules:
            return None
        layer = f"{self.layers}.{match['layer']}." if match["layer"] else ""
        return f"{layer}{self.modules[match['part']]}.{match['kind']}"

    def interleaved(self, stored: str, config: Mapping[str, Any]) -> int:
        """The number of heads of a stored tensor whose halves are interleaved; 0 if its rows are in order."""
        return _heads(self.interleaved_heads, stored, config)

    def separated(self, stored: str, config: Mapping[str, Any]) -> int:
        """The number of heads of a stored tensor whose q, k and v are apart; 0 if its rows are in order."""
        return _heads(self.separated_heads, stored, config)


def _heads(keys: Mapping[str, str], stored: str, config: Mapping[str, Any]) -> int:
    match = TENSOR_NAME.fullmatch(stored)
    key = keys.get(match["part"]) if match else None
    return int(config[key]) if key else 0
