"""What a format is: which files it recognises, and what it finds in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from belle_compile.compiler.checkpoint.sources.base import Files
from belle_compile.compiler.checkpoint.templates import PromptTemplate
from belle_compile.compiler.checkpoint.tensors import LazyTensor


@dataclass
class Contents:
    """Everything found in the files of a checkpoint.

    `config` has the keys of Transformers' config.json; tensors have the names stored in the files. `tokenizer_config`,
    `tokens_map` and `generation` are tokenizer_config.json, special_tokens_map.json and generation_config.json, empty where
    there are none. `template` is the checkpoint's own chat template. `files` are all files that were read; `notes` are
    sentences for the manifest and the report: what was ignored or approximated.
    """

    config: dict[str, Any]
    tensors: list[LazyTensor]
    tokenizer_json: str
    tokenizer_config: dict[str, Any] = field(default_factory=dict)
    tokens_map: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    template: PromptTemplate | None = None
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Format(Protocol):
    """One way of holding a model in files. `FORMATS` lists all of them, the preferred one first."""

    @property
    def name(self) -> str:
        """What notes call it."""

    @property
    def weights(self) -> str:
        """A glob pattern of the files that hold its weights, for downloads."""

    def recognises(self, files: Files) -> bool:
        """Whether these files hold weights of this format; looks at names, or at a small file."""

    def read(self, files: Files) -> Contents:
        """What recognised files hold, by their headers: values of tensors are read later.

        A format that holds weights only takes the rest from the files beside them: see `huggingface.read_release`. Raises
        CompileError where files are damaged, missing or of a kind that is not supported.
        """
