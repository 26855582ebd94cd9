"""The opened checkpoint that the rest of the compiler works with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from belle_compile.compiler.checkpoint.sources.base import digests
from belle_compile.compiler.checkpoint.templates import PromptTemplate
from belle_compile.compiler.checkpoint.tensors import STAGE, LazyTensor
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.stored_path import StoredPath

_COMPARED = 2000  # names that an unknown one is compared with, which takes a second for ten times as many


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; headers are verified, values are not read yet.

    `config` is the content of config.json (for GGUF, made from its metadata). `special` holds bos_token_id, eos_token_ids,
    pad_token_id, bos_token and eos_token; `add_bos`, whether BOS goes before a prompt that `template` rendered; and
    `add_bos_raw`, whether the checkpoint's tokenizer puts it before plain text. `tokenizer_json` is for encoding with
    add_special_tokens=False. `notes` are sentences for the manifest and the report: what was ignored or approximated.
    """

    path: StoredPath
    family: str
    config: dict[str, Any]
    tensors: Mapping[str, LazyTensor]
    tokenizer_json: str
    special: dict[str, Any]
    template: PromptTemplate
    generation: dict[str, Any]
    files: tuple[StoredPath, ...]
    notes: tuple[str, ...] = ()

    def tensor(self, name: str, shape: tuple[int, ...]) -> LazyTensor:
        """The tensor called `name`; raises CompileError if it is missing or has another shape."""
        tensor = self.tensors.get(name)
        if tensor is None:
            prefixed = [other for other in self.tensors if other.endswith(f".{name}")]
            near = prefixed[:3] or get_close_matches(name, [*self.tensors][:_COMPARED], n=3)
            found = f"no such tensor; near names: {', '.join(near)}" if near else "no such tensor and no similar name"
            raise CompileError(
                STAGE,
                f"tensor {name} of {self.path}",
                found=found,
                expected=f"shape {list(shape)}",
                remedy="the weights do not belong to this config.json, or a weight file is missing",
            )
        if tensor.shape != shape:
            raise CompileError(
                STAGE,
                f"tensor {name} in {tensor.file}",
                found=f"shape {list(tensor.shape)}",
                expected=f"shape {list(shape)}",
                remedy="the weights do not belong to this config.json",
            )
        return tensor

    def digests(self, progress: Callable[[StoredPath, int, int], None] | None = None) -> dict[str, str]:
        """The SHA-256 by name of every file that this checkpoint was read from; see `sources.base.digests`."""
        return digests(self.files, self.path, progress)
