"""The interface of formats: a format recognises files and reads their contents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from belle_compile.compiler.checkpoint.sources.base import Files
from belle_compile.compiler.checkpoint.templates import PromptTemplate
from belle_compile.compiler.checkpoint.tensors import LazyTensor
from belle_compile.compiler.stored_path import StoredPath

# Files that look like weights and are what a trainer keeps beside them.
TRAINER_FILES = ("training_args.*", "optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*")


@dataclass
class Contents:
    """The contents of a checkpoint's files.

    `config` has the keys of Transformers' config.json; tensors have the names stored in the files. `tokenizer_config`,
    `tokens_map` and `generation` are tokenizer_config.json, special_tokens_map.json and generation_config.json, empty if a file
    is missing. `implied` are keys of tokenizer_config.json that the format implies where that file states none. `sampling` is
    the source of the generation settings, as notes name it, and these settings in the keys of generation_config.json.
    `metadata_of` is the file whose metadata all these were made from, empty if they are files of their own.
    `template` is the checkpoint's own chat template. `files` are all files that were read; `notes` are sentences for the
    manifest and the report about what was ignored or approximated.
    """

    config: dict[str, Any]
    tensors: list[LazyTensor]
    tokenizer_json: str
    tokenizer_config: dict[str, Any] = field(default_factory=dict)
    tokens_map: dict[str, Any] = field(default_factory=dict)
    implied: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    sampling: tuple[str, dict[str, Any]] = ("generation_config.json", {})
    template: PromptTemplate | None = None
    metadata_of: str = ""
    files: list[StoredPath] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Format(Protocol):
    """One way of storing a model in files. `FORMATS` lists all of them, the preferred one first."""

    @property
    def weights(self) -> tuple[str, ...]:
        """Glob patterns of the files that hold its weights, for downloads. A repository has weights of this format if one of
        its files matches the first pattern."""

    def recognises(self, files: Files) -> bool:
        """Whether these files hold weights of this format, judged by names or by a small file."""

    def read(self, files: Files) -> Contents:
        """Read recognised files: their headers now, values of tensors later.

        A format whose files hold weights only reads the rest from the files beside them, see `huggingface.read_release`. Raises
        CompileError for files that are damaged, missing or not supported.
        """
